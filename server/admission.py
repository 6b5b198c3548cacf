"""How much may run at once: a bound on requests, and slots for candidates, shared fairly."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Generator, Sequence
from contextlib import aclosing, contextmanager, nullcontext, suppress
from heapq import heappop, heappush
from time import monotonic

from server import metrics
from server.keys.accounts import Tab
from strategies.core.engine import Engine
from strategies.core.errors import Busy
from strategies.core.types import Chunk, Generation, Labels, Turn


class Place:
    """Where a request stands in the queue; the prompts of a batch stand in one."""

    def __init__(self, tab: Tab | None = None) -> None:
        self._tab = tab
        self.tag = 0.0
        """Of the candidate that it asked for last."""

    @property
    def step(self) -> int:
        """From one candidate's tag to the next: requests of one key share what a key gets."""
        return 1 if self._tab is None else self._tab.rivals


class Admission:
    """Changes only between awaits, so it needs no lock."""

    def __init__(self, *, requests: int, candidates: int) -> None:
        self.slots = candidates
        """Candidates that may run at once."""
        self._most = requests
        self._gate = Gate(candidates)
        self._typical = 1.0
        """A moving average of what a request takes, in seconds."""
        self.requests = 0
        """Requests that search now, or are about to."""

    @property
    def candidates(self) -> int:
        """Candidates that run now."""
        return self._gate.running

    def check(self) -> None:
        """Refuse one more request while too many are under way.

        Raises:
            Busy: It may come again after the seconds given.
        """
        if self.requests >= self._most:
            raise Busy(
                f"{self._most} requests with a strategy are under way already; try again later",
                seconds=round(min(60.0, max(1.0, self._typical))),
                scarce="requests",
            )

    @contextmanager
    def enter(self, tab: Tab | None = None) -> Generator[Place]:
        """Count a request while the block lasts."""
        self.requests += 1
        began, place = monotonic(), Place(tab)
        try:
            with metrics.RUNNING.track_inprogress():
                yield place
        finally:
            self.requests -= 1
            if place.tag:  # else it was refused before it searched
                self._typical += 0.1 * (monotonic() - began - self._typical)

    @contextmanager
    def admit(
        self, engine: Engine, place: Place | None = None, tab: Tab | None = None
    ) -> Generator[Engine]:
        """The engine as one request may use it: each of its sequences waits for a slot.

        With the `place` of a request that is counted already, it stands there.
        """
        if place is not None:
            yield Admitted(engine, self._gate, place)
            return
        with self.enter(tab) as place:
            yield Admitted(engine, self._gate, place)


class Gate:
    """A number of slots, given in turn: self-clocked fair queueing (Golestani 1994).

    The k-th candidate of a request that came when the clock stood at t has the tag t + k; the
    lowest tag goes first and sets the clock. So a short request overtakes the tail of a long one,
    and newcomers without end put the clock forward, which brings that tail its turn. Where a key
    has m requests under way, the tags of each are m apart: it gets no more than one that has one.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._waiting: list[tuple[float, int, asyncio.Future[bool]]] = []
        self._clock = 0.0
        self._asked = 0
        self.running = 0

    def ask(self, last: float, step: int = 1) -> tuple[float, asyncio.Future[bool]]:
        """Ask for a slot `step` after the request's `last` tag.

        Gives the new tag, and a future that is true once the slot is there; resolve it with false
        to leave the queue.
        """
        tag = max(self._clock, last) + step
        given: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked += 1
        heappush(self._waiting, (tag, self._asked, given))
        self._serve()
        return tag, given

    def leave(self) -> None:
        """Give a slot back."""
        self.running -= 1
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self.running < self._slots:
            tag, _, given = heappop(self._waiting)
            if not given.done():
                self._clock = tag
                self.running += 1
                given.set_result(True)


class Admitted:
    """An `Engine` behind the gate, for one request."""

    def __init__(self, engine: Engine, gate: Gate, place: Place) -> None:
        self._engine = engine
        self._gate = gate
        self._place = place
        self._asking: dict[int, asyncio.Future[bool]] = {}
        self._ended: set[int] = set()
        self._begun = False
        """Whether a candidate was asked for."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`; the wait for a slot comes first."""
        index = generation.index
        if index in self._ended:
            yield Chunk(finish_reason="abort")
            return
        if generation.apart:  # a verifier's few tokens are what candidates wait for
            async with aclosing(self._engine.generate(generation)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        self._place.tag, given = self._gate.ask(self._place.tag, self._place.step)
        self._asking[index] = given
        first = nullcontext() if self._begun else metrics.UNBEGUN.track_inprogress()
        self._begun = True
        try:
            with metrics.WAITING.track_inprogress(), first:
                admitted = await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled() and given.result():
                self._gate.leave()  # it was given in the very moment of the cancellation
            raise
        finally:
            del self._asking[index]
        if not admitted:
            yield Chunk(finish_reason="abort")
            return
        sequence = self._engine.generate(generation)
        try:
            with metrics.CANDIDATES.track_inprogress():
                async for chunk in sequence:
                    yield chunk
        finally:
            try:
                await sequence.aclose()
            finally:
                self._gate.leave()

    @property
    def longest(self) -> int:
        """See `Engine.longest`."""
        return self._engine.longest

    @property
    def ends(self) -> Sequence[int]:
        """See `Engine.ends`."""
        return self._engine.ends

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """See `Engine.render`."""
        return await self._engine.render(turns)

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await self._engine.encode(text)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        return await self._engine.decode(token_ids)

    def labels(self, adapter: str) -> Labels:
        """See `Engine.labels`."""
        return self._engine.labels(adapter)

    async def tokens_with(self, text: str) -> Collection[int]:
        """See `Engine.tokens_with`."""
        return await self._engine.tokens_with(text)

    async def abort(self, indices: Collection[int]) -> None:
        """See `Engine.abort`."""
        self._ended |= set(indices)
        for index in indices:
            with suppress(KeyError, asyncio.InvalidStateError):
                self._asking[index].set_result(False)
        await self._engine.abort(indices)
