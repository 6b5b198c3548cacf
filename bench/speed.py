"""How many tokens a second the engine makes with 1, 16 and 128 sequences at once.

With `--adapter`, the base model and a LoRA adapter take turns on one server. JSON: by model,
`tokens_per_second` maps the number of sequences to the median over `--repeats` rounds, and `rounds`
to all of them; `ratio` is the adapter's speed over the base model's, median of the rounds.
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

Rounds = dict[int, list[float]]
"""By number of sequences, the tokens a second of each round."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--adapter", metavar="PATH", help="measure this LoRA, too")


def run(options: argparse.Namespace) -> None:
    models, flags = [options.model], list[str]()
    if options.adapter:
        if options.url:
            raise SystemExit("--adapter starts a server with it; leave out --url")
        models.append("adapter")
        flags = ["--enable-lora", "--lora-modules", f"adapter={options.adapter}"]
    with server(options.url, options.path, flags) as base:
        rounds = asyncio.run(_measure(base, models, options))
    medians = {
        model: {count: median(speeds) for count, speeds in of.items()}
        for model, of in rounds.items()
    }
    ratio = _ratio(*rounds.values()) if options.adapter else None
    table = Table(title=f"Median tokens a second of {options.repeats} rounds")
    table.add_column("model")
    for count in SEQUENCES:
        table.add_column(f"{count} sequences", justify="right")
    for model, speeds in medians.items():
        table.add_row(model, *(f"{speed:,.0f}" for speed in speeds.values()))
    if ratio is not None:
        table.add_row("adapter / base", *(f"{one:.2f}" for one in ratio.values()))
    Console().print(table)
    if options.json:
        report = {"tokens_per_second": medians, "rounds": rounds, "ratio": ratio}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _ratio(base: Rounds, adapter: Rounds) -> dict[int, float]:
    """Of one round to the other of the same turn."""
    return {
        count: median([one / other for one, other in zip(adapter[count], base[count], strict=True)])
        for count in base
    }


async def _measure(base: str, models: list[str], options: argparse.Namespace) -> dict[str, Rounds]:
    prompt = exam(options.seed, 1)[0].prompt
    rounds: dict[str, Rounds] = {model: {count: [] for count in SEQUENCES} for model in models}
    turns = [(model, count) for count in SEQUENCES for model in models]
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:
        with bar() as progress:
            task = progress.add_task("rounds", total=(options.repeats + 1) * len(turns))
            for repeat in range(options.repeats + 1):  # the first warms up
                for model, count in turns:
                    began = time.monotonic()
                    reply = await client.post(
                        "/v1/completions",
                        json={
                            "model": model,
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
                        rounds[model][count].append(count * TOKENS / seconds)
                    progress.advance(task)
    return rounds
