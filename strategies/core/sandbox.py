"""Time-limited worker processes for code that may hang: computer algebra, backtracking patterns.

Run as a program, this module is the worker. It reads one call a line and answers in two lines: one
when the work starts, one with its result. Everything is JSON; nothing is pickled.
"""

import asyncio
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TypeAlias

from strategies.core.aio import unbroken
from strategies.core.errors import MullError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MODULES = ("strategies.", "server.")
"""Where a function must live that the sandbox runs."""

MEMORY_BYTES = 2 << 30
"""Address space of a worker."""

REPLY_BYTES = 4 << 20
"""A longer result is refused."""

STARTUP_SECONDS = 60.0
"""For a worker to come up and import what a call needs; not part of the call's own limit."""

GRACE_SECONDS = 1.0
"""How long after its limit a worker ends itself, should nobody have killed it by then."""


class SandboxError(MullError):
    """A call in the sandbox gave no result."""


class TimedOut(SandboxError):
    """The call ran longer than it may."""


class Crashed(SandboxError):
    """The call killed its worker: out of memory, a fault in C code, an exit."""


class Raised(SandboxError):
    """The function raised; `kind` names its exception."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Sandbox:
    """Runs functions by name in worker processes that start when first needed and are kept warm.

    A worker does one call at a time; further callers queue. One that overran, died or lost its
    caller is killed, and the next call starts another. A worker ends when this process does.
    """

    def __init__(self, *, processes: int = 1, modules: Sequence[str] = MODULES) -> None:
        """Allow `processes` workers and functions of `modules`; a final dot means all below."""
        self._modules = tuple(modules)
        self._turn = asyncio.Semaphore(processes)
        self._programs = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0)) // 2))
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False

    async def call(self, function: str, *arguments: JSON, seconds: float = 2.0) -> JSON:
        """Run `module:function` and return its result; its time counts from when it starts.

        The function must leave SIGALRM alone: it ends a worker that nobody watches any more.

        Raises:
            TimedOut: It ran longer than `seconds`.
            Crashed: It took its worker down.
            Raised: It raised, or is not there.
            SandboxError: No worker came up, or the sandbox is closed.
        """
        module, _, name = function.partition(":")
        if not name.isidentifier() or not any(
            module.startswith(allowed) if allowed.endswith(".") else module == allowed
            for allowed in self._modules
        ):
            raise ValueError(f"the sandbox does not run {function!r}")
        async with self._turn:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            worker = await self._take()
            self._busy.add(worker)
            try:
                reply = await worker.run(function, arguments, seconds)
            except (Exception, asyncio.CancelledError):
                await unbroken(worker.kill())  # if its caller went away, its answer is nobody's
                raise
            finally:
                self._busy.discard(worker)
            if self._closed:
                await worker.kill()
            else:
                self._idle.append(worker)
        if "raised" in reply:
            raise Raised(*reply["raised"])
        return reply["result"]

    async def program(self, command: Sequence[str], told: str, *, seconds: float) -> str:
        """Run a program of its own, with an empty environment, and kill it in the end.

        It reads `told` from its standard input, and is heard on the descriptor whose number is its
        last argument; what it says is empty if it was killed before it said anything.

        Raises:
            SandboxError: It cannot be started.
        """
        async with self._programs:
            try:
                hear, say = os.pipe()
            except OSError as error:
                raise SandboxError(f"no pipe to a program: {error}") from error
            os.set_blocking(hear, False)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(say),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=(say,),
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
            except OSError as error:
                os.close(hear)
                raise SandboxError(f"a program does not start: {error}") from error
            except BaseException:
                os.close(hear)
                raise
            finally:
                os.close(say)
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await process.communicate(told.encode())
            finally:
                try:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
                finally:
                    with os.fdopen(hear, "rb", buffering=0) as pipe:
                        said = pipe.read(REPLY_BYTES) or b""
            return said.decode(errors="replace")

    async def close(self) -> None:
        """Kill every worker; calls in flight fail as crashed, later ones are refused."""
        self._closed = True
        busy = tuple(self._busy)
        for worker in busy:
            worker.stop()  # its caller sees the end and cleans up
        while self._idle:
            await self._idle.pop().kill()
        for worker in busy:
            await worker.ended()

    async def _take(self) -> "_Worker":
        """A warm worker, or a new one; those that died while idle are dropped."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            await worker.kill()
        return await unbroken(_Worker.start(), _Worker.kill)


class _Worker:
    """One worker process, seen from outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._calls = process.stdin
        self._replies = process.stdout

    @classmethod
    async def start(cls) -> Self:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "strategies.core.sandbox",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],  # so that it imports what this process imported
                start_new_session=True,  # a Ctrl-C is the server's to handle
                limit=REPLY_BYTES,
            )
        except OSError as error:
            raise SandboxError(f"the sandbox cannot start a process: {error}") from error
        return cls(process)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def run(self, function: str, arguments: Sequence[JSON], seconds: float) -> dict[str, Any]:
        call = json.dumps([function, arguments, seconds])
        try:
            self._calls.write(call.encode() + b"\n")
            async with asyncio.timeout(STARTUP_SECONDS):
                await self._calls.drain()
                reply = await self._read()
        except TimeoutError:
            raise SandboxError(
                f"the sandbox did not start {function} in {STARTUP_SECONDS} s"
            ) from None
        except (EOFError, OSError):
            raise SandboxError(f"the sandbox worker died before it started {function}") from None
        if "started" not in reply:
            return reply
        try:
            async with asyncio.timeout(seconds):
                return await self._read()
        except TimeoutError:
            raise TimedOut(f"{function} took longer than {seconds} s") from None
        except (EOFError, OSError):
            status = await self._process.wait()
            if status == -signal.SIGALRM:
                raise TimedOut(f"{function} took longer than {seconds} s") from None
            raise Crashed(f"{function} took its sandbox worker down (status {status})") from None

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> None:
        await self._process.wait()

    async def kill(self) -> None:
        """End the process, reap it, and close its pipes."""
        self.stop()
        self._calls.close()
        await self._process.communicate()

    async def _read(self) -> dict[str, Any]:
        line = await self._replies.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def main() -> None:
    """Be the worker until the parent closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside C code
    replies = os.dup(1)
    os.dup2(2, 1)  # what the work prints is no reply

    def reply(**message: JSON) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > REPLY_BYTES:
            raise ValueError(f"a result of {len(line)} bytes is too large")
        with open(replies, "wb", closefd=False) as pipe:
            pipe.write(line)

    for line in sys.stdin.buffer:
        function, arguments, seconds = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_REAL, STARTUP_SECONDS)
            work = _find(function)
            reply(started=True)
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
            reply(result=work(*arguments))
        except MemoryError:
            os._exit(errno.ENOMEM)  # what fills the memory may be kept by some cache
        except Exception as error:
            reply(raised=[type(error).__name__, str(error)[:500]])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _find(function: str) -> Callable[..., JSON]:
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    main()
