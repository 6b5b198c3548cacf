"""Accuracy against compute: every strategy and n on the same held-out problems, each family apart.

JSON keys: `rows`, a list of {family, method, n, problems, accuracy, accuracy_half_width, tokens,
tokens_half_width, seconds_median, wall_seconds}; tokens are generated tokens per problem by the
server's own usage; half widths are of 95 % intervals. `early_stop`, a list of {family, rule,
tokens_saved, accuracy_change, accuracy_change_half_width} against the full vote on 16, paired by
problem. `gains`, against one sample, paired.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench import bare
from bench.plot import panels
from bench.serving import ask_all, bar, server
from bench.stats import half_width, mean, median
from finetune.tiny.problems import FAMILIES, exam, grade
from finetune.tiny.solution import Item

NS = (1, 4, 16, 32)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy against tokens there")


def run(options: argparse.Namespace) -> None:
    items = exam(options.seed, options.problems)
    with server(options.url, options.path) as base:
        measured = asyncio.run(_measure(base, items, options))
    figures = {
        "problems_per_family": options.problems,
        "seed": options.seed,
        "clients": options.clients,
        "rows": [_row(one) for one in measured],
        "early_stop": _early_stops(measured),
        "gains": _gains(measured),
    }
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures["rows"], options.plot)


def _methods(family: str) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, n, the fields that the request adds)."""
    methods: list[tuple[str, int, dict[str, Any]]] = [
        ("greedy", 1, {"temperature": 0}),
        ("one sample", 1, {}),
    ]
    for n in NS[1:]:
        fixed = {"kind": "self_consistency", "n": n, "early_stop": "never"}
        methods.append(("self-consistency", n, {"strategy": fixed}))
    for rule in ("unassailable", "confidence", "window"):
        early = {"kind": "self_consistency", "n": 16, "early_stop": rule}
        methods.append((f"self-consistency, {rule} stop", 16, {"strategy": early}))
    for eta in (0.9, 0.5):
        sure = {"kind": "deep_confidence", "n": 16, "eta": eta}
        methods.append((f"deep confidence, eta {eta}", 16, {"strategy": sure}))
    for parallel in (1, 4):
        refine = {"kind": "self_refine", "n": 16, "parallel": parallel}
        methods.append((f"self-refine in {parallel}, vote", 16, {"strategy": refine}))
        if family == "countdown":
            judged = {"strategy": refine | {"verifier": "countdown"}}
            methods.append((f"self-refine in {parallel} by countdown", 16, judged))
    # The embedded model has no tags: what it writes before its answer is its thinking.
    forcing = {"kind": "budget_forcing", "end": "Answer"}
    for title, fields in {
        "extended once": {"wait": "\n"},
        "24 tokens at most": {"extend": 0, "max_thinking_tokens": 24, "cue": ": \\boxed{"},
    }.items():
        methods.append((f"budget forcing, {title}", 1, {"strategy": forcing | fields}))
    verifiers = ["likelihood"] + (["countdown"] if family == "countdown" else [])
    for verifier in verifiers:
        for n in NS[1:]:
            methods.append(
                (
                    f"best-of-n by {verifier}",
                    n,
                    {"strategy": {"kind": "best_of_n", "n": n, "verifier": verifier}},
                )
            )
    return methods


async def _measure(
    base: str, items: list[Item], options: argparse.Namespace
) -> list[dict[str, Any]]:
    measured: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:
        with bar() as progress:
            for family in FAMILIES:
                mine = [item for item in items if item.family == family]
                for name, n, fields in _methods(family):

                    async def ask(
                        item: Item, fields: dict[str, Any] = fields, mine: list[Item] = mine
                    ) -> dict[str, Any]:
                        began = time.monotonic()
                        seed = options.seed + 1000 * mine.index(item)
                        body = await bare.ask(client, options.model, item, seed=seed, **fields)
                        return {
                            "right": grade(item, body["choices"][0]["message"]["content"]),
                            "tokens": body["usage"]["completion_tokens"],
                            "seconds": time.monotonic() - began,
                        }

                    began = time.monotonic()
                    answers = await ask_all(
                        mine,
                        ask,
                        clients=options.clients,
                        progress=progress,
                        label=f"{family}: {name}, n={n}",
                    )
                    measured.append(
                        {
                            "family": family,
                            "method": name,
                            "n": n,
                            "answers": answers,
                            "wall_seconds": time.monotonic() - began,
                        }
                    )
    return measured


def _row(one: dict[str, Any]) -> dict[str, Any]:
    right = [float(answer["right"]) for answer in one["answers"]]
    tokens = [float(answer["tokens"]) for answer in one["answers"]]
    return {
        "family": one["family"],
        "method": one["method"],
        "n": one["n"],
        "problems": len(right),
        "accuracy": mean(right),
        "accuracy_half_width": half_width(right),
        "tokens": mean(tokens),
        "tokens_half_width": half_width(tokens),
        "seconds_median": median([answer["seconds"] for answer in one["answers"]]),
        "wall_seconds": one["wall_seconds"],
    }


def _found(
    measured: list[dict[str, Any]], family: str, method: str, n: int
) -> list[dict[str, Any]]:
    return next(
        one["answers"]
        for one in measured
        if (one["family"], one["method"], one["n"]) == (family, method, n)
    )


def _change(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[float, float]:
    paired = [float(b["right"]) - float(a["right"]) for a, b in zip(before, after, strict=True)]
    return mean(paired), half_width(paired)


def _early_stops(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        full = _found(measured, family, "self-consistency", 16)
        for rule in ("unassailable", "confidence", "window"):
            early = _found(measured, family, f"self-consistency, {rule} stop", 16)
            change, width = _change(full, early)
            saved = 1 - mean([one["tokens"] for one in early]) / mean(
                [one["tokens"] for one in full]
            )
            rows.append(
                {
                    "family": family,
                    "rule": rule,
                    "tokens_saved": saved,
                    "accuracy_change": change,
                    "accuracy_change_half_width": width,
                }
            )
    return rows


def _gains(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for one in measured:
        if one["n"] == 16:
            change, width = _change(
                _found(measured, one["family"], "one sample", 1), one["answers"]
            )
            rows.append(
                {
                    "family": one["family"],
                    "method": one["method"],
                    "n": 16,
                    "gain": change,
                    "gain_half_width": width,
                }
            )
    return rows


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table(
        title=f"{figures['problems_per_family']} held-out problems per family, 95 % intervals"
    )
    for heading in (
        "family",
        "method",
        "n",
        "accuracy",
        "tokens per problem",
        "median seconds",
        "wall seconds",
    ):
        table.add_column(heading, justify="left" if heading in ("family", "method") else "right")
    for row in figures["rows"]:
        table.add_row(
            row["family"],
            row["method"],
            str(row["n"]),
            f"{row['accuracy']:.3f} ± {row['accuracy_half_width']:.3f}",
            f"{row['tokens']:.0f} ± {row['tokens_half_width']:.0f}",
            f"{row['seconds_median']:.2f}",
            f"{row['wall_seconds']:.1f}",
        )
    console.print(table)
    stops = Table(title="early stopping against the full vote on 16, paired")
    for heading in ("family", "rule", "tokens saved", "accuracy change, points"):
        stops.add_column(heading)
    for row in figures["early_stop"]:
        change = (
            f"{100 * row['accuracy_change']:+.1f} ± {100 * row['accuracy_change_half_width']:.1f}"
        )
        stops.add_row(row["family"], row["rule"], f"{100 * row['tokens_saved']:.0f} %", change)
    console.print(stops)
    gains = Table(title="gain over one sample at n = 16, points, paired")
    for heading in ("family", "method", "gain"):
        gains.add_column(heading)
    for row in figures["gains"]:
        gains.add_row(
            row["family"],
            row["method"],
            f"{100 * row['gain']:+.1f} ± {100 * row['gain_half_width']:.1f}",
        )
    console.print(gains)


def _plot(rows: list[dict[str, Any]], path: str) -> None:
    with panels(path, 1, 2, (12, 5)) as axes:
        for axis, family in zip(axes[0], FAMILIES, strict=True):
            mine = [row for row in rows if row["family"] == family]
            for method in dict.fromkeys(row["method"] for row in mine):
                line = [row for row in mine if row["method"] == method]
                axis.errorbar(
                    [row["tokens"] for row in line],
                    [row["accuracy"] for row in line],
                    yerr=[row["accuracy_half_width"] for row in line],
                    marker="o",
                    capsize=3,
                    label=method,
                    linestyle="-" if len(line) > 1 else "none",
                )
            axis.set_xscale("log")
            axis.set_title(f"{family} problems")
            axis.set_xlabel("generated tokens per problem")
            axis.set_ylabel("accuracy")
            axis.set_ylim(0, 1)
            axis.legend(fontsize=7)
