"""Unit tests as a verifier: a candidate's code is run, locked up, against the client's tests."""

import json
import re
import secrets
import sys
from collections.abc import Sequence
from textwrap import dedent
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from server import jail
from server.verifiers.rules import Rule
from server.wire import as_list
from strategies.core.aio import Arrivals
from strategies.core.errors import VerifierFailed
from strategies.core.sandbox import Sandbox, SandboxError
from strategies.core.types import Candidate, Problem, Verdict

if TYPE_CHECKING:
    from strategies.core.context import Context

MEMORY_BYTES = 1 << 30
"""Address space of a candidate's program."""

STARTUP_SECONDS = 10.0
"""For its interpreter, beside the program's own time."""

LONGEST_CODE = 100_000
"""Characters of a candidate's code that are run."""

_BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py")


class UnitTests(Rule):
    """The share of the client's unit tests that a candidate's Python code passes.

    The code is the last fenced block of the text, or all of it; each test is a piece of Python that
    raises if it fails, run after the code in the same names. Each candidate has a process of its
    own with the standard library alone: no network, no process, no thread, no file but Python's
    own, `seconds` of time and a gibibyte of memory. Off unless the operator allows it.
    """

    kind: Literal["unit_tests"] = "unit_tests"
    tests: tuple[Annotated[str, Field(min_length=1, max_length=20_000)], ...] = Field(
        min_length=1, max_length=100, description='For example `["assert add(1, 2) == 3"]`.'
    )
    seconds: int = Field(default=5, ge=1, le=30, description="For a candidate and all tests.")

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """One verdict per candidate; its steps are the tests. The same code is run once."""
        found: dict[str, list[bool]] = {}
        codes = [_code(candidate.text) for candidate in candidates]

        async def one(code: str) -> None:
            found[code] = await self._run(code, ctx.sandbox)

        async with Arrivals[None]() as arrivals:
            for code in dict.fromkeys(codes):
                arrivals.start(one(code))
            async for _ in arrivals:
                pass
        return [
            Verdict(score=sum(found[code]) / len(self.tests), steps=tuple(map(float, found[code])))
            for code in codes
        ]

    async def _run(self, code: str, sandbox: Sandbox) -> list[bool]:
        if len(code) > LONGEST_CODE:
            return [False] * len(self.tests)
        word = secrets.token_hex(16)
        job = {
            "seconds": self.seconds,
            "memory_bytes": MEMORY_BYTES,
            "code": code,
            "tests": self.tests,
            "word": word,
        }
        command = [sys.executable, "-I", "-S", str(jail.__file__)]
        try:
            said = await sandbox.program(
                command, json.dumps(job), seconds=self.seconds + STARTUP_SECONDS
            )
        except SandboxError as error:
            raise VerifierFailed(f"code cannot be run now: {error}") from error
        locked, _, told = said.partition("+")
        if locked or not said:
            raise VerifierFailed(f"code cannot be run on this machine: {locked[:200]}")
        return _passed(told.removeprefix(word) if told.startswith(word) else "", len(self.tests))


def _passed(told: str, tests: int) -> list[bool]:
    """Which tests passed; none where the program was killed, ended itself, or says nonsense."""
    try:
        said = as_list(json.loads(told)) or []
    except (ValueError, RecursionError):
        said = []
    whole = len(said) == tests and all(isinstance(one, bool) for one in said)
    return [bool(one) for one in said] if whole else [False] * tests


def _code(text: str) -> str:
    """The last block that is in Python or does not say, dedented; without any, all of the text."""
    blocks: list[tuple[str, str]] = _BLOCK.findall(text)
    python = [code for tag, code in blocks if tag.strip().lower() in _LANGUAGES]
    return dedent(python[-1]) if python else text
