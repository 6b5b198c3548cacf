"""One training from its keys to a published adapter: data report, trainer, checks, folder."""

import json
import logging
import os
import warnings
from contextlib import ExitStack
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from finetune import checks, data, drift, peft_methods
from finetune.adapter import Base, Manifest, publishing
from finetune.engine import Engine
from finetune.keys import Keys, parse
from finetune.ledger import Ledger, sizes
from finetune.methods import METHODS, Method
from finetune.muon import Muon
from finetune.progress import Log, Shown
from finetune.rollouts import Rollouts


def run(name: str, arguments: list[str], *, prog: str, engine: Engine | None = None) -> Path | None:
    """Train, check and publish; the adapter's folder, None in processes that only help to train.

    `engine` is one that serves the base model already; without it one is started when needed.

    Raises:
        SystemExit: The keys, the data or the finished adapter are not in order; the message says
            what to do.
    """
    method = METHODS[name]
    _quiet()
    try:
        if name == "grpo" and _launched() > 1:
            raise SystemExit(
                f"{prog}: grpo rolls out through one engine and trains in one process; start it "
                "without torchrun"
            )
        trainer_kind, config = method.load()
        keys = parse(config, arguments, method=name, fixed=method.defaults, prog=prog)
        return Training(method, keys, trainer_kind, prog, engine).run()
    except SystemExit as refused:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(1) from refused  # the first process says why


def _launched() -> int:
    """Processes that a launcher started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _quiet() -> None:
    """One progress bar is enough, and nothing is told to anybody."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    logging.getLogger("vllm").setLevel(logging.ERROR)  # also of what it says while it is imported
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")


class Training:
    """One run."""

    def __init__(
        self,
        method: Method,
        keys: Keys,
        trainer_kind: type,
        prog: str,
        engine: Engine | None,
    ) -> None:
        self.method, self.keys, self.prog = method, keys, prog
        self.args = keys.training
        self.out = Path(self.args.output_dir)
        self.console = Console(quiet=not self.first)
        as_bar = self.first and self.console.is_terminal and not self.args.disable_tqdm
        self._shown = Shown(self.console, as_bar=as_bar)
        if self.args.world_size != _launched():
            raise SystemExit(
                f"{prog}: {_launched()} processes were started, and {self.args.world_size} would "
                "train together; start them with torchrun"
            )
        if keys.model.model_name_or_path is None:
            raise SystemExit(f"{prog}: say 'model_name_or_path'")
        if self.args.fsdp and (self.args.use_cpu or self.args.world_size == 1):
            raise SystemExit(
                f"{prog}: 'fsdp' splits the base over GPUs, one for each process; there is none to "
                "split it over"
            )
        if self.args.fsdp and "FULL" not in self.args.fsdp_plugin_args["state_dict_type"]:
            raise SystemExit(f"{prog}: the adapter is gathered whole: leave out 'state_dict_type'")
        if self.quantised is not None and find_spec("bitsandbytes") is None:
            raise SystemExit(
                f"{prog}: 'load_in_4bit' and 'load_in_8bit' need bitsandbytes, which is not "
                "installed: pip install bitsandbytes==0.50.2"
            )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            keys.model.model_name_or_path, revision=keys.model.model_revision
        )
        self.template = self.tokenizer.chat_template
        self._kind = trainer_kind
        self._engine = engine
        self._owned = ExitStack()
        self._rollouts: Rollouts | None = None

    @property
    def engine(self) -> Engine:
        """VLLM with the base model; started when it is needed first."""
        if self._engine is None:
            task, lora = self.keys.task, self.keys.model
            rank = max(2 * lora.lora_r, task.convert_rank if lora.use_dora else 1)
            self._engine = self._owned.enter_context(
                Engine(str(lora.model_name_or_path), rank=rank, seed=self.args.seed)
            )
        return self._engine

    @property
    def first(self) -> bool:
        """Whether this process is the one that tells and writes."""
        return self.args.process_index == 0

    def run(self) -> Path | None:
        """See `run`."""
        with self._owned:
            return self._run()

    def _run(self) -> Path | None:
        set_seed(self.args.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        rows, test, report = self._data()
        set_seed(self.args.seed)
        trainer = self._trainer(rows, test)
        ledger = Ledger(*sizes(trainer.model))
        initial = self._initial(trainer)
        resume = self.args.resume_from_checkpoint
        if resume in ("true", "True", True):
            resume = get_last_checkpoint(str(self.out))
        with self._shown.bar:
            trainer.train(resume_from_checkpoint=resume)
        ledger.tokens = _tokens_seen(trainer, report)
        ledger.sampled = self.keys.task.data_tokens
        if self._rollouts is not None:
            ledger.sampled += self._rollouts.tokens * self.args.world_size
        history = trainer.state.log_history
        spent = ledger.figures() | {"processes": float(self.args.world_size)}
        if self._apart(trainer):
            trainer.save_model(str(self.out / "trained"))  # each process has a part of it
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()  # a process that exits within its group can hang
        if not self.first:
            return None
        drift.plot(history, self.out / "drift.png")
        return self._publish(self._whole(trainer), spent, report, initial, drift.figures(history))

    def _data(self) -> tuple[Dataset, Dataset | None, data.Report]:
        task, report = self.keys.task, data.Report()
        raw = data.mixture(task, seed=self.args.seed)
        rows = self._prepared(raw, report)
        if task.test_name is not None:
            test_set = data.Exam(data.listed(data.read(task.test_name)))
            report.in_test = sum(map(test_set.has, data.listed(raw)))
        report.show(self.console, f"{self.method.name}: what is learned from")
        if self.first:
            report.write(self.out / "data_report.json")
        if not report.kept:
            raise SystemExit(f"{self.prog}: no row is left to learn from")
        if task.test_split_size:
            split = rows.train_test_split(task.test_split_size, seed=self.args.seed)
            return split["train"], split["test"], report
        if self.args.eval_strategy != "no":
            raise SystemExit(f"{self.prog}: 'eval_strategy' needs a 'test_split_size'")
        return rows, None, report

    def _prepared(self, raw: Dataset, report: data.Report) -> Dataset:
        longest = getattr(self.args, "max_length", None)
        tokens = data.Tokens(self.tokenizer, max_length=longest)
        columns = self.method.columns
        if columns == "demonstrations":
            return data.tokenised(
                data.listed(raw),
                report,
                lambda row: tokens.demonstration(
                    row,
                    everything=self.args.completion_only_loss is False,
                    turns=self.args.assistant_only_loss,
                ),
                max_length=longest,
                stop=cast(int | None, self.tokenizer.eos_token_id),
            )
        if columns == "steps":
            judging = self.judging()
            return data.tokenised(
                data.listed(raw),
                report,
                lambda row: tokens.judged(row, judging),
                max_length=longest,
                stop=None,
            )
        return data.checked(raw, report, columns, tokens, max_length=longest)

    def judging(self) -> data.Judging:
        """How a verifier is asked."""
        task = self.keys.task
        opening = None if task.opening is None else json.loads(task.opening)
        return data.Judging(
            good=task.label_good, bad=task.label_bad, delimiter=task.delimiter, opening=opening
        )

    def _trainer(self, rows: Dataset, test: Dataset | None) -> Any:
        keys, args = self.keys, self.args
        if self.method.columns in ("demonstrations", "steps"):
            args.assistant_only_loss = False  # done: rows have labels
            args.completion_only_loss = None
        model = self._model()
        more: dict[str, Any] = {}
        if self.method.name == "grpo":
            rollouts = self._rollouts = Rollouts(
                self.engine, self.tokenizer, args, keys.task.grader, keys.task.reward
            )
            more = {"rollout_func": rollouts, "reward_funcs": rollouts.rewards}
        if self.method.name == "distill":
            more = {"teacher_model": args.teacher_model_name_or_path}
        if keys.task.resume_adapter is None:
            more["peft_config"] = peft_methods.configured(keys, scored=self.method.scored)
        trainer = _ours(self._kind)(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=test,
            processing_class=self.tokenizer,
            callbacks=[Log(self.out / "log.jsonl"), self._shown],
            **more,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.ours = keys.task
        return trainer

    def _model(self) -> Any:
        from peft import PeftModel
        from trl.trainer.utils import get_quantization_config

        keys, args = self.keys, self.args
        said = dict(args.model_init_kwargs or {})
        args.model_init_kwargs = None
        said.setdefault("dtype", keys.model.dtype or "float32")
        said |= {"attn_implementation": keys.model.attn_implementation}
        said |= {"quantization_config": get_quantization_config(keys.model)}
        model = self._base(**{key: value for key, value in said.items() if value is not None})
        if keys.task.resume_adapter is not None:
            return PeftModel.from_pretrained(model, keys.task.resume_adapter, is_trainable=True)
        return model

    def _base(self, **said: Any) -> Any:
        model = self.keys.model
        said |= {"trust_remote_code": self.args.trust_remote_code}
        if model.model_revision is not None:
            said["revision"] = model.model_revision
        if self.method.scored:
            said["num_labels"] = 1
        kind = AutoModelForSequenceClassification if self.method.scored else AutoModelForCausalLM
        return kind.from_pretrained(model.model_name_or_path, **said)

    @property
    def quantised(self) -> str | None:
        """What the base is quantised to while it is trained on."""
        model = self.keys.model
        if model.load_in_4bit:
            return model.bnb_4bit_quant_type
        return "int8" if model.load_in_8bit else None

    def _apart(self, trainer: Any) -> bool:
        """Whether the base is not in one piece, or not as it is served."""
        split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        return split or self.quantised is not None

    def _whole(self, trainer: Any) -> Any:
        """The trained model on the CPU in float32, over the base that is served."""
        from peft import PeftModel

        if not self._apart(trainer):
            return trainer.model.float().cpu().eval()
        base = self._base(dtype="float32")
        return PeftModel.from_pretrained(base, str(self.out / "trained")).eval()

    def _initial(self, trainer: Any) -> Path | None:
        """The adapter as it begins, where the base was changed for it."""
        start = self.keys.task.init_lora_weights
        if start not in ("pissa", "olora"):
            return None
        if self._apart(trainer):
            raise SystemExit(
                f"{self.prog}: 'init_lora_weights: {start}' changes the base, which has to be "
                "in one piece and not quantised for that"
            )
        folder, model = self.out / "initial", trainer.model
        if self.first and not folder.exists():
            config = model.peft_config["default"]
            before, config.init_lora_weights = config.init_lora_weights, True
            model.save_pretrained(str(folder))
            config.init_lora_weights = before
        return folder

    def _publish(
        self,
        model: Any,
        spent: dict[str, float],
        report: data.Report,
        initial: Path | None,
        drifted: dict[str, float],
    ) -> Path | None:
        keys = self.keys
        folder = Path(keys.task.publish_to or self.out / "adapter")
        if self.tokenizer.chat_template != self.template:
            raise SystemExit(
                f"{self.prog}: the trainer changed the chat template; nothing is published"
            )
        with publishing(folder) as draft:
            saved = peft_methods.save(model, draft, initial=initial, rank=keys.task.convert_rank)
            if not saved.servable or self.method.scored:
                self.console.print(
                    f"[yellow]{self.method.name} with {keys.task.peft_method}: trained and saved, "
                    "but no server can swap it in: vLLM's generation serves LoRA only.[/]"
                )
                return folder
            found = checks.check(
                model=model,
                tokenizer=self.tokenizer,
                engine=self.engine,
                folder=draft,
                saved=saved,
                task=keys.task,
                console=self.console,
                seed=self.args.seed,
            )
            manifest = Manifest(
                kind="verifier" if self.method.name == "verifier" else "policy",
                base=Base.of(Path(keys.model.model_name_or_path), self.tokenizer),
                judging=self.judging().manifest() if self.method.name == "verifier" else None,
                recipe={
                    "method": self.method.name,
                    "base_quantization": self.quantised,
                    **keys.said,
                },
                data=_digests(keys.task),
                compute=spent,
                evaluation=found | drifted,
            )
            checks.card(draft, manifest, report)
            manifest.write(draft)
        self.console.print(f"[green]published[/] {folder}")
        return folder


def _digests(task: Any) -> dict[str, str]:
    """SHA-256 of the files that were learned from."""
    names = [task.dataset_name, task.replay_name]
    if task.datasets is not None:
        names += [part["path"] for part in json.loads(task.datasets)]
    return {
        Path(name).name: sha256(Path(name).read_bytes()).hexdigest()
        for name in names
        if name is not None and Path(name).is_file()
    }


def _tokens_seen(trainer: Any, report: data.Report) -> int:
    """Of all processes, by the trainer's log; where it counts none, by the rows' mean."""
    state, args = trainer.state, trainer.args
    counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
    if counted:
        return int(counted[-1])
    rows = state.global_step * args.train_batch_size * args.gradient_accumulation_steps
    return round(rows * args.world_size * sum(report.tokens) / len(report.tokens))


def _ours(kind: type) -> type:
    """A trainer with what Mull adds: its optimizers, and the divergence from the base."""

    class Ours(kind):
        ours: Any = None

        def create_optimizer(self, model: Any = None) -> Any:
            task, args = self.ours, self.args
            if self.optimizer is None and task is not None:
                on = self.model if model is None else model
                if task.muon:
                    weights = [weight for weight in on.parameters() if weight.requires_grad]
                    self.optimizer = Muon(
                        weights,
                        lr=args.learning_rate,
                        weight_decay=args.weight_decay,
                        rank=args.process_index,
                        ranks=args.world_size,
                    )
                elif task.loraplus_lr_ratio is not None:
                    from peft.optimizers import create_loraplus_optimizer

                    self.optimizer = create_loraplus_optimizer(
                        on,
                        torch.optim.AdamW,
                        lr=args.learning_rate,
                        loraplus_lr_ratio=task.loraplus_lr_ratio,
                        weight_decay=args.weight_decay,
                    )
            return super().create_optimizer(model)

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            task = self.ours
            if task is None or not task.kl_to_base or not model.training:
                return super().compute_loss(model, inputs, *more, **named)
            told = super().compute_loss(model, inputs, *more, **named)
            extra = task.kl_to_base * _divergence(self.accelerator.unwrap_model(model), inputs)
            if named.get("num_items_in_batch") is not None:
                # Such a loss is summed over the batches of a step, and this is a mean of one.
                extra = extra / self.current_gradient_accumulation_steps
            return (told[0] + extra, *told[1:]) if isinstance(told, tuple) else told + extra

    Ours.__name__ = kind.__name__
    return Ours


def _divergence(model: Any, inputs: Any) -> torch.Tensor:
    """Nats per token of KL(base || adapter), on the tokens that the loss is on."""
    labels = inputs["labels"][:, 1:]
    told = labels.ne(data.IGNORED)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    with torch.no_grad(), model.disable_adapter():
        base = model(**given).logits[:, :-1][told].log_softmax(-1)
    adapted = model(**given).logits[:, :-1][told].log_softmax(-1)
    return (base.exp() * (base - adapted)).sum(-1).mean()
