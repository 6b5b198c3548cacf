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


async def test_the_standard_library_is_there():
    code = """
import collections, ctypes, decimal, json, math, re, statistics, threading, zlib, datetime, heapq
import itertools, functools, random, string, bisect, dataclasses, typing, time, copy, fractions
time.sleep(0.01)
"""
    tests = (
        "assert json.loads('[1]') == [1] and math.sqrt(decimal.Decimal(4)) == 2",
        "assert random.SystemRandom().random() < 1 and time.time() > 0 and datetime.date.today()",
        "print('said to nobody'); assert statistics.mean([1, 3]) == 2",
    )
    [verdict] = await judged(code, tests=tests)
    assert verdict.steps == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "First:\n```bash\npip install x\n```\nThen:\n```python\nx = 1\n```\nDone.",
        "```Python3\nx = 1\n```\nIn C++:\n```cpp\nint x = 1;\n```",
        "1. So:\n   ```py\n   x = 1\n   ```",
        "```\nx = 1\n```",
        "x = 1",
    ],
    ids=str,
)
async def test_the_last_block_in_python_is_run(text: str):
    [verdict] = await judged(text, tests=("assert x == 1",))
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
    "emptying a file": f"import os; os.truncate({str(OUTSIDE)!r}, 0)",
    "a file's rights": f"import os; os.chmod({str(OUTSIDE)!r}, 0o777)",
    "a file's times": f"import os; os.utime({str(OUTSIDE)!r}, (0, 0))",
    "a device's node": "import os, stat; os.mknod('/tmp/mull-was-here', stat.S_IFCHR, 0)",
    "a folder": "import os; os.mkdir('/tmp/mull-was-here')",
    "a thread": "import threading; threading.Thread(target=print).start()",
    "a signal by a descriptor": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "the priority of its parent": "import os; os.setpriority(0, os.getppid(), 19)",
    "the processors of its parent": "import os; os.sched_setaffinity(os.getppid(), [0])",
    "shared memory": "import ctypes\n"
    "if ctypes.CDLL(None).shmget(0, 4096, 0o1600) < 0: raise OSError",
    "memory without a limit": "import os; os.memfd_create('x')",
    "a life without an alarm": "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    "a deaf ear": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])",
    "removing a file": f"import os; os.remove({str(OUTSIDE)!r})",
    "a device": "open('/dev/null', 'w')",
    "a process": "import os; os.fork()",
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a shell": "import subprocess; subprocess.run('true', shell=True, check=True)",
    "a signal": f"import os; os.kill({os.getpid()}, 0)",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "another root": "import os; os.chroot('.')",
    "much memory": "bytearray(2 << 30)",
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
        "import time; time.sleep(5)",
        "import os, sys; say = int(sys.argv[1]); os.write(say, b'ha ha'); os._exit(0)",
        "import os, sys; job = sys._getframe(1).f_locals['job']\n"
        "os.write(int(sys.argv[1]), (job['word'] + '[1, 2').encode()); os._exit(0)",
        "import os, sys; job = sys._getframe(1).f_locals['job']\n"
        "os.write(int(sys.argv[1]), (job['word'] + '[NaN]').encode()); os._exit(0)",
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
