"""A Mull server for the length of a measurement, and requests to it with progress."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


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
    with _started(command, **environment) as base:
        yield base


@contextlib.contextmanager
def gateway(upstream: str) -> Iterator[str]:
    """The base URL of a gateway before a server, ended afterwards."""
    mull = str(Path(sys.executable).parent / "mull")
    with _started([mull, "gateway", "--upstream", upstream]) as base:
        yield base


@contextlib.contextmanager
def _started(command: Sequence[str], **environment: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | environment,
        )
        base = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 180
            while not _healthy(base):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield base
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _healthy(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


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
