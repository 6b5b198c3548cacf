"""A Mull server for the length of a measurement, and requests to it with progress."""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from finetune.serving import started

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

_READY_SECONDS = 180


@contextlib.contextmanager
def server(
    url: str | None, path: str | None, flags: Sequence[str] = (), **environment: str
) -> Iterator[str]:
    """The base URL of `url`, or of a server started with `flags` and ended afterwards."""
    if url is not None:
        yield url.rstrip("/")
        return
    command = [
        str(Path(sys.executable).parent / "mull"),
        "serve",
        *([path] if path else []),
        *flags,
    ]
    if path:
        command += [
            "--served-model-name",
            "mull-tiny",
            "--enforce-eager",
            "--kv-cache-memory-bytes",
            str(256 << 20),
        ]
    with (
        tempfile.TemporaryFile() as log,
        started(command, log, seconds=_READY_SECONDS, **environment) as base,
    ):
        yield base


@contextlib.contextmanager
def gateway(upstream: str) -> Iterator[str]:
    """The base URL of a gateway before a server, ended afterwards."""
    mull = str(Path(sys.executable).parent / "mull")
    command = [mull, "gateway", "--upstream", upstream]
    with tempfile.TemporaryFile() as log, started(command, log, seconds=_READY_SECONDS) as base:
        yield base


async def ask_all(
    asked: Sequence[Asked],
    ask: Callable[[Asked], Awaitable[Answered]],
    *,
    clients: int,
    progress: Progress,
    label: str,
) -> list[Answered]:
    """Ask everything, `clients` at a time; answers in the order asked."""
    task = progress.add_task(label, total=len(asked))
    gate = asyncio.Semaphore(clients)

    async def one(item: Asked) -> Answered:
        async with gate:
            answered = await ask(item)
        progress.advance(task)
        return answered

    return list(await asyncio.gather(*(one(item) for item in asked)))


def bar() -> Progress:
    """A progress display for a terminal and for a log."""
    return Progress(
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=False,
    )
