"""The sandbox: limits hold, whatever the function does, and the next call always works."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from strategies.core.errors import MullError
from strategies.core.sandbox import JSON, Crashed, Raised, Sandbox, SandboxError, TimedOut

MODULES = ("builtins", "operator", "os", "re", "signal", "time")


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(modules=MODULES)
    yield sandbox
    await sandbox.close()


def alive(process: object) -> bool:
    assert isinstance(process, int)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def test_result_is_json_and_the_process_is_kept(sandbox: Sandbox):
    assert await sandbox.call("operator:add", [1, "\ud800ä"], [None, {"a": 1.5}]) == [
        1,
        "\ud800ä",
        None,
        {"a": 1.5},
    ]
    first = await sandbox.call("os:getpid")
    assert first == await sandbox.call("os:getpid") != os.getpid()


async def test_only_allowed_modules_run():
    sandbox = Sandbox()
    for function in (
        "os:system",
        "strategies:x",
        "strategies.core.aio:",
        "strategiesx.a:b",
        "nothing",
    ):
        with pytest.raises(ValueError, match="does not run"):
            await sandbox.call(function)
    with pytest.raises(ValueError, match="does not run"):
        await Sandbox(modules=("os",)).call("os.path:join", "a", "b")
    assert await sandbox.call("strategies.core.answers:find", "b+", "abbbc") == "bbb"
    await sandbox.close()


async def test_overrun_is_killed_and_the_next_call_works(sandbox: Sandbox):
    before = await sandbox.call("os:getpid")
    started = time.monotonic()
    with pytest.raises(TimedOut, match="longer than"):
        await sandbox.call("time:sleep", 60, seconds=0.2)
    assert time.monotonic() - started < 5
    assert not alive(before)
    assert await sandbox.call("os:getpid") != before


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("re:search", (r"(a+)+$", "a" * 40 + "!")), ("operator:pow", (9, 9**9))],
)
async def test_busy_code_is_bounded(sandbox: Sandbox, function: str, arguments: tuple[JSON, ...]):
    with pytest.raises(TimedOut):
        await sandbox.call(function, *arguments, seconds=0.3)
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_crash_is_an_error_of_ours(sandbox: Sandbox):
    for function, arguments in (
        ("os:abort", ()),
        ("os:_exit", (0,)),
        ("signal:raise_signal", (9,)),
    ):
        with pytest.raises(Crashed, match="took its sandbox worker down") as caught:
            await sandbox.call(function, *arguments)
        assert isinstance(caught.value, MullError)
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_memory_is_bounded(sandbox: Sandbox):
    with pytest.raises(Crashed):
        await sandbox.call("operator:mul", "x", 3 << 30)
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_exceptions_come_back_typed(sandbox: Sandbox):
    with pytest.raises(Raised, match="ZeroDivisionError: division by zero") as caught:
        await sandbox.call("operator:truediv", 1, 0)
    assert caught.value.kind == "ZeroDivisionError"
    with pytest.raises(Raised, match="AttributeError"):
        await sandbox.call("os:nonsense")
    with pytest.raises(Raised, match="TypeError"):
        await sandbox.call("re:compile", "a")  # no JSON
    with pytest.raises(Raised, match="too large"):
        await sandbox.call("operator:mul", "x", 5 << 20)
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_printing_does_not_corrupt_the_replies(sandbox: Sandbox):
    await sandbox.call("builtins:print", '{"result": 666}')
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_large_arguments_pass(sandbox: Sandbox):
    assert await sandbox.call("builtins:len", "x" * 3_000_000) == 3_000_000


async def test_calls_queue_and_waiting_costs_no_time(sandbox: Sandbox):
    await sandbox.call("time:sleep", 0)
    results = await asyncio.gather(
        *(sandbox.call("time:sleep", 0.4, seconds=1.2) for _ in range(4)),
        sandbox.call("os:getpid"),
    )
    assert results[:4] == [None] * 4


async def test_a_pool_runs_calls_side_by_side():
    sandbox = Sandbox(processes=2, modules=MODULES)
    await asyncio.gather(*(sandbox.call("time:sleep", 0.3) for _ in range(2)))
    started = time.monotonic()
    await asyncio.gather(*(sandbox.call("time:sleep", 1.0) for _ in range(2)))
    assert time.monotonic() - started < 1.9
    await sandbox.close()


async def test_cancelled_callers_leave_the_pool_usable(sandbox: Sandbox):
    before = await sandbox.call("os:getpid")
    running = asyncio.create_task(sandbox.call("time:sleep", 60, seconds=90))
    queued = asyncio.create_task(sandbox.call("operator:add", 1, 2))
    await asyncio.sleep(0.1)
    queued.cancel()
    running.cancel()
    await asyncio.wait({running, queued})
    assert running.cancelled()
    assert queued.cancelled()
    assert not alive(before)
    assert await sandbox.call("operator:add", 1, 2) == 3


@pytest.mark.parametrize("after", [0.0, 0.001, 0.01, 0.03, 0.1])
async def test_cancelled_at_any_moment(after: float):
    sandbox = Sandbox(modules=MODULES)
    task = asyncio.create_task(sandbox.call("operator:add", 1, 2))
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.wait({task})
    assert await sandbox.call("operator:add", "a", "b") == "ab"
    await sandbox.close()


@pytest.mark.parametrize("turns", range(1, 9))
async def test_cancelled_twice_while_a_worker_starts(turns: int):
    sandbox, before = Sandbox(modules=MODULES), asyncio.all_tasks()
    others = psutil.Process().children()
    task = asyncio.create_task(sandbox.call("operator:add", 1, 2))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert asyncio.all_tasks() == before
    assert psutil.Process().children() == others
    await sandbox.close()


async def test_killed_while_idle(sandbox: Sandbox):
    process = await sandbox.call("os:getpid")
    assert isinstance(process, int)
    os.kill(process, signal.SIGKILL)
    for _ in range(500):
        await asyncio.sleep(0.01)
        if not alive(process):
            break
    await asyncio.sleep(0.1)
    assert await sandbox.call("operator:add", 1, 2) == 3


async def test_closing_ends_what_runs_and_refuses_what_comes():
    sandbox = Sandbox(modules=MODULES)
    process = await sandbox.call("os:getpid")
    running = asyncio.create_task(sandbox.call("time:sleep", 60, seconds=90))
    await asyncio.sleep(0.1)
    await sandbox.close()
    with pytest.raises(Crashed):
        await running
    assert not alive(process)
    with pytest.raises(SandboxError, match="closed"):
        await sandbox.call("os:getpid")


def worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "strategies.core.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_worker_ends_with_its_parent():
    with worker() as process:
        process.communicate(timeout=10)
        assert process.returncode == 0


def test_worker_ends_itself_when_nobody_does():
    with worker() as process:
        assert process.stdin is not None
        call = ["re:search", ["(a+)+$", "a" * 60 + "!"], 0.1]
        process.stdin.write(json.dumps(call).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=10) == -signal.SIGALRM


def test_worker_starts_without_computer_algebra():
    code = "import strategies.core.sandbox, sys; print({'sympy', 'pydantic'} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert printed.stdout == "set()\n"
