"""The keys of a training: flat, with trl's names, from a YAML file and the command line.

A key that is unknown, or that would have no effect, is refused by name. Names that LLaMA-Factory
and axolotl use for the same thing are understood.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import yaml

ALIASES = {
    "adapter_name_or_path": "resume_adapter",
    "base_model": "model_name_or_path",
    "cutoff_len": "max_length",
    "dataset": "dataset_name",
    "evaluation_strategy": "eval_strategy",
    "learning_rate_scheduler": "lr_scheduler_type",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "pref_beta": "beta",
    "sample_packing": "packing",
    "sequence_len": "max_length",
    "val_set_size": "test_split_size",
    "val_size": "test_split_size",
    "warmup_ratio": "warmup_steps",
}
"""What others call a key, and what trl calls it."""

_ALIASES_WITH_A_MEANING: dict[tuple[str, str], dict[str, Any]] = {
    ("adapter", "lora"): {"peft_method": "lora"},
    ("adapter", "qlora"): {"peft_method": "lora", "load_in_4bit": True},
    ("finetuning_type", "lora"): {"peft_method": "lora"},
    ("lora_target_linear", "true"): {"lora_target_modules": "all-linear"},
    ("lora_target_modules", "all"): {"lora_target_modules": "all-linear"},
}
"""Keys of others whose value says more than theirs."""

_REFUSED = {
    "chat_template_path": "the model's own chat template is used, as it will be served",
    "dataset_config": "a file, or a name on the hub, says which data",
    "dataset_kwargs": "rows are tokenised here, and each is accounted for",
    "dataset_streaming": "data are read whole, because each row is accounted for",
    "dataset_test_split": "use 'test_split_size'",
    "dataset_text_field": "the column is called 'text'",
    "do_eval": "use 'eval_strategy'",
    "do_predict": "there is nothing to predict",
    "do_train": "that is what this does",
    "env": "set variables where the command is run",
    "eos_token": "the model's own is used, as it will be served",
    "fp16": "adapters are trained in float32 or bfloat16",
    "hub_token": "log in with `hf auth login`, so that no secret is in a file of keys",
    "ignore_bias_buffers": "models that need it are not supported",
    "lora_modules_to_save": "vLLM serves no adapter with whole modules in it",
    "lora_target_parameters": "vLLM serves no adapter of bare parameters",
    "lora_task_type": "it follows from the method",
    "pad_token": "the model's own is used",
    "push_to_hub": "adapters are published as folders; upload one with `hf upload`",
    "streaming": "data are read whole, because each row is accounted for",
    "sync_ref_model": "with an adapter, the reference is the model without it",
    "template": "the model's own chat template is used, as it will be served",
    "use_peft": "an adapter is what is trained; use 'peft_method'",
    "use_vllm": "trl's own copy of vLLM is not used: grpo rolls out through ours by itself",
}
"""Keys of trl and others that would do nothing or harm here, and why."""

_OF_METHODS = {
    "assistant_only_loss": "sft",
    "delimiter": "verifier",
    "kl_to_base": "sft",
    "label_bad": "verifier",
    "label_good": "verifier",
    "opening": "verifier",
    "packing": "sft",
    "reward": "grpo",
}
"""Keys that other methods would read and not obey."""

_IGNORED = {
    "cache_implementation",
    "chat_template_kwargs",
    "generation_kwargs",
    "transformers_continuous_batching_config",
    "truncation_mode",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
}
"""Keys of trl's own generation and tokenising, which are done otherwise here."""

_FIXED = {
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "lora_r",
    "lora_target_modules",
    "peft_method",
    "use_dora",
    "use_rslora",
}
"""Keys of an adapter that exists already."""

Peft = Literal["lora", "ia3", "prefix"]
Start = Literal["default", "gaussian", "orthogonal", "olora", "pissa"]


@dataclass(kw_only=True)
class Task:
    """What Mull adds to trl's keys."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A file of rows (json, jsonl, csv, parquet), or a hub name."},
    )
    datasets: str | None = field(
        default=None,
        metadata={
            "help": "Several: a list of {path, fraction, split}; the fraction of each's rows is "
            "drawn once, by the seed."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Of a hub name."})
    test_split_size: float = field(
        default=0.0, metadata={"help": "The share of rows kept for evaluation."}
    )
    replay_name: str | None = field(
        default=None,
        metadata={"help": "Rows of what the model knows already, mixed in against forgetting."},
    )
    replay_fraction: float = field(
        default=0.3, metadata={"help": "The share of rows that are replay, where there is some."}
    )
    test_name: str | None = field(
        default=None,
        metadata={"help": "A test set whose prompts must not be among the rows; overlap is told."},
    )
    peft_method: Peft = field(
        default="lora", metadata={"help": "Only lora can be served and swapped."}
    )
    init_lora_weights: Start = field(
        default="default", metadata={"help": "pissa and olora are converted after training."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the rate of B over that of A."}
    )
    muon: bool = field(
        default=False,
        metadata={"help": "Muon in place of 'optim', for bases that Muon made."},
    )
    kl_to_base: float = field(
        default=0.0,
        metadata={"help": "sft: the weight of the divergence from the base, against forgetting."},
    )
    convert_rank: int = field(
        default=32, metadata={"help": "The rank that DoRA is approximated with, for serving."}
    )
    resume_adapter: str | None = field(
        default=None, metadata={"help": "Go on with this adapter instead of a new one."}
    )
    grader: str = field(
        default="answer",
        metadata={
            "help": "Whether an answer is right: 'answer' (equal to the column 'answer'), or "
            "module:function of your own, from a row and a text to [0, 1]."
        },
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "grpo: what is reinforced, if not the grader: module:function; the grader is "
            "logged beside it."
        },
    )
    label_good: str = field(default="+", metadata={"help": "verifier: the token that says good."})
    label_bad: str = field(default="-", metadata={"help": "verifier: the token that says bad."})
    delimiter: str = field(default="\n", metadata={"help": "verifier: what ends a step."})
    opening: str | None = field(
        default=None,
        metadata={
            "help": "verifier: {answers, verdicts}: what opens an answer's turn, and what stands "
            "there when it is judged."
        },
    )
    check_problems: str | None = field(
        default=None,
        metadata={"help": "A file of {prompt, answer}: accuracy before and after."},
    )
    check_general: str | None = field(
        default=None,
        metadata={"help": "The same of what must not be forgotten."},
    )
    check_samples: int = field(default=4, metadata={"help": "Answers per problem when checking."})
    check_temperature: float = field(default=1.0, metadata={"help": "At which those are sampled."})
    data_tokens: int = field(
        default=0,
        metadata={
            "help": "Tokens that were generated to make the rows; counted in what it all took."
        },
    )
    publish_to: str | None = field(
        default=None, metadata={"help": "The adapter's folder (default: output_dir/adapter)."}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What was asked for."""

    training: Any
    """Of the method: a subclass of `transformers.TrainingArguments`."""
    model: Any
    """`trl.ModelConfig`."""
    task: Task
    said: dict[str, Any]
    """The keys that were given, by trl's names, for the manifest."""


def parse(
    config: type, arguments: Sequence[str], *, method: str, fixed: Mapping[str, Any], prog: str
) -> Keys:
    """The keys of a method whose training arguments are `config`; `fixed` ones nobody else sets.

    Raises:
        SystemExit: A key is unknown or refused, or a value is none.
    """
    from trl.trainer.model_config import ModelConfig

    given = dict(_given(list(arguments), prog))
    parser = _parser((Task, config, ModelConfig), prog)
    known = {action.dest for action in parser._actions} - {"help"}
    for key in given:
        if key in fixed:
            raise SystemExit(f"{prog}: '{key}' is what makes it {method}: {fixed[key]}")
        if key in _REFUSED:
            raise SystemExit(f"{prog}: '{key}' is not used: {_REFUSED[key]}")
        if key.startswith("vllm_") or (key in _IGNORED and method != "distill"):
            raise SystemExit(f"{prog}: '{key}' is not used: it is of a part of trl that is not")
        if (owner := _OF_METHODS.get(key, method)) != method:
            raise SystemExit(f"{prog}: '{key}' is a key of {owner}, not of {method}")
        if key not in known:
            near = get_close_matches(key, known - set(_REFUSED), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise SystemExit(f"{prog}: there is no key '{key}'{hint}")
    if "resume_adapter" in given and (told := given.keys() & _FIXED):
        raise SystemExit(f"{prog}: the adapter to go on with decides {', '.join(sorted(told))}")
    on_cpu = not _has_gpu()
    defaults = {"use_cpu": on_cpu, "gradient_checkpointing": not on_cpu, "report_to": "none"}
    defaults |= {"bf16": not on_cpu, "logging_steps": 1, "disable_tqdm": False}
    defaults |= {"ddp_find_unused_parameters": False}  # an adapter's are all used
    defaults = {key: value for key, value in defaults.items() if key in known}
    bare = {action.dest for action in parser._actions if action.nargs == "?"}
    flags = _flags(defaults | dict(fixed) | given, bare)
    try:
        task, training, model = parser.parse_args_into_dataclasses(
            list(flags), look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise SystemExit(f"{prog}: {error}") from error
    return Keys(training=training, model=model, task=_sensible(task, prog), said=given)


def _given(arguments: list[str], prog: str) -> Iterator[tuple[str, Any]]:
    """Keys and values as given, renamed; the command line comes after the file."""
    flags: list[tuple[str, Any]] = []
    configs: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        if not word.startswith("--"):
            raise SystemExit(f"{prog}: '{word}' belongs to no key: keys begin with --")
        key, is_set, value = word[2:].partition("=")
        values = [value] if is_set else []
        at += 1
        while not is_set and at < len(arguments) and not arguments[at].startswith("--"):
            values.append(arguments[at])
            at += 1
        if key == "config":
            configs += values
        else:
            flags.append((key, values[0] if len(values) == 1 else values or True))
    for path in configs:
        yield from _renamed(_read(path, prog).items())
    yield from _renamed(flags)


def _read(path: str, prog: str) -> Mapping[str, Any]:
    try:
        read = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"{prog}: cannot read {path}: {error}") from error
    if not isinstance(read, dict):
        raise SystemExit(f"{prog}: {path} is not a mapping of keys to values")
    return {str(key): value for key, value in read.items()}


def _renamed(pairs: Any) -> Iterator[tuple[str, Any]]:
    for said, value in pairs:
        key: str = ALIASES.get(name := str(said).replace("-", "_"), name)
        if key.startswith("no_"):
            key, value = key.removeprefix("no_"), False
        if value is None:  # as if it were not there
            continue
        meaning = _ALIASES_WITH_A_MEANING.get((key, str(value).lower()))
        yield from ({key: value} if meaning is None else meaning).items()


def _flags(given: Mapping[str, Any], bare: Container[str]) -> Iterator[str]:
    """As the command line of trl's parser, whose types then hold; a `bare` key alone is true."""
    for key, value in given.items():
        yield f"--{key}"
        if value is True and key in bare:
            continue
        if isinstance(value, list) and not any(isinstance(each, dict) for each in value):
            yield from map(str, value)
        elif isinstance(value, list | dict):
            yield json.dumps(value)
        else:
            yield str(value)


def _parser(kinds: Sequence[type], prog: str) -> Any:
    """One flag for each field; of two with one name, the first."""
    from trl.scripts.utils import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise SystemExit(f"{prog}: {message}")

    assert all(map(is_dataclass, kinds))
    return Parser(cast(Any, kinds), prog=prog, allow_abbrev=False, conflict_handler="resolve")


def _sensible(task: Task, prog: str) -> Task:
    if (task.dataset_name is None) == (task.datasets is None):
        raise SystemExit(f"{prog}: say 'dataset_name', or 'datasets' for several")
    for share in ("test_split_size", "replay_fraction"):
        if not 0 <= getattr(task, share) < 1:
            raise SystemExit(f"{prog}: '{share}' is a share: from 0 up to 1")
    return task


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
