"""How many tokens a second the engine makes with 1, 16 and 128 sequences at once.

JSON: `tokens_per_second` maps the number of sequences to the median over `--repeats` rounds, and
`rounds` to all of them.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.serving import bar, server
from bench.stats import median
from finetune.tiny.problems import exam

SEQUENCES = (1, 16, 128)
TOKENS = 64


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default %(default)s)")


def run(options: argparse.Namespace) -> None:
    with server(options.url, options.path) as base:
        rounds = asyncio.run(_measure(base, options))
    figures = {count: median(speeds) for count, speeds in rounds.items()}
    table = Table(title=f"Median tokens a second of {options.repeats} rounds")
    for count in figures:
        table.add_column(f"{count} sequences", justify="right")
    table.add_row(*(f"{speed:,.0f}" for speed in figures.values()))
    Console().print(table)
    if options.json:
        report = {"tokens_per_second": figures, "rounds": rounds}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


async def _measure(base: str, options: argparse.Namespace) -> dict[int, list[float]]:
    prompt = exam(options.seed, 1)[0].prompt
    rounds: dict[int, list[float]] = {count: [] for count in SEQUENCES}
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:
        with bar() as progress:
            task = progress.add_task("rounds", total=(options.repeats + 1) * len(SEQUENCES))
            for repeat in range(options.repeats + 1):  # the first warms up
                for count in SEQUENCES:
                    began = time.monotonic()
                    reply = await client.post(
                        "/v1/completions",
                        json={
                            "model": options.model,
                            "prompt": prompt,
                            "n": count,
                            "max_tokens": TOKENS,
                            "ignore_eos": True,
                            "temperature": 1.0,
                        },
                    )
                    reply.raise_for_status()
                    seconds = time.monotonic() - began
                    if repeat:
                        rounds[count].append(count * TOKENS / seconds)
                    progress.advance(task)
    return rounds
