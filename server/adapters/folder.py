"""Adapters' files, taken in from folders that somebody else wrote. Knows nothing of tensors."""

import os
import stat
from hashlib import sha256
from pathlib import Path

from server.adapters.manifest import MANIFEST
from strategies.core.errors import InvalidRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_SMALL = dict.fromkeys((CONFIG, MANIFEST, "README.md"), 1 << 20)
"""What is read besides the weights, and how many bytes at most."""


def inside(root: Path | None, path: str) -> Path:
    """A folder that a client names, if it lies in the directory that the operator allows.

    Raises:
        InvalidRequest: It does not, or there is none.
    """
    if root is None:
        raise InvalidRequest(
            "this server takes in no folders: its operator sets MULL_ADAPTER_IMPORTS to the "
            "directory that they may come from",
            field="path",
        )
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, ValueError):
        found = None
    if found is None or not found.is_relative_to(root.resolve()) or not found.is_dir():
        # One message for all: it does not tell what there is elsewhere.
        raise InvalidRequest("there is no such folder where adapters may come from", field="path")
    return found


def take_in(folder: Path, root: Path, into: Path, *, most_bytes: int) -> str:
    """Copy an adapter's own files to an empty folder; return the SHA-256 of them all.

    Only regular files that lie in `root` are read, through whatever links, and only those by these
    names; the weights have `most_bytes` at most.

    Raises:
        InvalidRequest: One is missing, unreadable, a link out of `root`, or too large.
    """
    digest = sha256()
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # the same one, also if it is replaced
    try:
        for name, most in (*_SMALL.items(), (WEIGHTS, most_bytes)):
            try:
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=held)
            except FileNotFoundError:
                if name in (CONFIG, WEIGHTS):
                    raise InvalidRequest(_missing(folder, name), field="path") from None
                continue
            except OSError as error:
                raise InvalidRequest(
                    f"{name} cannot be read: {error.strerror}", field="path"
                ) from None
            try:
                digest.update(f"{name}\n".encode() + _copy(file, name, root, into, most))
            finally:
                os.close(file)
    finally:
        os.close(held)
    return digest.hexdigest()


def _copy(file: int, name: str, root: Path, into: Path, most: int) -> bytes:
    """Copy an open file, and return the digest of what was copied."""
    opened = Path(f"/proc/self/fd/{file}").resolve()  # whatever the name means by now
    if not opened.is_relative_to(root.resolve()):
        raise InvalidRequest(
            f"{name} is a link out of the directory that adapters may come from", field="path"
        )
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise InvalidRequest(f"{name} is no regular file", field="path")
    digest = sha256()
    with (into / name).open("xb") as copy:
        while piece := os.read(file, 1 << 20):
            if copy.tell() + len(piece) > most:
                raise InvalidRequest(
                    f"{name} has more than the {most} bytes that are taken in", field="path"
                )
            copy.write(piece)
            digest.update(piece)
    return digest.digest()


def _missing(folder: Path, name: str) -> str:
    pickle = next((one for one in _PICKLES if (folder / one).exists()), None)
    if name == WEIGHTS and pickle is not None:
        return (
            f"the weights are a pickle ({pickle}), which is never read: save the adapter as "
            f"{WEIGHTS}, as peft does unless told otherwise"
        )
    return f"the folder has no {name}"
