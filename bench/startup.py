"""Start-up of `mull serve` against vLLM's own launcher, to the first 200 of /health.

JSON keys: `mull_seconds`, `vllm_seconds` (one per pair), `ratio_of_medians`, `left_over_processes`
after SIGTERM.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from bench.serving import bar
from bench.stats import median
from models import MULL_TINY
from server.local.defaults import has_bfloat16


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3)


def run(options: argparse.Namespace) -> None:
    flags = [
        "--served-model-name",
        "mull-tiny",
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--block-size",
        "32",
    ]
    flags += [
        "--kv-cache-memory-bytes",
        str(256 << 20),
        "--max-num-seqs",
        "128",
        "--enable-prompt-tokens-details",
    ]
    flags += ["--dtype", "auto" if has_bfloat16() else "float32"]
    model = options.path or str(MULL_TINY)
    mull = [str(Path(sys.executable).parent / "mull"), "serve", model, *flags]
    vllm = [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--model",
        model,
        *flags,
    ]
    seconds: dict[str, list[float]] = {"mull": [], "vllm": []}
    left_over = 0
    with bar() as progress:
        task = progress.add_task("starts", total=2 * options.pairs)
        for _ in range(options.pairs):
            for name, command in (("mull", mull), ("vllm", vllm)):
                took, left = _start(command)
                seconds[name].append(took)
                left_over += left if name == "mull" else 0
                progress.advance(task)
    ratio = median(seconds["mull"]) / median(seconds["vllm"])
    table = Table(title=f"start-up, {options.pairs} alternating pairs")
    for heading in ("launcher", "median seconds", "each"):
        table.add_column(heading)
    for name, values in seconds.items():
        table.add_row(name, f"{median(values):.1f}", ", ".join(f"{value:.1f}" for value in values))
    Console().print(
        table, f"ratio of medians {ratio:.2f}; processes of Mull left after SIGTERM: {left_over}"
    )
    if options.json:
        figures = {
            "mull_seconds": seconds["mull"],
            "vllm_seconds": seconds["vllm"],
            "ratio_of_medians": ratio,
            "left_over_processes": left_over,
        }
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def _start(command: list[str]) -> tuple[float, int]:
    """Seconds until healthy, and how many of its processes outlive SIGTERM by ten seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_"))
        },
        start_new_session=True,
    )
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.05)
            if process.poll() is not None or time.monotonic() - began > 300:
                raise SystemExit(f"did not start: {' '.join(command)}")
        took = time.monotonic() - began
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        return took, len(alive)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
