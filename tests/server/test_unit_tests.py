"""Candidates' code against unit tests: what passes, and what a program cannot do."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from server.verifiers.catalogue import Allowed, resolve
from server.verifiers.unit_tests import UnitTests
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import VerifierChoice
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Candidate, Problem, Verdict

PROBLEM = Problem(token_ids=(1,))


async def judged(*codes: str, tests: tuple[str, ...], seconds: int = 2) -> list[Verdict]:
    candidates = [
        Candidate(index=at, text=code, token_ids=(at,), finish_reason="stop")
        for at, code in enumerate(codes)
    ]
    async with context(FakeEngine([""])) as ctx:
        return await UnitTests(tests=tests, seconds=seconds).judge(PROBLEM, candidates, ctx)


async def test_the_share_of_tests_that_pass():
    right = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    wrong = "```py\ndef add(a, b):\n    return a - b\n```"
    verdicts = await judged(
        right, wrong, "no code", right, tests=("assert add(1, 2) == 3", "assert add(0, 0) == 0")
    )
    assert [verdict.score for verdict in verdicts] == [1.0, 0.5, 0.0, 1.0]
    assert [verdict.steps for verdict in verdicts[:2]] == [(1.0, 1.0), (0.0, 1.0)]


async def test_the_standard_library_and_its_directory_are_there():
    code = """
import collections, ctypes, decimal, json, math, re, statistics, threading, zlib
from pathlib import Path
Path("notes.txt").write_text("x")
thread = threading.Thread(target=lambda: Path("more.txt").write_text("y"))
thread.start(); thread.join()
"""
    tests = ("assert Path('notes.txt').read_text() + Path('more.txt').read_text() == 'xy'",)
    [verdict] = await judged(code, tests=tests)
    assert verdict.score == 1.0


OUTSIDE = Path(__file__).parent / "conftest.py"


def left_behind() -> bool:
    return Path("/tmp/mull-was-here").exists()


REFUSED = {
    "a socket": "import socket; socket.socket()",
    "a pair of sockets": "import socket; socket.socketpair()",
    "reading a file": f"open({str(OUTSIDE)!r})",
    "reading the environment of its parent": f"open('/proc/{os.getpid()}/environ').read()",
    "listing a directory": "import os; os.listdir('/etc')",
    "writing a file": "open('/tmp/mull-was-here', 'w')",
    "removing a file": f"import os; os.remove({str(OUTSIDE)!r})",
    "a device": "open('/dev/null', 'w')",
    "a process": "import os; os.fork()",
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a shell": "import subprocess; subprocess.run('true', shell=True, check=True)",
    "a signal": f"import os; os.kill({os.getpid()}, 0)",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "another root": "import os; os.chroot('.')",
    "much memory": "bytearray(2 << 30)",
    "a large file": "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "open('large', 'wb').write(bytes(32 << 20))",
    "many files": "files = [open(f'{at}', 'w') for at in range(100)]",
    "another name space": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_refused(what: str):
    kept = OUTSIDE.read_text()
    [verdict] = await judged("reached = 1", tests=(REFUSED[what], "assert reached"), seconds=5)
    assert verdict.steps == (0.0, 1.0), "refused, and the process went on"
    assert OUTSIDE.read_text() == kept
    assert not left_behind()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "import os; [os.write(one, b'[true]') for one in range(3, 20)]; os._exit(0)",
        "raise SystemExit",
        "x = (" * 100_000,
        "def f(): f()\nf()",
    ],
    ids=lambda code: code[:30],
)
async def test_what_ends_a_program_fails_its_tests(code: str):
    [verdict, other] = await judged(code, "x = 1", tests=("pass",), seconds=1)
    assert (verdict.score, other.score) == (0.0, 1.0)


async def test_a_sleeping_program_is_killed_with_its_request():
    async with context(FakeEngine([""])) as ctx:
        one = Candidate(
            index=0, text="import time; time.sleep(60)", token_ids=(1,), finish_reason="stop"
        )
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await UnitTests(tests=("pass",)).judge(PROBLEM, [one], ctx)
        assert time.monotonic() - began < 4


def test_code_is_not_run_unless_the_operator_says_so():
    choice = VerifierChoice.model_validate({"kind": "unit_tests", "tests": ["pass"]})
    with pytest.raises(InvalidRequest, match="'run_code'") as caught:
        resolve(choice, Allowed())
    assert caught.value.field == "verifier.kind"
    assert resolve(choice, Allowed(code=True)).kind == "unit_tests"
