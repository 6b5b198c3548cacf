"""A fleet's adapters: names become versions here, so that no request mixes two of them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from server.adapters.names import Watched
from server.adapters.registry import Registry
from server.gateway.fleet import Fleet
from strategies.core.errors import NotFound


class FleetNames:
    """`Names` by a registry that the upstreams share; they load versions as they are asked for."""

    def __init__(self, fleet: Fleet, registry: Registry) -> None:
        self._fleet = fleet
        self._registry = registry
        self._watched = Watched(registry)

    @property
    def most(self) -> int:
        """What the upstreams' engines hold is theirs to say."""
        return 1 << 30

    @property
    def names(self) -> set[str]:
        """What requests may name, as of the last look."""
        return {*self._watched.aliases, *self._watched.versions}

    async def look(self, *, at_once: bool = False) -> None:
        """See `Names.look`."""
        await self._watched.look(at_once=at_once)

    def meant(self, name: str) -> str | None:
        """See `Names.meant`."""
        return self._watched.meant(name)

    @asynccontextmanager
    async def held(self, version: str) -> AsyncGenerator[None]:
        """See `Names.held`; it has only to be there."""
        if version not in self._watched.versions:
            raise NotFound(f"there is no adapter '{version}'")
        yield

    def folder(self, version: str) -> Path:
        """Where a version's files are.

        Raises:
            NotFound: It is no longer there.
        """
        return self._registry.version(version).folder
