"""What a model can do by itself: greedy, one sample, pass@k, majority@k, by difficulty.

JSON keys: `temperatures` maps each temperature to `{family: {group: {problems, mean,
mean_half_width, "pass@k", "majority@k"}}}`, `greedy` to `{family: {group: {problems, mean,
mean_half_width}}}`; a group is "all" or a number of steps. Half widths are of 95 % intervals.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.serving import ask_all, bar, server
from bench.stats import half_width, majority_at, mean, pass_at
from finetune.tiny.problems import FAMILIES, Item, boxed, grade, test_set, value_of

KS = (1, 4, 16, 32)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=32, help="per problem and temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 0.8, 1.0])


def run(options: argparse.Namespace) -> None:
    items = test_set(options.seed, options.problems)
    with server(options.url, options.path) as base:
        figures = asyncio.run(_measure(base, items, options))
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


async def _measure(base: str, items: list[Item], options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "problems": len(items),
        "samples": options.samples,
        "seed": options.seed,
    }
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        def asking(temperature: float, n: int):
            async def ask(item: Item) -> list[str]:
                body = {
                    "model": options.model,
                    "messages": [{"role": "user", "content": item.prompt}],
                    "temperature": temperature,
                    "n": n,
                    "max_tokens": 400,
                    "seed": options.seed,
                }
                reply = await client.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                return [choice["message"]["content"] for choice in reply.json()["choices"]]

            return ask

        with bar() as progress:
            greedy = await ask_all(
                items, asking(0, 1), clients=options.clients, progress=progress, label="greedy"
            )
            figures["greedy"] = _grouped(items, greedy)
            figures["temperatures"] = {}
            for temperature in options.temperatures:
                texts = await ask_all(
                    items,
                    asking(temperature, options.samples),
                    clients=options.clients,
                    progress=progress,
                    label=f"{options.samples} samples at temperature {temperature}",
                )
                figures["temperatures"][str(temperature)] = _grouped(items, texts)
    return figures


def _grouped(items: list[Item], texts: list[list[str]]) -> dict[str, Any]:
    grouped: dict[str, Any] = {}
    for family in (*FAMILIES, "all"):
        mine = [
            (item, text)
            for item, text in zip(items, texts, strict=True)
            if family in (item.family, "all")
        ]
        depths = sorted({item.steps for item, _ in mine}) if family != "all" else []
        grouped[family] = {"all": _figures(mine)} | {
            str(depth): _figures([(item, text) for item, text in mine if item.steps == depth])
            for depth in depths
        }
    return grouped


def _figures(rows: list[tuple[Item, list[str]]]) -> dict[str, float]:
    right = [[grade(item, text) for text in texts] for item, texts in rows]
    answers = [[_key(item, text) for text in texts] for item, texts in rows]
    shares = [mean(one) for one in right]
    figures: dict[str, float] = {
        "problems": len(rows),
        "mean": mean(shares),
        "mean_half_width": half_width(shares),
    }
    for k in KS:
        if 1 < k <= len(right[0]):
            figures[f"pass@{k}"] = mean([pass_at(k, len(one), sum(one)) for one in right])
            figures[f"majority@{k}"] = mean(
                [majority_at(k, answer, one) for answer, one in zip(answers, right, strict=True)]
            )
    return figures


def _key(item: Item, text: str) -> str | None:
    """What a vote counts: the answer, or the value of a countdown expression."""
    answer = boxed(text)
    if answer is None or item.family == "word":
        return answer
    value = value_of(answer)
    return answer if value is None else str(value)


def _show(figures: dict[str, Any]) -> None:
    table = Table(
        title=f"{figures['problems']} held-out problems, {figures['samples']} samples each"
    )
    for heading in (
        "family",
        "steps",
        "problems",
        "temperature",
        "mean",
        *(f"pass@{k}" for k in KS[1:]),
    ):
        table.add_column(heading, justify="right")
    for k in KS[1:]:
        table.add_column(f"majority@{k}", justify="right")
    for temperature, grouped in (("greedy", figures["greedy"]), *figures["temperatures"].items()):
        for family, groups in grouped.items():
            for depth, row in groups.items():
                table.add_row(
                    family,
                    depth,
                    str(row["problems"]),
                    temperature,
                    f"{row['mean']:.3f} ± {row['mean_half_width']:.3f}",
                    *(
                        f"{row[f'{what}@{k}']:.3f}" if f"{what}@{k}" in row else ""
                        for what in ("pass", "majority")
                        for k in KS[1:]
                    ),
                )
    Console(width=160).print(table)
