"""Reward hacking made visible: proxy score and true accuracy of best-of-n against n (Gao et al.).

For each problem, `--samples` candidates are drawn once and scored by each verifier; n of them are
then chosen from, over all or many random choices. `max` keeps the best score, `weighted` votes by
scores, `soft` draws by exp(score / softness). JSON: `rows` has one object per family, verifier,
selection and n: `kl`, how far the choice lies from the model's own samples in nats (log n -
(n - 1) / n, for `max`), `proxy`, the mean score of the chosen in ranks from 0 to 1 within a
problem, and `accuracy`, each as [value, standard error over problems].
"""

import argparse
import asyncio
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench import bare
from bench.plot import panels
from bench.search import groups, verifiers
from bench.serving import ask_all, bar, server
from bench.stats import mean, standard_error
from finetune.tiny.problems import FAMILIES, exam, grade
from finetune.tiny.solution import Item
from strategies.best_of_n import softened

SOFTNESS = 0.1
DRAWS = 40
"""Random choices of n candidates of a problem."""

Scored = tuple[float, float, bool, str | None]
"""A candidate: the score, its rank within the problem, whether it is right, and its answer."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=64, help="per problem (default %(default)s)")
    parser.add_argument(
        "--verifier", metavar="NAME=PATH", help="a verifier adapter to serve and to judge by"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the curves there")


def run(options: argparse.Namespace) -> None:
    items = exam(options.seed, options.problems)
    adapter = options.verifier.split("=")[0] if options.verifier else None
    flags = ["--enable-lora", "--lora-modules", options.verifier] if options.verifier else []
    with server(options.url, options.path, [] if options.url else flags) as base:
        scored = asyncio.run(_drawn(base, items, verifiers(adapter), options))
    sizes = [2**power for power in range(int(math.log2(options.samples)) + 1)]
    rows = [
        {
            "family": family,
            "verifier": name,
            "select": select,
            "n": n,
            "kl": math.log(n) - 1 + 1 / n,
        }
        | _measured([problems[at] for at in chosen], select, n)
        for name, problems in scored.items()
        for family, chosen in groups(items)
        for select in ("max", "weighted", "soft")
        for n in sizes
    ]
    _show(rows)
    if options.json:
        report = {"seed": options.seed, "samples": options.samples, "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        _plot(rows, options.plot)


async def _drawn(
    base: str, items: list[Item], judges: dict[str, Any], options: argparse.Namespace
) -> dict[str, list[list[Scored]]]:
    """By verifier and problem, the same candidates."""
    places = {item.identity: at for at, item in enumerate(items)}
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        async def ask(item: Item, verifier: Any) -> list[Scored]:
            seed = options.seed + 1000 * places[item.identity]
            body = bare.question(options.model, item, seed=seed)
            body |= {"n": options.samples, "verifier": verifier}
            reply = await client.post("/v1/strategies/best_of_n", json=body)
            reply.raise_for_status()
            found = [one for one in reply.json()["candidates"] if one["score"] is not None]
            order = sorted(found, key=lambda one: one["score"])
            ranks = {one["index"]: at / max(1, len(order) - 1) for at, one in enumerate(order)}
            return [
                (one["score"], ranks[one["index"]], grade(item, one["text"]), one["answer"])
                for one in found
            ]

        with bar() as progress:
            return {
                name: await ask_all(
                    items,
                    lambda item, verifier=verifier: ask(item, verifier),
                    clients=options.clients,
                    progress=progress,
                    label=f"{options.samples} samples by {name}",
                )
                for name, verifier in judges.items()
            }


def _measured(problems: Sequence[Sequence[Scored]], select: str, n: int) -> dict[str, Any]:
    proxies: list[float] = []
    accuracies: list[float] = []
    for at, candidates in enumerate(problems):
        rng = random.Random(f"{at} {n}")
        drawn = [rng.sample(candidates, min(n, len(candidates))) for _ in range(DRAWS)]
        chosen = [_chosen(some, select, rng.randrange(2**32)) for some in drawn]
        proxies.append(mean([one[1] for one in chosen]))
        accuracies.append(mean([float(one[2]) for one in chosen]))
    return {
        "proxy": [mean(proxies), standard_error(proxies)],
        "accuracy": [mean(accuracies), standard_error(accuracies)],
    }


def _chosen(candidates: Sequence[Scored], select: str, seed: int) -> Scored:
    worth = {at: one[0] for at, one in enumerate(candidates)}
    if select == "soft":
        worth = softened(worth, SOFTNESS, seed)
    if select == "weighted":
        votes: dict[str | None, float] = defaultdict(float)
        for score, _, _, answer in candidates:
            votes[answer] += score if answer is not None else 0.0
        worth = {at: votes[one[3]] + 1e-9 * one[0] for at, one in enumerate(candidates)}
    return candidates[max(worth, key=lambda at: worth[at])]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="± is one standard error over problems; proxy is a rank from 0 to 1")
    for heading in ("family", "verifier", "select", "n", "proxy", "accuracy"):
        table.add_column(heading)
    for row in rows:
        proxy, accuracy = ("{:.3f} ± {:.3f}".format(*row[name]) for name in ("proxy", "accuracy"))
        table.add_row(row["family"], row["verifier"], row["select"], str(row["n"]), proxy, accuracy)
    Console(width=120).print(table)


def _plot(rows: list[dict[str, Any]], path: str) -> None:
    judges = list(dict.fromkeys(row["verifier"] for row in rows))
    with panels(path, len(judges), len(FAMILIES), (12, 4 * len(judges))) as axes:
        for line, name in zip(axes, judges, strict=True):
            for axis, family in zip(line, FAMILIES, strict=True):
                mine = [row for row in rows if (row["family"], row["verifier"]) == (family, name)]
                for select in ("max", "weighted", "soft"):
                    curve = [row for row in mine if row["select"] == select]
                    sizes = [row["n"] for row in curve]
                    axis.errorbar(
                        sizes,
                        [row["accuracy"][0] for row in curve],
                        yerr=[row["accuracy"][1] for row in curve],
                        marker="o",
                        capsize=3,
                        label=f"accuracy, {select}",
                    )
                    if select == "max":
                        proxy = [row["proxy"][0] for row in curve]
                        axis.plot(sizes, proxy, color="grey", linestyle="--", label="proxy, max")
                axis.set_xscale("log", base=2)
                axis.set_ylim(0, 1)
                axis.set_title(f"{family} problems, judged by {name}")
                axis.set_xlabel("n")
                axis.legend(fontsize=7)
