"""Overhead: Mull's vote on 16 samples against bare vLLM's n=16 and the vote in the client.

With --gateway: the same vote through a gateway before the server, against the server itself.

Same server, same seeds, alternating pairs; early stop off. JSON keys: `rows`, a list of {clients,
pairs, ratio_median, ratio_low, ratio_high, mull_seconds, bare_seconds, mull_tokens, bare_tokens},
or gateway_ and local_ in place of mull_ and bare_; a ratio is the first one's wall time over the
second one's, one per pair (of requests, or of rounds of concurrent ones), with a 95 % bootstrap
interval of its median.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.bare import Answered, search, vote
from bench.serving import bar, gateway, server
from bench.stats import median
from finetune.tiny.problems import exam
from finetune.tiny.solution import Item
from strategies.core.answers import Answers
from strategies.core.sandbox import Sandbox

Side = Callable[[Item, int], Awaitable[Answered]]

CLIENTS = [1, 8]
N = 16
STRATEGY = {"kind": "self_consistency", "n": N, "early_stop": "never", "start": "all"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", type=int, default=60, help="of single requests; half as many of rounds"
    )
    parser.add_argument(
        "--gateway", action="store_true", help="measure a gateway against the server behind it"
    )


def run(options: argparse.Namespace) -> None:
    items = [item for item in exam(options.seed, options.problems) if item.family == "word"]
    flags = ["--enable-scale-out"] if options.gateway else []
    with ExitStack() as stack:
        base = stack.enter_context(server(options.url, options.path, flags))
        before = stack.enter_context(gateway(base)) if options.gateway else None
        rows = asyncio.run(_measure(base, before, items, options))
    _show(rows, options)
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


async def _measure(
    base: str, before: str | None, items: list[Item], options: argparse.Namespace
) -> list[Any]:
    sandbox = Sandbox()
    answers, rows = Answers(sandbox), []
    try:
        async with (
            httpx.AsyncClient(base_url=base, timeout=600) as client,
            httpx.AsyncClient(base_url=before or base, timeout=600) as other,
        ):

            async def ours(item: Item, seed: int) -> Answered:
                return await search(other, options.model, item, seed=seed, strategy=STRATEGY)

            async def local(item: Item, seed: int) -> Answered:
                return await search(client, options.model, item, seed=seed, strategy=STRATEGY)

            async def bare(item: Item, seed: int) -> Answered:
                return await vote(client, options.model, item, answers, seed=seed, n=N)

            sides: dict[str, Side] = {"mull": ours, "bare": bare}
            if before is not None:
                sides = {"gateway": ours, "local": local}
            with bar() as progress:
                for clients in options.clients:
                    pairs = options.pairs if clients == 1 else max(1, options.pairs // 2)
                    rows.append(await _pairs(sides, items, options, clients, pairs, progress))
    finally:
        await sandbox.close()
    return rows


async def _pairs(
    asked: dict[str, Side],
    items: list[Item],
    options: argparse.Namespace,
    clients: int,
    pairs: int,
    progress: Progress,
) -> dict[str, Any]:
    task = progress.add_task(f"{clients} clients", total=pairs)
    sides: dict[str, list[tuple[float, int]]] = {side: [] for side in asked}
    for pair in range(-2, pairs):  # two to warm up
        chosen = [items[(pair * clients + at) % len(items)] for at in range(clients)]
        seed = options.seed + 1000 * (pair + 2)
        for side in list(asked) if pair % 2 else reversed(asked):
            began = time.monotonic()
            answered = await asyncio.gather(*(asked[side](item, seed) for item in chosen))
            if pair >= 0:
                tokens = sum(one.tokens for one in answered)
                sides[side].append((time.monotonic() - began, tokens))
        progress.advance(task, pair >= 0)
    ratios = [ours / bare for (ours, _), (bare, _) in zip(*sides.values(), strict=True)]
    rng = random.Random(0)
    boot = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "clients": clients,
        "pairs": len(ratios),
        "ratio_median": median(ratios),
        "ratio_low": boot[50],
        "ratio_high": boot[-50],
        **{f"{side}_seconds": median([one for one, _ in got]) for side, got in sides.items()},
        **{f"{side}_tokens": sum(tokens for _, tokens in got) for side, got in sides.items()},
    }


def _show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    title = "wall time of Mull's vote on 16 over bare vLLM's n=16 and a client's vote"
    one, other = "mull", "bare"
    if options.gateway:
        title = "wall time of a vote on 16 through the gateway over the same on the server itself"
        one, other = "gateway", "local"
    table = Table(title=title)
    for heading in ("clients", "pairs", "median ratio (95 %)", f"{one} s", f"{other} s", "tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["clients"]),
            str(row["pairs"]),
            f"{row['ratio_median']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
            f"{row[f'{one}_seconds']:.3f}",
            f"{row[f'{other}_seconds']:.3f}",
            f"{row[f'{one}_tokens']} / {row[f'{other}_tokens']}",
        )
    Console(width=130).print(table)
