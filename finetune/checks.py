"""What a finished adapter must show before it is published: files, exactness, worth, forgetting.

All by the engine that will serve it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from finetune import data
from finetune.adapter import Manifest
from finetune.engine import Engine
from finetune.graders import Grader, grader
from finetune.peft_methods import Saved

EXACT = 1e-4
"""Nats by which vLLM may differ from peft on a token, in float32."""
_ACTS = 1e-4
"""Nats by which an adapter changes some token at least."""
_CONVERTED = 0.1
"""The largest relative error of an adapter that is served in place of what was trained."""
_CANARIES = 8
_LONGEST = 400
"""Tokens of an answer when checking."""

_TEXTS = (
    "What is 12 + 7? Think step by step. 12 + 7 = 19, so the answer is 19.",
    "Tom has 12 apples. At the park he finds 7. How many apples does he have now?",
    "Use the numbers 3, 8, 5 with + - * / to make 24. Use each number once.",
)


def check(
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    folder: Path,
    saved: Saved,
    task: Any,
    console: Console,
    seed: int,
) -> dict[str, float]:
    """The evaluation of an adapter that passes.

    Raises:
        SystemExit: It does not; the message says where.
    """
    files(folder, saved)
    if saved.error is not None and saved.error > _CONVERTED:
        raise SystemExit(
            f"what vLLM can serve is {saved.error:.1%} of the update off what was trained, "
            f"more than {_CONVERTED:.0%}: raise 'convert_rank'"
        )
    found: dict[str, float] = {} if saved.error is None else {"conversion_error": saved.error}
    grade = grader(task.grader)
    sets = {
        name: data.listed(data.read(path))
        for name, path in (("task", task.check_problems), ("general", task.check_general))
        if path is not None
    }
    tokens = data.Tokens(tokenizer, max_length=None)
    asked = {name: [tokens.asked(row["prompt"]) for row in rows] for name, rows in sets.items()}
    texts = [tokens.ids(text) for text in _TEXTS]
    texts += [ids for prompts in asked.values() for ids in prompts[:_CANARIES]]
    told = _peft_logprobs(model, texts, converted=saved.error is not None, folder=folder)
    lora = engine.load(folder)
    served, plain = engine.logprobs(texts, lora), engine.logprobs(texts, None)
    found["max_logprob_error"] = _farthest(told, served)
    if found["max_logprob_error"] > EXACT:
        raise SystemExit(
            f"vLLM serves it {found['max_logprob_error']:.2g} nats off what was trained "
            f"(at most {EXACT:g} on a token): it is not published"
        )
    if _farthest(plain, served) < _ACTS:
        raise SystemExit("with the adapter the model says exactly what it says without it")
    with Progress(console=console, transient=True) as progress:
        for name, rows in sets.items():
            bar = progress.add_task(f"checking: {name}", total=2)
            worth = _worth(
                engine, lora, tokenizer, rows, asked[name], grade, task, seed, bar, progress
            )
            found |= {f"{name}.{measure}": value for measure, value in worth.items()}
    _show(found, console)
    return found


def files(folder: Path, saved: Saved) -> None:
    """Whether the folder holds a LoRA that a server can take.

    Raises:
        SystemExit: It does not.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    foreign = [key for key in weights if not key.endswith(("lora_A.weight", "lora_B.weight"))]
    if foreign:
        raise SystemExit(f"the adapter has other weights than A and B: {foreign[:3]}")
    if not all(key.startswith("base_model.model.") for key in weights):
        raise SystemExit("the adapter's weights are not named as peft names them")
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise SystemExit("the adapter's weights are not all numbers: train with a lower rate")
    if not any(bool(weight.any()) for key, weight in weights.items() if "lora_B" in key):
        raise SystemExit("the adapter does nothing: all lora_B are zero")
    ranks = {weight.shape[0] for key, weight in weights.items() if "lora_A" in key}
    said = {config["r"], *(config.get("rank_pattern") or {}).values()}
    if not ranks <= said or max(ranks) != saved.rank:
        raise SystemExit(f"the adapter's matrices have ranks {ranks}, and its configuration {said}")


def _peft_logprobs(
    model: Any, texts: Sequence[Sequence[int]], *, converted: bool, folder: Path
) -> list[list[float]]:
    """By the trained model, or, if what is served approximates it, by what is served."""
    if converted:
        from peft import PeftModel

        base = model.unload()
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    found: list[list[float]] = []
    with torch.inference_mode():
        for ids in texts:
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float()
            after = torch.tensor(list(ids[1:]))
            found.append(logits.log_softmax(-1).gather(1, after[:, None])[:, 0].tolist())
    return found


def _farthest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(
        abs(a - b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def _worth(
    engine: Engine,
    lora: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[data.Row],
    asked: Sequence[Sequence[int]],
    grade: Grader,
    task: Any,
    seed: int,
    bar: Any,
    progress: Progress,
) -> dict[str, float]:
    """Accuracy of one sample with the adapter and without, and how far their answers diverge."""
    means: list[list[float]] = []
    divergence = length = 0.0
    for with_ in (None, lora):
        answers = engine.sample(
            asked,
            with_,
            n=task.check_samples,
            temperature=task.check_temperature,
            max_tokens=_LONGEST,
            seed=seed,
            tokenizer=tokenizer,
        )
        means.append(
            [
                fmean(grade(row, answer.text) for answer in of)
                for row, of in zip(rows, answers, strict=True)
            ]
        )
        if with_ is not None:
            divergence, length = _divergence(engine, asked, answers), _mean_length(answers)
        progress.advance(bar)
    before, after = means
    gains = [b - a for a, b in zip(before, after, strict=True)]
    error = {"gain_standard_error": stdev(gains) / len(gains) ** 0.5} if len(gains) > 1 else {}
    return error | {
        "problems": float(len(rows)),
        "accuracy": fmean(after),
        "accuracy_before": fmean(before),
        "gain": fmean(gains),
        "kl_to_base": divergence,
        "answer_tokens": length,
    }


def _divergence(engine: Engine, asked: Any, answers: Any) -> float:
    """Nats per token of KL(adapter || base), estimated on the adapter's own answers."""
    texts = [
        [*ids, *answer.token_ids]
        for ids, of in zip(asked, answers, strict=True)
        for answer in of[:1]
    ]
    sampled = [answer.logprobs for of in answers for answer in of[:1]]
    plain = engine.logprobs(texts, None)
    differences = [
        mine - base
        for own, of_text in zip(sampled, plain, strict=True)
        for mine, base in zip(own, of_text[len(of_text) - len(own) :], strict=True)
    ]
    return fmean(differences)  # an answer has one token at least: its end


def _mean_length(answers: Any) -> float:
    return fmean(len(answer.token_ids) for of in answers for answer in of)


def _show(found: Mapping[str, float], console: Console) -> None:
    table = Table("check", "value", title="what the adapter shows")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def card(folder: Path, manifest: Manifest, report: data.Report) -> None:
    """A README for people; `manifest.json` is for servers."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in manifest.evaluation.items())
    spent = "\n".join(f"| {name} | {value:.4g} |" for name, value in manifest.compute.items())
    recipe = "\n".join(f"{key}: {value}" for key, value in manifest.recipe.items())
    (folder / "README.md").write_text(
        f"# An adapter of {manifest.base.name}\n\n"
        f"A {manifest.kind}, trained with `mull-finetune {manifest.recipe['method']}` on "
        f"{report.kept:,} of {report.rows:,} rows ({report.learned:,} tokens with loss).\n\n"
        f"| check | value |\n|---|---|\n{rows}\n\n| spent | |\n|---|---|\n{spent}\n\n"
        f"```yaml\n{recipe}\n```\n"
    )
