"""The CPU mends, on real engines, each in a process of its own: patches stay there."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPTS = Path(__file__).parent / "engine_scripts"
LIMIT_SECONDS = 240
"""For one process; it needs some ten on an idle machine."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",  # what is tested is what the script mends, not what is installed
}


@asynccontextmanager
async def running(script: str, *args: str | Path, errors: int = PIPE) -> AsyncIterator[Process]:
    """A script in a process group of its own, of which nothing is left afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, SCRIPTS / script, *args),
        stdout=PIPE,
        stderr=errors,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def printed(script: str, *args: str | Path) -> Any:
    """The line of JSON that the script ends with."""
    async with running(script, *args) as process:
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()[-8000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def merged(folder: Path) -> dict[str, Any]:
    """What transformers answers with each adapter merged into the model, which is written too."""
    return asyncio.run(printed("tiny_model.py", folder))


async def test_base_requests_get_no_adapter_when_all_slots_are_filled(
    merged: dict[str, Any], folder: Path
) -> None:
    answers = await printed("cpu_faults.py", "lora", folder)

    assert len({str(tokens(answer)) for answer in merged.values()}) == len(merged)
    for adapter, answer in [*answers["alone"].items(), *answers["together"]]:
        assert tokens(answer) == tokens(merged[adapter]), adapter
        assert logprobs(answer) == pytest.approx(logprobs(merged[adapter]), abs=1e-3), adapter
    prompts = answers["prompts"]  # their rows are not one a request, which ends a stock engine
    for together, alone in zip(prompts["together"], prompts["alone"], strict=True):
        assert together == pytest.approx(alone, abs=1e-3)
    assert prompts["alone"][0] != pytest.approx(prompts["alone"][1], abs=1e-3)


@pytest.mark.usefixtures("merged")
async def test_seeded_requests_survive_a_chunked_prompt_with_the_same_answer(folder: Path) -> None:
    answers = await printed("cpu_faults.py", "seed", folder)

    assert [tokens(answer) for answer in answers["chunked"]] == [
        tokens(answer) for answer in answers["whole"]
    ]


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize("executor", ["uni", pytest.param("mp", marks=pytest.mark.slow)])
async def test_an_engine_ends_soon_after_its_owner_was_killed(executor: str, folder: Path) -> None:
    args = ("orphan", folder, "--executor", executor)
    async with running("cpu_faults.py", *args, errors=DEVNULL) as owner:
        assert owner.stdout is not None
        assert await owner.stdout.readline(), "the engine did not start"
        orphans = psutil.Process(owner.pid).children(recursive=True)
        assert len(orphans) >= {"uni": 1, "mp": 2}[executor]

        owner.kill()
        _, left = await asyncio.to_thread(psutil.wait_procs, orphans, timeout=10)

    assert left == []


def tokens(answer: list[tuple[int, float]]) -> list[int]:
    return [token for token, _ in answer]


def logprobs(answer: list[tuple[int, float]]) -> list[float]:
    return [logprob for _, logprob in answer]
