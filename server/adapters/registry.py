"""Versions of adapters and the names that point at them, in a directory that servers share.

`versions/NAME@DIGEST` is an adapter's folder and never changes; `aliases/ALIAS.json` says which
versions a name means. The directory is the truth: what changes there is served by all servers that
look at it. Knows no engine. Reads and writes files: not for the event loop.
"""

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.adapters.manifest import Manifest, read_manifest
from strategies.core.errors import InvalidRequest, NotFound, StorageFailed

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_DIGITS = 12
"""Of a digest, in a version's name."""
_VERSION = re.compile(f"{NAME}@[0-9a-f]{{{_DIGITS}}}")
_ABANDONED_SECONDS = 86_400
_log = logging.getLogger(__name__)
_KEPT = 100
"""Assignments of an alias that it can be rolled back to."""

Shares = dict[str, float]
"""By version, its share of an alias's requests."""


class Rule(BaseModel):
    """What one measure of an evaluation must show before an alias moves to a version."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    at_least: float | None = Field(default=None, description="No lower than this.")
    lose_at_most: float | None = Field(
        default=None, ge=0, description="No further below what the alias means now."
    )


Gate = Mapping[str, Rule]
"""By measure."""


def check_name(name: str, field: str) -> None:
    """Whether a version or an alias may be called so.

    Raises:
        InvalidRequest: It may not.
    """
    if re.fullmatch(NAME, name) is None:
        raise InvalidRequest(
            "a name has 1 to 64 letters, digits and '._-', and begins with a letter or a digit",
            field=field,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An adapter that never changes."""

    id: str
    """`name@digest`."""
    folder: Path
    manifest: Manifest | None


class Alias(BaseModel):
    """A name, what it means now, and what it meant before."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    history: list[Shares] = Field(min_length=1, max_length=_KEPT)
    """The last is what it means."""
    pinned: bool = False
    """Whether what it means stays in the engine once it is there."""

    @field_validator("history")
    @classmethod
    def _shared_out(cls, history: list[Shares]) -> list[Shares]:
        for shares in history:
            if not all(share > 0 for share in shares.values()) or not (
                abs(sum(shares.values()) - 1) <= 1e-6
            ):
                raise ValueError("shares are above 0 and make 1 together")
        return history

    @property
    def shares(self) -> Shares:
        """What it means now."""
        return self.history[-1]

    def moved(self, shares: Shares, pinned: bool | None) -> Self:
        """The same with another meaning; if it means this already, nothing can be rolled back."""
        history = self.history if shares == self.shares else [*self.history, shares][-_KEPT:]
        return type(self)(
            history=history,
            pinned=self.pinned if pinned is None else pinned,
        )


class Registry:
    """A registry directory. Changes are atomic, also between servers; nothing is remembered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions, self._aliases = root / "versions", root / "aliases"
        for folder in (self._versions, self._aliases):
            folder.mkdir(parents=True, exist_ok=True)
        for left in (
            *root.glob(".incoming-*"),
            *root.glob(".gone-*"),
        ):  # by a server that was killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def incoming(self) -> Generator[Path]:
        """A folder for an adapter that may become a version; gone after the block if it did not.

        Raises:
            StorageFailed: It cannot be written.
        """
        with _written():
            folder = Path(mkdtemp(prefix=".incoming-", dir=self.root))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, name: str, folder: Path, digest: str) -> tuple[Version, bool]:
        """Make a folder of `incoming` a version, and say whether it is a new one.

        The same files under the same name are the same version.

        Raises:
            InvalidRequest: The name cannot be one.
        """
        check_name(name, "name")
        id = f"{name}@{digest[:_DIGITS]}"
        with self._locked():
            new = not (self._versions / id).exists()
            if new:
                folder.chmod(0o755)
                os.rename(folder, self._versions / id)
        return self.version(id), new

    def version(self, id: str) -> Version:
        """A version by its name.

        Raises:
            NotFound: There is none.
        """
        folder = self._folder(id)
        return Version(id=id, folder=folder, manifest=read_manifest(folder))

    def ids(self) -> list[str]:
        """The versions by name, whatever is in them."""
        return sorted(name for name in os.listdir(self._versions) if _VERSION.fullmatch(name))

    def versions(self) -> list[Version]:
        """All whose manifests can be read, by name."""
        found: list[Version] = []
        for id in self.ids():
            try:
                found.append(self.version(id))
            except (InvalidRequest, NotFound) as error:
                _log.warning("passed over: %s", error)
        return found

    def free(self, id: str) -> Path:
        """The folder of a version that no alias means.

        Raises:
            NotFound: There is none.
            InvalidRequest: An alias means it.
        """
        folder = self._folder(id)
        for path in self._aliases.glob("*.json"):
            with suppress(NotFound):  # what is damaged may mean it
                if id in self.alias(path.stem).shares:
                    why = f"alias '{path.stem}' means '{id}': move it first"
                    raise InvalidRequest(why, field="id")
        return folder

    def remove(self, id: str) -> None:
        """Delete a version; see `free`."""
        with self._locked():
            folder = self.free(id)
            gone = Path(mkdtemp(prefix=".gone-", dir=self.root))
            os.rename(folder, gone / "version")
        shutil.rmtree(gone, ignore_errors=True)

    def aliases(self) -> dict[str, Alias]:
        """All that are whole, by name.

        Raises:
            OSError: One cannot be read now.
        """
        found: dict[str, Alias] = {}
        for path in sorted(self._aliases.glob("*.json")):
            try:
                found[path.stem] = self.alias(path.stem)
            except (InvalidRequest, NotFound) as error:
                _log.warning("passed over: %s", error)
        return found

    def alias(self, name: str) -> Alias:
        """An alias by its name.

        Raises:
            NotFound: There is none.
            InvalidRequest: Its file is damaged.
        """
        path = self._file(name)
        try:
            return Alias.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise NotFound(f"there is no alias '{name}'") from None
        except ValidationError as error:
            raise InvalidRequest(f"alias '{name}' is damaged: {error}", field="alias") from error

    def point(self, name: str, shares: Shares, gate: Gate, *, pinned: bool | None = None) -> Alias:
        """Let an alias mean these versions from now on, if they pass the gate.

        Without `pinned` it stays pinned, or not, as it was.

        Raises:
            InvalidRequest: A version does not pass, or the shares are none.
            NotFound: There is no such version.
        """
        check_name(name, "alias")
        with self._locked():
            before: Alias | None = None
            with suppress(NotFound, InvalidRequest):  # what is damaged is written anew
                before = self.alias(name)
            for id in shares:
                self._pass(self.version(id), before, gate)
            try:
                after = (
                    Alias(history=[shares], pinned=bool(pinned))
                    if before is None
                    else before.moved(shares, pinned)
                )
            except ValidationError as error:
                raise InvalidRequest(error.errors()[0]["msg"], field="versions") from None
            self._write(name, after)
        return after

    def roll_back(self, name: str) -> Alias:
        """Let an alias mean what it meant before.

        Raises:
            NotFound: There is none.
            InvalidRequest: It never meant anything else, or that is no longer there.
        """
        with self._locked():
            now = self.alias(name)
            if len(now.history) == 1:
                raise InvalidRequest(f"alias '{name}' never meant anything else", field="alias")
            before = Alias(history=now.history[:-1], pinned=now.pinned)
            for id in before.shares:
                try:
                    self.version(id)
                except NotFound:
                    raise InvalidRequest(
                        f"alias '{name}' meant '{id}', which is no longer there", field="alias"
                    ) from None
            self._write(name, before)
        return before

    def drop(self, name: str) -> None:
        """Forget an alias.

        Raises:
            NotFound: There is none.
        """
        with self._locked():
            try:
                self._file(name).unlink()
            except FileNotFoundError:
                raise NotFound(f"there is no alias '{name}'") from None

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """What is there, in short: another value after every change."""
        found: list[tuple[str, int, int]] = []
        with os.scandir(self._aliases) as aliases, os.scandir(self._versions) as versions:
            for entry in (*aliases, *versions):
                with suppress(FileNotFoundError):  # gone meanwhile
                    at = entry.stat()
                    found.append((entry.path, at.st_ino, at.st_mtime_ns))
        return tuple(sorted(found))

    def _folder(self, id: str) -> Path:
        folder = self._versions / id
        if _VERSION.fullmatch(id) is None or not folder.is_dir():
            raise NotFound(f"there is no adapter '{id[:200]}'")
        return folder

    def _file(self, alias: str) -> Path:
        if re.fullmatch(NAME, alias) is None:
            raise NotFound(f"there is no alias '{alias[:200]}'")
        return self._aliases / f"{alias}.json"

    def _pass(self, version: Version, before: Alias | None, gate: Gate) -> None:
        if before is not None and version.id in before.shares:
            return  # what is served may go on being served
        shown = {} if version.manifest is None else version.manifest.evaluation
        for measure, rule in gate.items():
            worth = shown.get(measure)
            if worth is None:
                raise InvalidRequest(
                    f"'{version.id}' does not pass the gate: its manifest has no '{measure}'",
                    field="versions",
                )
            least = [] if rule.at_least is None else [rule.at_least]
            if rule.lose_at_most is not None and before is not None:
                for id in before.shares:
                    with suppress(NotFound, InvalidRequest):
                        served = self.version(id).manifest
                        if served is not None and measure in served.evaluation:
                            least.append(served.evaluation[measure] - rule.lose_at_most)
            if least and not worth >= max(least):
                raise InvalidRequest(
                    f"'{version.id}' does not pass the gate: its '{measure}' is {worth:g}, and "
                    f"{max(least):g} is the least",
                    field="versions",
                )

    def _write(self, name: str, alias: Alias) -> None:
        path = self._aliases / f"{name}.json"
        draft = self.root / f".{name}.json"  # the lock is held: there is one
        with draft.open("w") as file:
            file.write(alias.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)

    @contextmanager
    def _locked(self) -> Generator[None]:
        """One change at a time, over all servers."""
        with _written(), (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _written() -> Generator[None]:
    """What the disk refuses is told apart from what is wrong with a request."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"the registry cannot be written: {error.strerror}") from error
