"""Which versions the engine holds: loaded when first needed, dropped when idle and others wait."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server import metrics
from server.adapters.registry import Version
from strategies.core.errors import Busy


@dataclass(slots=True)
class _Slot:
    users: int = 0
    retired: bool = False
    """Whether it goes as soon as nobody uses it."""


class Residents:
    """At most so many versions in the engine; those in use and pinned stay, then the last used.

    `load` and `unload` are told versions, one at a time. A version that is loaded again after it
    was unloaded is another adapter to the engine.
    """

    def __init__(
        self,
        load: Callable[[Version], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        *,
        most: int,
        patience_seconds: float = 10.0,
    ) -> None:
        """`patience_seconds` is how long a load waits until one of those in use is free."""
        self._load = load
        self._unload = unload
        self.most = most
        self._patience_seconds = patience_seconds
        self._freed = asyncio.Event()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        """By version, the last used at the end."""
        self._meant: frozenset[str] = frozenset()
        self._pinned: frozenset[str] = frozenset()
        self._changing = asyncio.Lock()
        metrics.RESIDENT.set(0)  # there may have been another engine

    def __contains__(self, id: str) -> bool:
        return id in self._slots

    @property
    def in_use(self) -> dict[str, int]:
        """By version, how many use it."""
        return {id: slot.users for id, slot in self._slots.items() if slot.users}

    @asynccontextmanager
    async def hold(self, version: Version) -> AsyncGenerator[None]:
        """Have a version in the engine while the block lasts.

        Raises:
            Busy: As many others were in use, all the time, as there may be.
        """
        if version.id not in self._slots:
            deadline = asyncio.get_running_loop().time() + self._patience_seconds
            await self._turn(deadline)
            try:
                if version.id not in self._slots:
                    await self._make_room(deadline)
                    with metrics.LOADING.time(), metrics.LOAD_FAILED.count_exceptions():
                        await self._load(version)
                    self._slots[version.id] = _Slot()
                    metrics.RESIDENT.set(len(self._slots))
                slot = self._take(version.id)
            finally:
                self._changing.release()
        else:
            slot = self._take(version.id)
        try:
            yield
        finally:
            slot.users -= 1
            if not slot.users:
                self._freed.set()

    def _take(self, id: str) -> _Slot:
        """Without awaiting, so that it cannot go between."""
        slot = self._slots[id]
        slot.users += 1
        self._slots.move_to_end(id)
        return slot

    def mean(
        self, ids: Collection[str], existing: Collection[str], pinned: Collection[str] = ()
    ) -> None:
        """The versions that names mean now, of those that exist.

        What names meant until now goes once drained, and so does what was deleted. What is pinned
        does not make room for others.
        """
        for id, slot in self._slots.items():
            dropped = slot.retired or id in self._meant or id not in existing
            slot.retired = id not in ids and dropped
        self._meant, self._pinned = frozenset(ids), frozenset(pinned)
        self._freed.set()

    async def sweep(self) -> None:
        """Drop what is retired and idle; never waits for others' changes."""
        if self._changing.locked() or not self._idle():
            return
        async with self._changing:
            for id in self._idle():
                await self._drop(id)

    def _idle(self) -> list[str]:
        return [id for id, slot in self._slots.items() if slot.retired and not slot.users]

    @asynccontextmanager
    async def without(self, id: str) -> AsyncGenerator[None]:
        """Have a version out of the engine, and kept out, while the block lasts.

        Raises:
            Busy: It is in use.
        """
        async with self._changing:
            slot = self._slots.get(id)
            if slot is not None and slot.users:
                users = f"'{id}' is in use by {slot.users} requests"
                raise Busy(users, seconds=1, scarce="adapters")
            if slot is not None:
                await self._drop(id)
            yield

    def _least_recent(self) -> str | None:
        """Who makes room: nobody in use, and none that is pinned unless pins have left no room."""
        idle = [id for id, slot in self._slots.items() if not slot.users]
        free = [id for id in idle if self._slots[id].retired or id not in self._pinned]
        if not free and len(self._pinned) >= self.most:  # by another server, or by a larger one
            free = idle
        return next(iter(free), None)

    async def _turn(self, deadline: float) -> None:
        """Wait for one's turn to change what the engine holds."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._changing.acquire()
        except TimeoutError:
            raise self._busy() from None

    def _busy(self) -> Busy:
        return Busy(
            f"{self.most} adapters are in use or pinned, and the engine holds no more "
            "(--max-cpu-loras)",
            seconds=1,
            scarce="adapters",
        )

    async def _make_room(self, deadline: float) -> None:
        while len(self._slots) >= self.most:
            idle = self._least_recent()
            if idle is not None:
                await self._drop(idle)
                continue
            self._freed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._freed.wait()
            except TimeoutError:
                raise self._busy() from None

    async def _drop(self, id: str) -> None:
        if not self._slots[id].users:
            del self._slots[id]  # first, so that nobody takes it while it goes
            metrics.RESIDENT.set(len(self._slots))
            await self._unload(id)
