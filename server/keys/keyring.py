"""Who may ask: keys by their digests, in a file that is read again when it has changed."""

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fcntl import LOCK_EX, flock
from hashlib import sha256
from hmac import compare_digest
from math import inf
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from strategies.core.errors import Forbidden, Unauthorized

Scope = Literal["client", "admin"]

CREDENTIALS = ("authorization", "x-api-key", "x-mull-admin-key")
"""The headers in which keys come."""

_STALE_SECONDS = 0.5
"""How long a key may go on meaning what it meant, after the file was changed."""

_log = logging.getLogger(__name__)


class Key(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$",
        description="Whose it is. Keys of one name share its budgets, so that they can be rotated.",
    )
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key.")
    scopes: tuple[Scope, ...] = Field(default=("client",), min_length=1)
    expires: AwareDatetime | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Generated ones.")
    concurrent: int | None = Field(default=None, ge=1, description="Requests at once.")

    @property
    def id(self) -> str:
        """Enough of the digest to tell it from the others of its name."""
        return self.digest[:8]

    @property
    def limited(self) -> bool:
        """Whether somebody has to count what it uses."""
        counted = (self.requests_per_minute, self.tokens_per_minute, self.concurrent)
        return any(one is not None for one in counted)

    @property
    def over(self) -> bool:
        """Whether it has expired."""
        return self.expires is not None and self.expires <= datetime.now(UTC)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()


def make() -> str:
    """A new key."""
    return f"mull-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """What is kept of a key.

    It is 256 random bits, which nobody can guess: a slow hash would add nothing to that, and every
    request would pay for it.
    """
    return sha256(key.encode()).hexdigest()


def read(file: Path) -> tuple[Key, ...]:
    """The keys in a file.

    Raises:
        ValueError: It cannot be read. The message holds nothing of what stands in it.
    """
    try:
        return _File.model_validate_json(file.read_bytes()).keys
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} holds no keys: {place}: {first['msg']}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


@contextmanager
def changing(file: Path) -> Generator[list[Key]]:
    """The keys in a file, to be changed while nobody else does; readers see all of it or nothing.

    Raises:
        ValueError: See `read`; a file that is not there yet has no keys.
    """
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        flock(folder, LOCK_EX)
        keys = list(read(file)) if file.exists() else []
        yield keys
        text = json.dumps({"keys": [one.model_dump(mode="json") for one in keys]}, indent=1)
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        fresh.touch(0o600)
        fresh.write_text(f"{text}\n")
        if file.exists():
            fresh.chmod(file.stat().st_mode)  # the server may be another user
        fresh.replace(file)
    finally:
        os.close(folder)


class Keyring:
    """The keys of a server. Whoever needs them looks; nothing runs in between."""

    def __init__(
        self,
        file: Path | None,
        *,
        admin: SecretStr | None = None,
        clients: Sequence[SecretStr] = (),
        limits: bool = True,
    ) -> None:
        """`admin` and `clients` are keys that are given in words, beside those of the file.

        Without `limits`, keys that have any are unknown.
        """
        given: list[tuple[SecretStr, Scope]] = [(key, "client") for key in clients]
        if admin is not None:
            given.append((admin, "admin"))
        self._given = tuple(
            Key(name=f"given-{scope}", digest=digest(key.get_secret_value()), scopes=(scope,))
            for key, scope in given
        )
        self._file, self._limits = file, limits
        self._stamp: object = None
        self._looked = -inf
        self._known = self._given

    @property
    def demanded(self) -> bool:
        """Whether every request needs a key."""
        return self._file is not None

    @property
    def administered(self) -> bool:
        """Whether there is a key for what is the operator's alone."""
        return any("admin" in one.scopes for one in self._known)

    async def look(self) -> None:
        """See whether the file has changed, if that was not seen lately.

        While it cannot be read, keys are what they were.
        """
        if self._file is None or time.monotonic() - self._looked < _STALE_SECONDS:
            return
        first, self._looked = self._looked == -inf, time.monotonic()
        if first:
            self._read(self._file)  # whoever comes beside the first would find no keys
        else:
            await asyncio.to_thread(self._read, self._file)

    def admit(self, headers: Mapping[str, str], scope: Scope) -> Key:
        """The key that a request came with.

        Raises:
            Unauthorized: It has none, or one that is unknown or over.
            Forbidden: It is not for this.
        """
        said = presented(headers)
        met, found = digest(said), None
        for key in self._known:  # all of them: how long it takes tells nothing
            if compare_digest(key.digest, met):
                found = key
        if not said or found is None:
            raise Unauthorized(
                "this server needs a key that it knows, as the bearer token or in x-api-key"
            )
        if found.over:
            raise Unauthorized("this key has expired")
        if scope not in found.scopes:
            raise Forbidden(f"this needs a key with the scope '{scope}'")
        return found

    def _read(self, file: Path) -> None:
        try:
            said = file.stat()
            stamp = (said.st_ino, said.st_mtime_ns, said.st_size)
        except OSError:
            stamp = ()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            found = read(file)
        except ValueError as error:
            _log.error("keys stay what they were: %s", error)
            return
        if not self._limits and any(one.limited for one in found):
            _log.error("keys of %s with limits are refused: they need --api-server-count 1", file)
            found = tuple(one for one in found if not one.limited)
        self._known = (*self._given, *found)


def presented(headers: Mapping[str, str]) -> str:
    """The key in a request's headers; empty if there is none.

    The admin's own header goes first: the bearer token beside it may be for somebody else.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return (
        headers.get("x-mull-admin-key")
        or (bearer.strip() if scheme.lower() == "bearer" else "")
        or headers.get("x-api-key", "")
    )
