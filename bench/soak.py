"""What a server does over time and under a crowd: memory, lost requests, latency of /health.

For `--minutes`, `--clients` at a time send a mix: plain requests, searches of every kind, streams,
clients that hang up, requests that are refused. Then `--crowd` requests come at the same moment.
JSON: `memory` has [minutes, MiB of the server's processes] every few seconds, and `growth`, the
median of its last quarter over that of the quarter after the warm-up (the first fifth). `mixed` and
`crowd` count replies by status, and `lost`, those without one; `health` has the median, the 99th
percentile and the maximum of /health meanwhile, in seconds, asked by a process of its own.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from bench.plot import panels
from bench.serving import bar, server
from bench.stats import median
from finetune.tiny.problems import exam

_LOOK_SECONDS = 5.0
_HEALTH_SECONDS = 0.1
_CONNECTIONS = 100

_SEARCHES: tuple[dict[str, Any], ...] = (
    {"kind": "self_consistency", "n": 6},
    {"kind": "best_of_n", "n": 4},
    {"kind": "deep_confidence", "n": 6, "warmup": 3},
    {"kind": "self_refine", "n": 3},
    {"kind": "budget_forcing"},
    {"kind": "beam_search", "width": 2, "branch": 2},
    {"kind": "beam_search", "level": "token", "width": 3},
    {"kind": "tree_of_thoughts", "width": 2, "branch": 2, "max_nodes": 12},
    {"kind": "compute_optimal"},
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10, help="of mixed load")
    parser.add_argument("--crowd", type=int, default=2000, help="requests at the same moment")
    parser.add_argument("--plot", metavar="PNG", help="draw memory over time there")


def run(options: argparse.Namespace) -> None:
    if options.url:
        raise SystemExit("it looks into the processes of the server that it starts: no --url")
    with server(None, options.path) as base:
        figures = asyncio.run(_measure(base, options))
    Console().print_json(data={key: value for key, value in figures.items() if key != "memory"})
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        with panels(options.plot, 1, 1, (7, 4)) as [[axis]]:
            axis.plot(*zip(*figures["memory"], strict=True))
            axis.set(xlabel="minutes", ylabel="MiB of all processes", ylim=(0, None))


@dataclass(slots=True, kw_only=True)
class Counted:
    """What became of requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        return {"statuses": dict(sorted(self.statuses.items())), "lost": self.lost}


async def _measure(base: str, options: argparse.Namespace) -> dict[str, Any]:
    prompts = [item.prompt for item in exam(options.seed, options.problems)]
    memory: list[tuple[float, float]] = []
    [serving] = psutil.Process().children()
    mixed, crowd = Counted(), Counted()
    async with clients(base, options.clients) as several:
        with health(base) as soaking:
            await _soak(several, prompts, mixed, serving, memory, options)
    async with clients(base, options.crowd) as several:
        with health(base) as crowded:
            asked = [
                _ask(client, prompts, crowd, random.Random(f"crowd {at}"), hang_up=False)
                for at, client in enumerate(several)
            ]
            await asyncio.gather(*asked)
    return {
        "growth": _growth(memory),
        "mixed": mixed.report() | {"health": spread(soaking)},
        "crowd": crowd.report() | {"health": spread(crowded)},
        "memory": memory,
    }


@asynccontextmanager
async def clients(base: str, requests: int) -> AsyncGenerator[list[httpx.AsyncClient]]:
    """A client for each of so many requests; a hundred share one.

    A client looks through all of its connections again for every request.
    """
    async with AsyncExitStack() as stack:
        shared = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=600))
            for _ in range(0, requests, _CONNECTIONS)
        ]
        yield [shared[at // _CONNECTIONS] for at in range(requests)]


async def _soak(
    several: list[httpx.AsyncClient],
    prompts: list[str],
    counted: Counted,
    serving: psutil.Process,
    memory: list[tuple[float, float]],
    options: argparse.Namespace,
) -> None:
    began, over = time.monotonic(), 60 * options.minutes

    def elapsed() -> float:
        return time.monotonic() - began

    async def one(number: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(f"{options.seed} {number}")
        while elapsed() < over:
            await _ask(client, prompts, counted, rng)

    async def look() -> None:
        with bar() as progress:
            task = progress.add_task("mixed load, seconds", total=int(over))
            while elapsed() < over:
                memory.append((elapsed() / 60, _mebibytes(serving)))
                progress.update(task, completed=int(elapsed()))
                await asyncio.sleep(_LOOK_SECONDS)

    await asyncio.gather(look(), *(one(number, client) for number, client in enumerate(several)))


async def _ask(
    client: httpx.AsyncClient,
    prompts: list[str],
    counted: Counted,
    rng: random.Random,
    *,
    hang_up: bool = True,
) -> None:
    """One request of the mix; every eighth client hangs up."""
    body: dict[str, Any] = {
        "model": "mull-tiny",
        "messages": [{"role": "user", "content": rng.choice(prompts)}],
        "max_tokens": rng.choice([8, 40, 120]),
        "seed": rng.randrange(2**31),
        "stream": rng.random() < 0.3,
    }
    if rng.random() < 0.7:
        body["strategy"] = rng.choice(_SEARCHES)
    if rng.random() < 0.05:
        body["budget"] = {"tokens": -1}
    leaves = hang_up and rng.random() < 0.125
    try:
        reply = await client.post(
            "/v1/chat/completions", json=body, timeout=rng.uniform(0.05, 1) if leaves else 600
        )
    except httpx.HTTPError as error:
        if leaves and isinstance(error, httpx.TimeoutException):
            counted.statuses["hung up"] += 1
        else:
            counted.lost.append(repr(error))
        return
    whole = not body["stream"] or reply.is_error or reply.text.rstrip().endswith("[DONE]")
    counted.statuses[str(reply.status_code) if whole else "broken stream"] += 1


@contextmanager
def health(base: str) -> Iterator[list[float]]:
    """Seconds that /health took, asked all the time while the block lasts; inf is not well.

    In a process of its own: this one is busy.
    """
    seconds: list[float] = []
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    asking = spawn.Process(target=_health, args=(base, theirs), daemon=True)
    asking.start()
    theirs.close()  # so that its end shows here
    ours.recv()  # it has begun
    try:
        yield seconds
    finally:
        ours.send(None)
        seconds += ours.recv()
        asking.join()


def _health(base: str, pipe: Connection) -> None:
    seconds: list[float] = []
    with httpx.Client(base_url=base, timeout=60) as client:
        pipe.send(None)
        while not pipe.poll(_HEALTH_SECONDS):
            began = time.monotonic()
            try:
                client.get("/health").raise_for_status()
            except httpx.HTTPError:
                seconds.append(math.inf)
            else:
                seconds.append(time.monotonic() - began)
    pipe.send(seconds)


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "asked": len(ordered),
        "median": median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "most": ordered[-1],
    }


def _mebibytes(serving: psutil.Process) -> float:
    """What the server's processes hold for themselves; shared pages count once, in parts."""
    family = [serving, *serving.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family) / 2**20


def _growth(memory: list[tuple[float, float]]) -> float:
    warm = memory[len(memory) // 5 :]
    quarter = max(1, len(warm) // 4)
    return median([m for _, m in warm[-quarter:]]) / median([m for _, m in warm[:quarter]])
