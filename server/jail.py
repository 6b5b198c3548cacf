"""Runs one untrusted Python program: `python -I -S jail.py`, the job as JSON on its standard input.

It first takes from itself whatever the program must not have, for good: the file system but for
Python's own files (to read) and its working directory (Landlock), every socket, new process,
foreign process and way around (seccomp), and all but a little processor time and memory (limits).
Linux 5.13 on x86-64 or arm64 is needed; without, it refuses to run anything. A program that attacks
its own tests from inside the interpreter can still make them pass.
"""

import ctypes
import json
import os
import platform
import resource
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
_FILE_ACCESS = _READ_FILE | 1 << 1 | 1 << 14
"""Read, write and truncate: what a rule on a file, rather than a folder, may say."""
_ACCESS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15}
"""By Landlock's version, the first bit beyond the accesses that it knows; 3 stands for later."""

_DENIED = {
    "x86_64": {
        **dict.fromkeys((41, 42, 43, 44, 46, 49, 50, 53, 288, 307), 1),  # sockets
        **dict.fromkeys((57, 58, 59, 322), 1),  # fork, vfork, execve, execveat
        **dict.fromkeys((62, 200, 234, 129, 297, 424, 434), 1),  # signals
        **dict.fromkeys((101, 310, 311, 438, 312), 1),  # other processes
        **dict.fromkeys((160, 302), 1),  # limits
        **dict.fromkeys((155, 161, 165, 166, 272, 308, 321, 425, 426, 427, 428, 429), 1),
        435: 38,  # clone3 is said not to exist: libc then uses clone, whose flags can be seen
    },
    "aarch64": {
        **dict.fromkeys((198, 199, 200, 201, 202, 203, 206, 211, 242, 269), 1),
        **dict.fromkeys((221, 281), 1),
        **dict.fromkeys((129, 130, 131, 138, 240, 424, 434), 1),
        **dict.fromkeys((117, 270, 271, 438, 272), 1),
        **dict.fromkeys((164, 261), 1),
        **dict.fromkeys((39, 40, 41, 51, 97, 268, 280, 425, 426, 427, 428, 429), 1),
        435: 38,
    },
}
"""System calls that fail, with the error that they give: EPERM, or ENOSYS."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_THREAD = 0x10000


class Unavailable(Exception):
    """This machine cannot lock a program up."""


def lock(*, folder: Path, seconds: int, memory_bytes: int) -> None:
    """Lock this process up.

    Raises:
        Unavailable: A part of the lock does not hold here.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _DENIED:
        raise Unavailable("code runs on Linux only, on x86-64 or arm64")
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Unavailable("new privileges cannot be given up")
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    paths |= {
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
        sys.base_prefix + "/lib",
    }
    _landlock(libc, read=[path for path in paths if Path(path).is_dir()], write=folder)
    _seccomp(libc, machine)


def _landlock(libc: ctypes.CDLL, *, read: Iterable[str], write: Path) -> None:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise Unavailable("the kernel has no Landlock (Linux 5.13 and later)")
    handled = _ACCESS[min(version, 3)] - 1
    ruleset = struct.pack("=Q", handled)
    rules = libc.syscall(_CREATE_RULESET, ruleset, len(ruleset), 0)
    if rules < 0:
        raise Unavailable("Landlock refuses a set of rules")
    for path, access in [*((one, _READ_FILE | _READ_DIR) for one in read), (write, handled)]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & handled, place)
        if libc.syscall(_ADD_RULE, rules, _BENEATH, rule, 0):
            raise Unavailable(f"Landlock refuses a rule: {os.strerror(ctypes.get_errno())}")
        os.close(place)
    if libc.syscall(_RESTRICT_SELF, rules, 0):
        raise Unavailable("Landlock does not lock")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL, machine: str) -> None:
    """A filter on system calls: statements (code, jump if true, jump if false, operand)."""
    load, equal, at_least, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, _ARCHITECTURE[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # another numbering of the same calls
        (give, 0, 0, kill),
    ]
    for call, code in _DENIED[machine].items():
        program += [(equal, 0, 1, call), (give, 0, 0, error | code)]
    program += [
        (equal, 0, 3, _CLONE[machine]),
        (load, 0, 0, 16),  # its flags
        (masked, 1, 0, _THREAD),
        (give, 0, 0, error | 1),
        (give, 0, 0, allow),
    ]
    raw = b"".join(struct.pack("=HBBI", *statement) for statement in program)
    held = ctypes.create_string_buffer(raw)
    header = struct.pack("=H6xQ", len(program), ctypes.addressof(held))
    if libc.prctl(_SET_SECCOMP, _FILTER, header, 0, 0):
        raise Unavailable("seccomp does not lock")


def main() -> None:
    """Run the job's code, then its tests; say which of them passed, on the descriptor named.

    The job: {"folder", "seconds", "memory_bytes", "code", "tests": […], "word"}. The reply: the
    word, and a JSON list of truth values; without the word, a reason why nothing could be run.
    """
    job: dict[str, Any] = json.load(sys.stdin)
    say, write, dumps = int(sys.argv[1]), os.write, json.dumps
    try:
        lock(folder=Path(job["folder"]), seconds=job["seconds"], memory_bytes=job["memory_bytes"])
    except (Unavailable, OSError) as error:
        write(say, str(error).encode())
        return
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
    os._exit(0)  # whatever the program has left running ends here


if __name__ == "__main__":
    main()
