"""One real server for all the tests of this folder, on the embedded model."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import settings

from models import MULL_TINY
from server.local.adapters import Base
from server.local.defaults import has_bfloat16
from tests.strategies.test_calibration import calibration

settings.register_profile("long", max_examples=10_000)


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def wait_healthy(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not healthy(self.url):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, (
                f"not ready in {seconds} s: {self.log.read_text()[-4000:]}"
            )
            time.sleep(0.1)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def serving(log: Path, *flags: str, **environment: str) -> Iterator[Served]:
    """`mull serve` on a free port of 127.0.0.1; its whole family is gone afterwards."""
    mull = str(Path(sys.executable).parent / "mull")
    with _started(log, [mull, "serve", *flags], environment) as served:
        yield served


@contextlib.contextmanager
def serving_bare(log: Path, *flags: str, **environment: str) -> Iterator[Served]:
    """vLLM's own API server, started by vLLM's own launcher."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--host", "127.0.0.1", "--dtype", "auto" if has_bfloat16() else "float32"),
        *("--block-size", "32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20)),
        *flags,
    ]
    alone = {
        "VLLM_PLUGINS": "none",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with _started(log, command, alone | environment) as served:
        yield served


@contextlib.contextmanager
def _started(log: Path, command: list[str], environment: dict[str, str]) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=os.environ | environment, start_new_session=True
        )
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        served.wait_healthy(240)
        yield served
    finally:
        family = served.family() if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=40)
        for one in alive:
            one.kill()
        process.wait(10)


@pytest.fixture(scope="session")
def vllm():
    """The same of a server without Mull, unless its plugin is asked for."""
    return serving_bare


@pytest.fixture(scope="session")
def serve():
    """The context manager itself, for tests that need a server of their own."""
    return serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server")
    shelf = folder / "calibrations"
    shelf.mkdir()
    for name, model, weights in (
        ("small", "mull-tiny", Base(MULL_TINY, lambda: None, None).weights),
        ("foreign", "another", "0" * 64),
    ):
        said = {"name": name, "model": model, "digests": {"weights": weights}}
        text = calibration().model_copy(update=said).model_dump_json()
        (shelf / f"{name}.json").write_text(text)
    environment = {"MULL_TRACES": str(folder / "traces"), "MULL_CALIBRATIONS": str(shelf)}
    with serving(folder / "log", "--enable-scale-out", **environment) as served:
        yield served


@contextlib.contextmanager
def before(log: Path, *upstreams: str, **environment: str) -> Iterator[Served]:
    """`mull gateway` before these servers, on a free port of 127.0.0.1."""
    command = [sys.executable, "-m", "server.cli", "gateway", "--upstream", *upstreams]
    with _started(log, command, environment) as served:
        yield served


@pytest.fixture(scope="session")
def stand_before():
    """The context manager itself."""
    return before


@pytest.fixture(scope="session")
def gateway(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway before the server of all tests."""
    shelf = str(server.log.parent / "calibrations")
    log = tmp_path_factory.mktemp("gateway") / "log"
    with before(log, server.url, MULL_CALIBRATIONS=shelf) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def running() -> Callable[[httpx.AsyncClient], Awaitable[int]]:
    """How many requests the engine and Mull have at work."""

    async def count(client: httpx.AsyncClient) -> int:
        return sum(
            int(float(line.rsplit(" ", 1)[1]))
            for line in (await client.get("/metrics")).text.splitlines()
            if line.startswith(("vllm:num_requests_", "mull_running_")) and "by_reason" not in line
        )

    return count
