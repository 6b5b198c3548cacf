"""Runs one untrusted Python program: `python -I -S jail.py`, the job as JSON on its standard input.

It first takes from itself whatever the program does not need, for good: files but for Python's own,
which it may read (Landlock); all system calls but those by which Python computes (seccomp: no
socket, no process, no thread, no signal, nothing shared with others); all but a little time and
memory (limits). Linux 6.2 on x86-64 or arm64 is needed; without, it refuses to run anything. A
program that attacks its own tests from inside the interpreter can still make them pass.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_EVERY_ACCESS = (1 << 15) - 1
"""To the file system, as Landlock's third version knows them; truncation is the last."""

_ALLOWED = {
    "x86_64": (
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 17, 19, 20, 21, 23, 32, 79, 89, 217, 257, 262, 267, 269),
        *(9, 10, 11, 12, 25, 28, 24, 35, 202, 219, 230, 60, 231, 273, 334, 332, 436, 439),
        *(13, 15, 131, 39, 63, 96, 98, 99, 100, 102, 104, 107, 108, 186, 201, 204, 228, 229, 318),
    ),
    "aarch64": (
        *(63, 64, 57, 80, 73, 62, 67, 65, 66, 72, 23, 17, 61, 56, 79, 78, 48),
        *(222, 226, 215, 214, 216, 233, 124, 101, 98, 128, 115, 93, 94, 99, 293, 291, 436, 439),
        *(134, 139, 132, 172, 160, 169, 165, 179, 153, 174, 175, 176, 177, 178, 123, 113, 114, 278),
    ),
}
"""Open, read and write; memory, waiting and ending; signal handlers, clocks, names and chance."""
_FCNTL = {"x86_64": 72, "aarch64": 25}
_HARMLESS = (0, 1, 2, 3, 1030)
"""What may be asked of a descriptor: to be doubled, and its flags."""
_ACTION = {"x86_64": 13, "aarch64": 134}
"""Sets a handler: of any signal but the alarm."""
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class Unavailable(Exception):
    """This machine cannot lock a program up."""


def lock(*, seconds: int, memory_bytes: int) -> None:
    """Lock this process up; it ends after `seconds`.

    Raises:
        Unavailable: A part of the lock does not hold here.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ALLOWED:
        raise Unavailable("code runs on Linux only, on x86-64 or arm64")
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Unavailable("new privileges cannot be given up")
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"}
    _landlock(libc, [path for path in paths if Path(path).is_dir()])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    _seccomp(libc, machine)


def _landlock(libc: ctypes.CDLL, readable: Iterable[str]) -> None:
    if libc.syscall(_CREATE_RULESET, None, 0, 1) < 3:
        raise Unavailable("the kernel's Landlock is too old or off (Linux 6.2 has it)")
    ruleset = struct.pack("=Q", _EVERY_ACCESS)
    rules = libc.syscall(_CREATE_RULESET, ruleset, len(ruleset), 0)
    if rules < 0:
        raise Unavailable("Landlock refuses a set of rules")
    for path in readable:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, place)
        if libc.syscall(_ADD_RULE, rules, _BENEATH, rule, 0):
            raise Unavailable(f"Landlock refuses a rule: {os.strerror(ctypes.get_errno())}")
        os.close(place)
    if libc.syscall(_RESTRICT_SELF, rules, 0):
        raise Unavailable("Landlock does not lock")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL, machine: str) -> None:
    """A filter on system calls: statements (code, jump if true, jump if false, operand)."""
    load, equal, give = 0x20, 0x15, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | 38  # as if it did not exist
    number, first, second = 0, 16, 24  # places of a call's number and arguments
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, _ARCHITECTURE[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (equal, 0, 3, _ACTION[machine]),
        (load, 0, 0, first),
        (equal, 0, 1, int(signal.SIGALRM)),
        (give, 0, 0, refuse),
        (load, 0, 0, number),
        (equal, 0, 2 + len(_HARMLESS) * 2, _FCNTL[machine]),
        (load, 0, 0, second),
        *(part for one in _HARMLESS for part in ((equal, 0, 1, one), (give, 0, 0, allow))),
        (give, 0, 0, refuse),
    ]
    for call in _ALLOWED[machine]:
        program += [(equal, 0, 1, call), (give, 0, 0, allow)]
    program.append((give, 0, 0, refuse))
    raw = b"".join(struct.pack("=HBBI", *statement) for statement in program)
    held = ctypes.create_string_buffer(raw)
    header = struct.pack("=H6xQ", len(program), ctypes.addressof(held))
    if libc.prctl(_SET_SECCOMP, _FILTER, header, 0, 0):
        raise Unavailable("seccomp does not lock")


def main() -> None:
    """Run the job's code, then its tests; say which of them passed, on the descriptor named.

    The job: {"seconds", "memory_bytes", "code", "tests": […], "word"}. The reply: a plus sign once
    it is locked up, then the word and a JSON list of truth values; without the sign, a reason why
    nothing could be run.
    """
    job: dict[str, Any] = json.load(sys.stdin)
    say, write, dumps = int(sys.argv[1]), os.write, json.dumps
    try:
        lock(seconds=job["seconds"], memory_bytes=job["memory_bytes"])
    except (Unavailable, OSError, ValueError) as error:
        write(say, str(error).encode())
        return
    write(say, b"+")
    passed: list[bool] = []
    names: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(job["code"], "solution.py", "exec"), names)
        for test in job["tests"]:
            try:
                exec(compile(test, "test.py", "exec"), names)
                passed.append(True)
            except Exception:
                passed.append(False)
    except BaseException:  # an exit, or memory that ran out: what is left has failed
        pass
    passed += [False] * (len(job["tests"]) - len(passed))
    write(say, (job["word"] + dumps(passed)).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
