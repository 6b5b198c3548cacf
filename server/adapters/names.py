"""What the names of a registry mean, as of a moment ago."""

import asyncio
import logging
import random
import time
from collections.abc import Collection, Mapping
from math import inf

from server import metrics
from server.adapters.registry import Alias, Registry

_STALE_SECONDS = 0.25
"""How long a name may go on meaning what it meant, after another server moved it."""

_log = logging.getLogger(__name__)


class Watched:
    """A registry's aliases and versions. Who needs them looks; nothing runs in between."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._stamp: object = None
        self._looked = -inf
        self._looking = asyncio.Lock()
        self.aliases: Mapping[str, Alias] = {}
        self.versions: Collection[str] = frozenset()

    async def look(self, *, at_once: bool = False) -> bool:
        """See what others have changed, now or where that was not seen lately; say whether it was.

        While the registry cannot be read, names mean what they meant.
        """
        if not at_once and time.monotonic() - self._looked < _STALE_SECONDS:
            return False
        if self._looking.locked() and self._looked > -inf and not at_once:
            return False  # another is at it
        async with self._looking:
            if at_once or time.monotonic() - self._looked >= _STALE_SECONDS:
                try:
                    stamp = await asyncio.to_thread(self._registry.stamp)
                    if stamp != self._stamp:
                        before = self.aliases
                        self.aliases, self.versions = await asyncio.to_thread(self._read)
                        metrics.FLIPS.inc(
                            sum(
                                one.shares != self.aliases[name].shares
                                for name, one in before.items()
                                if name in self.aliases
                            )
                        )
                        self._stamp = stamp
                except OSError:
                    _log.exception("the registry of adapters cannot be read")
                self._looked = time.monotonic()
        return True

    def meant(self, name: str) -> str | None:
        """The version that a name means, drawn by its shares; None for a name that is none."""
        if name in self.aliases:
            shares = self.aliases[name].shares
            return random.choices(list(shares), list(shares.values()))[0]
        return name if name in self.versions else None

    def _read(self) -> tuple[Mapping[str, Alias], Collection[str]]:
        return self._registry.aliases(), frozenset(self._registry.ids())
