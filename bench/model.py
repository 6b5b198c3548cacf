"""What a model can do by itself: greedy, one sample, pass@k, majority@k, best-of-k by likelihood.

And by a verifier adapter, with `--verifier`. A line's likelihood is its probability; what is
written so far, and so a solution, is worth its worst line. JSON: `rows` has one object per
temperature, family and number of steps, "all" for all of them: `problems`, then each measure as
`[value, standard error over problems]`: `greedy`, `mean`, `pass@k`, `majority@k`, `likelihood@k`,
`verifier@k`, differences of two as `a - b` with paired standard errors, and areas under the curve
within a problem, over the problems that have both kinds: `likelihood auc` and `verifier auc` of
what is written up to right lines against wrong ones, `… auc of slips` the same without the lines
after the first wrong one, `… auc of solutions` of right solutions against wrong ones, and
`position auc`, what a line's place alone tells, as wrong lines come late. `calibration`: by tenth
of the verifier's score, of the lines up to the first wrong one, `[lines, mean score, share right]`;
`calibration_error` is the mean distance of the two, weighted by lines.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import exp
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.plot import panels
from bench.serving import ask_all, bar, server
from bench.stats import (
    auc,
    best_at,
    calibration_error,
    majority_at,
    mean,
    pass_at,
    standard_error,
    tenths,
)
from finetune.tiny.countdown import value_of
from finetune.tiny.problems import FAMILIES, exam, grade
from finetune.tiny.solution import Family, Item, boxed, judged
from models import MULL_TINY

KS = (4, 8, 16, 32)
DIFFERENCES = (
    ("majority@16", "greedy"),
    ("majority@16", "mean"),
    ("likelihood@16", "majority@16"),
    ("verifier@16", "majority@16"),
    ("verifier@16", "likelihood@16"),
)


@dataclass(slots=True, kw_only=True)
class Sample:
    """One solution; each of its lines is judged and scored."""

    text: str
    right: bool
    answer: str | None
    good: list[bool]
    likelihood: list[float]
    verifier: list[float] = field(default_factory=list)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=32, help="per problem and temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 0.8, 1.0])
    parser.add_argument(
        "--families", nargs="+", choices=("word", "countdown", "prices"), default=FAMILIES
    )
    parser.add_argument("--adapter", metavar="PATH", help="measure the model with this LoRA")
    parser.add_argument(
        "--verifier", metavar="PATH", help="score lines with this verifier LoRA, or `base`"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the verifier's calibration there")


def run(options: argparse.Namespace) -> None:
    items = exam(options.seed, options.problems, tuple(options.families))
    started = time.monotonic()
    flags: list[str] = []
    if options.adapter and options.url:
        raise SystemExit("--adapter starts a server with it; a running --url takes its --model")
    if options.adapter:
        options.model = "adapter"
        flags = ["--enable-lora", "--lora-modules", f"adapter={options.adapter}"]
    with server(options.url, options.path, flags) as base:
        greedy, sampled = asyncio.run(_sample(base, items, options))
    if options.verifier:
        _verify(items, sampled, options)
    rows = [
        {"temperature": temperature, "family": family, "steps": steps}
        | _measures([greedy[at] for at in chosen], [samples[at] for at in chosen])
        for temperature, samples in sampled.items()
        for family, steps, chosen in _groups(items)
    ]
    bins = tenths(_said([one for of in sampled.values() for samples in of for one in samples]))
    figures = {
        "calibration": bins,
        "calibration_error": calibration_error(bins),
        "seed": options.seed,
        "samples": options.samples,
        "seconds": time.monotonic() - started,
        "rows": rows,
    }
    _show(rows, options.samples)
    if bins:
        Console().print(f"calibration error of the verifier: {calibration_error(bins):.3f}")
    if options.plot:
        _plot(bins, options.plot)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


async def _sample(
    base: str, items: list[Item], options: argparse.Namespace
) -> tuple[list[list[Sample]], dict[float, list[list[Sample]]]]:
    """Greedy solutions, and `options.samples` at each temperature, for each item."""
    places = {item.identity: at for at, item in enumerate(items)}
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        async def solve(temperature: float, n: int, label: str) -> list[list[Sample]]:
            async def ask(item: Item) -> list[Sample]:
                seed = options.seed + 1000 * places[item.identity]  # no two problems share noise
                body = {
                    "model": options.model,
                    "messages": [{"role": "user", "content": item.prompt}],
                    "temperature": temperature,
                    "n": n,
                    "max_tokens": 400,
                    "seed": seed,
                    "logprobs": True,
                    "top_logprobs": 0,
                }
                reply = await client.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                return [_read(item, choice) for choice in reply.json()["choices"]]

            return await ask_all(
                items, ask, clients=options.clients, progress=progress, label=label
            )

        with bar() as progress:
            greedy = await solve(0, 1, "greedy")
            sampled = {
                temperature: await solve(
                    temperature,
                    options.samples,
                    f"{options.samples} samples at temperature {temperature}",
                )
                for temperature in options.temperatures
            }
    return greedy, sampled


def _read(item: Item, choice: dict[str, Any]) -> Sample:
    text = choice["message"]["content"]
    lines = [0.0]
    for token in choice["logprobs"]["content"]:
        lines[-1] += token["logprob"]
        if token["token"] == "\n":
            lines.append(0.0)
    good = [good for _, good in judged(item, text)]
    return Sample(
        text=text,
        right=grade(item, text),
        answer=_key(item, text),
        good=good,
        likelihood=[exp(line) for line in lines[: len(good)]],
    )


def _key(item: Item, text: str) -> str | None:
    """What a vote counts: the answer, or the value of a countdown expression."""
    answer = boxed(text)
    if answer is None or item.family != "countdown":
        return answer
    value = value_of(answer)
    return answer if value is None else str(value)


def _verify(
    items: list[Item], sampled: dict[float, list[list[Sample]]], options: argparse.Namespace
) -> None:
    from finetune.tiny.verifier import Verifier  # torch and peft, which nothing else here needs

    adapter = None if options.verifier == "base" else Path(options.verifier)
    verifier = Verifier.load(Path(options.path or MULL_TINY), adapter)
    with bar() as progress:
        task = progress.add_task("verifying", total=len(items) * len(sampled))
        for samples in sampled.values():
            for item, of_item in zip(items, samples, strict=True):
                scores = verifier.score([(item.prompt, sample.text) for sample in of_item])
                for sample, lines in zip(of_item, scores, strict=True):
                    sample.verifier = lines
                progress.advance(task)


def _groups(items: list[Item]) -> list[tuple[str, str, list[int]]]:
    """Each family, by steps and as a whole; then everything."""
    families: list[Family] = list(dict.fromkeys(item.family for item in items))
    groups: list[tuple[str, str, list[int]]] = []
    for family in families:
        mine = [at for at, item in enumerate(items) if item.family == family]
        groups.append((family, "all", mine))
        for steps in sorted({items[at].steps for at in mine}):
            groups.append((family, str(steps), [at for at in mine if items[at].steps == steps]))
    return [*groups, ("all", "all", list(range(len(items))))]


def _measures(greedy: list[list[Sample]], sampled: list[list[Sample]]) -> dict[str, Any]:
    right = [[sample.right for sample in samples] for samples in sampled]
    per_problem: dict[str, list[float]] = {
        "greedy": [float(first.right) for (first,) in greedy],
        "mean": [mean(one) for one in right],
    }
    scorers = ["likelihood", *(["verifier"] if sampled[0][0].verifier else [])]
    for k in (k for k in KS if k <= len(right[0])):
        per_problem[f"pass@{k}"] = [pass_at(k, len(one), sum(one)) for one in right]
        per_problem[f"majority@{k}"] = [
            majority_at(k, [sample.answer for sample in samples], one)
            for samples, one in zip(sampled, right, strict=True)
        ]
        for scorer in scorers:
            per_problem[f"{scorer}@{k}"] = [
                best_at(k, [min(getattr(sample, scorer)) for sample in samples], one)
                for samples, one in zip(sampled, right, strict=True)
            ]
    for one, other in DIFFERENCES:
        if one in per_problem and other in per_problem:
            pairs = zip(per_problem[one], per_problem[other], strict=True)
            per_problem[f"{one} - {other}"] = [a - b for a, b in pairs]
    for name, area in [
        ("position auc", _position_area),
        *((f"{scorer} auc", partial(_area, scorer=scorer)) for scorer in scorers),
        *((f"{scorer} auc of slips", partial(_slip_area, scorer=scorer)) for scorer in scorers),
        *(
            (f"{scorer} auc of solutions", partial(_whole_area, scorer=scorer))
            for scorer in scorers
        ),
    ]:
        areas = [area(samples) for samples in sampled]
        per_problem[name] = [one for one in areas if one is not None]
    return {"problems": len(sampled)} | {
        name: [mean(values), standard_error(values)] if len(values) > 1 else None
        for name, values in per_problem.items()
    }


def _said(samples: list[Sample]) -> Iterator[tuple[float, bool]]:
    """The verifier's score of each line up to the first wrong one, and whether it is right."""
    for sample in samples:
        wrong = sample.good.index(False) if False in sample.good else len(sample.good)
        yield from zip(sample.verifier[: wrong + 1], sample.good, strict=False)


def _plot(bins: list[tuple[int, float, float]], path: str) -> None:
    with panels(path, 1, 1, (5, 5)) as axes:
        axis = axes[0][0]
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        axis.plot([said for _, said, _ in bins], [right for *_, right in bins], marker="o")
        for count, said, right in bins:
            axis.annotate(f"{count:,}", (said, right), textcoords="offset points", xytext=(6, -10))
        axis.set_xlabel("what the verifier says")
        axis.set_ylabel("share of lines that are right")
        axis.set_title("Calibration; numbers of lines beside the points")


def _area(samples: list[Sample], scorer: str) -> float | None:
    """How often a line that all is right up to scores above another; None where all are alike."""
    scores = [score for sample in samples for score in accumulate(getattr(sample, scorer), min)]
    return auc(scores, [good for sample in samples for good in sample.good])


def _slip_area(samples: list[Sample], scorer: str) -> float | None:
    """The same of right lines against first wrong ones only."""
    told = [
        (score, good)
        for sample in samples
        for at, (score, good) in enumerate(
            zip(accumulate(getattr(sample, scorer), min), sample.good, strict=True)
        )
        if good or at == sample.good.index(False)
    ]
    return auc([score for score, _ in told], [good for _, good in told])


def _position_area(samples: list[Sample]) -> float | None:
    places = [-float(at) for sample in samples for at in range(len(sample.good))]
    return auc(places, [good for sample in samples for good in sample.good])


def _whole_area(samples: list[Sample], scorer: str) -> float | None:
    """How often a right solution scores above a wrong one; None where all are alike."""
    scores = [min(getattr(sample, scorer)) for sample in samples]
    return auc(scores, [sample.right for sample in samples])


def _show(rows: list[dict[str, Any]], samples: int) -> None:
    names = [name for name in rows[-1] if isinstance(rows[-1][name], list)]
    areas = [name for name in names if " auc" in name]
    differences = [name for name in names if " - " in name]
    accuracies = [name for name in names if name not in areas + differences]
    shown = [name for name in accuracies if not name.endswith(("@4", "@8", "@32"))]
    shown += [f"pass@{k}" for k in KS[-1:] if k <= samples]
    wholes = [row for row in rows if row["steps"] == "all"]
    for title, names, chosen, spec in (
        (f"Accuracy, {samples} samples a problem", shown, rows, ".3f"),
        ("Differences in points, paired by problem", differences, wholes, "+.1f"),
        ("Areas under the curve within a problem", areas, wholes, ".3f"),
    ):
        table = Table(title=f"{title}; ± is one standard error over problems")
        for heading in ("T", "family", "steps", "problems", *names):
            table.add_column(heading, justify="right")
        for row in chosen:
            table.add_row(
                *(str(row[name]) for name in ("temperature", "family", "steps", "problems")),
                *(_with_error(row.get(name), spec) for name in names),
            )
        Console(width=200).print(table)


def _with_error(pair: list[float] | None, spec: str) -> str:
    if pair is None:
        return ""
    value, error = pair if spec == ".3f" else (100 * part for part in pair)
    return f"{value:{spec}} ± {error:{spec.lstrip('+')}}"
