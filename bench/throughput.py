"""Throughput: problems per second and accuracy at 1, 8 and 32 clients, early stops on.

Against bare vLLM's n=8 and n=16 with a vote in the client, on the same server, problems and seeds;
the order of the arms rotates between repetitions, after one uncounted sample of every problem. JSON
keys: `problems_per_family`, `seed`, `repeats`, and `rows`, a list of {family, arm, clients,
problems_per_second, ratio, accuracy, change, change_half_width, tokens}; problems per second is the
median over repetitions, `ratio` is over bare n=8 at as many clients within the same repetition
(median), `change` is of accuracy against it, in points, paired by problem: its repetitions are
averaged first, since they are not independent; `tokens` are generated per problem.
"""

import argparse
import asyncio
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.bare import Answered, search, vote
from bench.plot import panels
from bench.serving import ask_all, bar, server
from bench.stats import half_width, mean, median
from finetune.tiny.problems import FAMILIES, exam
from finetune.tiny.solution import Item
from strategies.core.answers import Answers
from strategies.core.sandbox import Sandbox

CLIENTS = [1, 8, 32]
BASE = "bare n=8"
VOTE: dict[str, Any] = {"kind": "self_consistency", "n": 8}
ARMS: dict[str, int | dict[str, Any]] = {
    BASE: 8,
    "bare n=16": 16,
    "mull n=8": VOTE,
    "mull n=8, all at once": VOTE | {"start": "all"},
    "mull n=8, confidence 0.95": VOTE | {"early_stop": "confidence"},
    "mull n=8, confidence 0.9": VOTE | {"early_stop": "confidence", "confidence": 0.9},
    "mull n=16, confidence 0.95": VOTE | {"n": 16, "early_stop": "confidence"},
}
"""By name: bare vLLM's n, or Mull's strategy."""

Seen = dict[str, list[tuple[float, list[Answered]]]]
"""By arm, one per repetition: problems per second, and what came back in the order asked."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(problems=96)
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of every arm")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--plot", metavar="PNG", help="draw problems per second there")


def run(options: argparse.Namespace) -> None:
    items = exam(options.seed, options.problems)
    with server(options.url, options.path) as base:
        rows = asyncio.run(_measure(base, items, options))
    _show(rows, options)
    if options.json:
        figures = {
            "problems_per_family": options.problems,
            "seed": options.seed,
            "repeats": options.repeats,
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(rows, options.plot)


async def _measure(base: str, items: list[Item], options: argparse.Namespace) -> list[Any]:
    sandbox = Sandbox()
    answers, rows = Answers(sandbox), []
    try:
        async with httpx.AsyncClient(base_url=base, timeout=600) as client:
            with bar() as progress:

                async def all_by(
                    label: str, arm: int | dict[str, Any], seed: int
                ) -> list[Answered]:
                    return await ask_all(
                        mine,
                        partial(_one, client, answers, options.model, arm, seed),
                        clients=clients,
                        progress=progress,
                        label=f"{family}, {clients} clients: {label}",
                    )

                for family in options.families:
                    mine = list(enumerate(item for item in items if item.family == family))
                    for clients in options.clients:
                        await all_by("warm-up", 1, options.seed)
                        seen: Seen = {arm: [] for arm in ARMS}
                        for repeat in range(options.repeats):
                            names = list(ARMS)
                            turn = repeat % len(names)
                            for name in names[turn:] + names[:turn]:
                                began = time.monotonic()
                                answered = await all_by(
                                    name, ARMS[name], options.seed + 1_000_000 * repeat
                                )
                                took = time.monotonic() - began
                                seen[name].append((len(mine) / took, answered))
                        rows += [_row(family, clients, name, seen) for name in ARMS]
    finally:
        await sandbox.close()
    return rows


async def _one(
    client: httpx.AsyncClient,
    answers: Answers,
    model: str,
    arm: int | dict[str, Any],
    seed: int,
    asked: tuple[int, Item],
) -> Answered:
    number, item = asked
    seed += 1000 * number
    if isinstance(arm, int):
        return await vote(client, model, item, answers, seed=seed, n=arm)
    return await search(client, model, item, seed=seed, strategy=arm)


def _row(family: str, clients: int, name: str, seen: Seen) -> dict[str, Any]:
    speeds = [speed for speed, _ in seen[name]]
    right, base = _right(seen[name]), _right(seen[BASE])
    paired = [100 * (ours - theirs) for ours, theirs in zip(right, base, strict=True)]
    ratios = [ours / theirs for ours, (theirs, _) in zip(speeds, seen[BASE], strict=True)]
    return {
        "family": family,
        "arm": name,
        "clients": clients,
        "problems_per_second": median(speeds),
        "ratio": median(ratios),
        "accuracy": mean(right),
        "change": mean(paired),
        "change_half_width": half_width(paired),
        "tokens": mean([float(one.tokens) for _, answered in seen[name] for one in answered]),
    }


def _right(repetitions: list[tuple[float, list[Answered]]]) -> list[float]:
    """Per problem, how many of its repetitions were right."""
    runs = zip(*(answered for _, answered in repetitions), strict=True)
    return [mean([float(one.right) for one in answers]) for answers in runs]


def _show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.problems} held-out problems per family, median of {options.repeats}"
    )
    for heading in (
        "family", "clients", "arm", "problems/s", "ratio", "accuracy", "change, points", "tokens",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("family", "arm") else "right")
    for row in rows:
        table.add_row(
            row["family"],
            str(row["clients"]),
            row["arm"],
            f"{row['problems_per_second']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['accuracy']:.3f}",
            f"{row['change']:+.1f} ± {row['change_half_width']:.1f}",
            f"{row['tokens']:.0f}",
        )
    Console(width=130).print(table)


def _plot(rows: list[dict[str, Any]], path: str) -> None:
    families = list(dict.fromkeys(row["family"] for row in rows))
    several = sorted({row["clients"] for row in rows})
    with panels(path, 1, len(families), (11, 4.2)) as axes:
        for axis, family in zip(axes[0], families, strict=True):
            for name in ARMS:
                mine = [row for row in rows if (row["family"], row["arm"]) == (family, name)]
                style = "--" if name.startswith("bare") else "-"
                speeds = [row["problems_per_second"] for row in mine]
                axis.plot([row["clients"] for row in mine], speeds, style, marker="o", label=name)
            axis.set(title=family, xlabel="clients", ylabel="problems per second", xscale="log")
            axis.set_xticks(several, [str(clients) for clients in several])
        axes[0][0].legend(fontsize=8)
