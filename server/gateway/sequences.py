"""The streams of one run: side by side on one upstream, ended one by one, with nothing lost."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import httpx

from server import metrics
from server.gateway.fleet import Fleet, Lost, Upstream, refused
from server.tracing import TRACEPARENT, below, call
from server.wire import JSON, as_list, as_object
from strategies.core.aio import Background
from strategies.core.errors import EngineUnavailable, MullError
from strategies.core.types import Chunk

_RARELY: JSON = {"stream_interval": 256}
"""Tokens in a piece of a sequence whose pieces nobody reads: many, so that they cost nothing, but
not all, or a slow model would be taken for a silent one. The first comes at once all the same."""

_AGAIN_SECONDS = 0.1
"""After which an upstream is told again to end a sequence: it may not have begun it before."""

_TIMES = 8
"""That it is told; then the stream is closed."""

Told = AsyncGenerator[JSON | None, None]
"""The events of a reply, as they come; None where it was broken off because of `abort`."""


class _Mark(Enum):
    """Put behind what was received of a sequence."""

    ENDING = auto()
    """The upstream was told to end it, and says what it had generated."""
    CLOSE = auto()
    """No more of it is to be read."""


_Piece = bytes | MullError | _Mark | None
"""Bytes of a reply, what went wrong with it, a mark, or its end."""


@dataclass(slots=True)
class _Running:
    """A sequence under way."""

    name: str
    upstream: Upstream
    heard: asyncio.Queue[_Piece]
    told: int = 0
    """How often the upstream was told to end it."""
    again: float | None = None
    """When it is to be told again."""


class Sequences:
    """Siblings stay together while their upstream is well; then all go to another."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        path: str,
        model: str,
        key: str | None,
        headers: Mapping[str, str],
        name: str,
    ) -> None:
        """`key` is what the run belongs to, and `name` is unique to it."""
        self._fleet = fleet
        self._path = path
        self._model = model
        self._key = key
        self._headers = headers
        self._name = name
        self._home: Upstream | None = None
        self._ended: set[int] = set()
        self._running: dict[int, _Running] = {}

    async def run(
        self,
        index: int,
        body: JSON,
        read: Callable[[Told], AsyncGenerator[Chunk, None]],
        *,
        pieces: bool,
    ) -> AsyncGenerator[Chunk, None]:
        """One sequence, as `read` makes chunks of a reply's events.

        What has generated nothing yet goes to another upstream. Without `pieces` it may come whole.

        Raises:
            MullError: An upstream refuses it, or none gives all of it.
        """
        tried: list[Upstream] = []
        while index not in self._ended:
            upstream = self._place(tried)
            metrics.RETRIED.inc(bool(tried))
            tried.append(upstream)
            begun = False
            try:
                told = self._told(upstream, body, index, pieces=pieces)
                chunks = read(told)
                async with aclosing(told), aclosing(chunks):
                    async for chunk in chunks:
                        begun = begun or bool(chunk.token_ids or chunk.text)
                        yield chunk
                return
            except Lost:
                if begun or len(tried) > self._fleet.terms.retries:
                    raise
        yield Chunk(finish_reason="abort")

    def _place(self, tried: Sequence[Upstream]) -> Upstream:
        """Where a sequence is to run: with its siblings, or where they all go from now on."""
        if self._home is None or self._home in tried or self._home.breaker.open:
            place = self._fleet.place
            found = place(self._key, self._model, but=tried) or place(self._key, self._model)
            if found is None:
                raise EngineUnavailable("no upstream is well; try again")
            self._home = found
        return self._home

    async def _told(self, upstream: Upstream, body: JSON, index: int, *, pieces: bool) -> Told:
        """The events of a reply."""
        if not pieces and _aborts(upstream):
            body = _RARELY | body
        name = call(self._name, index)
        headers = {**self._headers, "X-Request-Id": name}
        if self._fleet.terms.traced and TRACEPARENT in headers:
            headers |= below(headers[TRACEPARENT], name)
        request = upstream.client.build_request("POST", self._path, json=body, headers=headers)
        heard: asyncio.Queue[_Piece] = asyncio.Queue()
        running = self._running[index] = _Running(name, upstream, heard)
        try:
            async with Background(_pump(upstream, request, heard)):
                lines = b""
                while (piece := await self._next(running)) is not None:
                    if isinstance(piece, MullError):
                        raise piece
                    if isinstance(piece, _Mark):
                        yield None
                        return
                    *whole, lines = (lines + piece).split(b"\n")
                    for line in whole:
                        if (event := _event(line)) is not None:
                            yield event
        finally:
            if self._running.get(index) is running:
                del self._running[index]

    async def _next(self, running: _Running) -> _Piece:
        """What came next; the upstream is told again to end what should have ended by now."""
        while True:
            try:
                async with asyncio.timeout_at(running.again):
                    piece = await running.heard.get()
            except TimeoutError:
                if running.told == _TIMES or not await self._end(running.upstream, [running.name]):
                    return _Mark.CLOSE
                piece = _Mark.ENDING
            if piece is not _Mark.ENDING:
                return piece
            running.told += 1
            running.again = asyncio.get_running_loop().time() + _AGAIN_SECONDS

    async def _end(self, upstream: Upstream, names: Sequence[str]) -> bool:
        """Tell an upstream to end sequences; say whether it could."""
        try:
            return await self._fleet.abort(
                upstream, [f"cmpl-{name}-0" for name in names], self._headers
            )
        except MullError:
            return False

    async def abort(self, indices: Collection[int]) -> None:
        """See `Engine.abort`.

        Where an upstream has a route for it, it says with its last piece all that it generated.
        Elsewhere the stream is closed behind what has arrived, and what was generated since is
        not known here.
        """
        self._ended |= set(indices)
        asked: dict[Upstream, list[_Running]] = {}
        for one in [self._running[index] for index in indices if index in self._running]:
            if _aborts(one.upstream):
                asked.setdefault(one.upstream, []).append(one)
            else:
                one.heard.put_nowait(_Mark.CLOSE)
        for upstream, those in asked.items():
            heard = await self._end(upstream, [one.name for one in those])
            for one in those:
                one.heard.put_nowait(_Mark.ENDING if heard else _Mark.CLOSE)


def _aborts(upstream: Upstream) -> bool:
    return upstream.features is not None and upstream.features.aborts


async def _pump(upstream: Upstream, request: httpx.Request, heard: asyncio.Queue[_Piece]) -> None:
    """Put on the queue what comes, so that an abort loses nothing that has come."""
    try:
        async with upstream.asked(request) as reply:
            if reply.status_code != 200:
                raise refused(reply.status_code, await reply.aread(), reply.headers)
            async for piece in reply.aiter_raw():
                heard.put_nowait(piece)
    except MullError as error:
        heard.put_nowait(error)
    finally:
        heard.put_nowait(None)


def _event(line: bytes) -> JSON | None:
    """What one line of a stream says; None if it says nothing."""
    if not line.startswith(b"data:") or (said := line[5:].strip()) == b"[DONE]":
        return None
    try:
        found = as_object(json.loads(said))
    except (ValueError, RecursionError):
        found = None
    if found is None:
        raise Lost("an upstream's stream is not to be read; try again")
    return found


def failure(event: JSON) -> MullError:
    """An error in the midst of a stream."""
    error = as_object(event["error"]) or {}
    code: Any = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return refused(status, json.dumps(event).encode(), {})


def choices(event: JSON) -> list[JSON]:
    """What an event adds to a sequence.

    Raises:
        EngineUnavailable: It cannot be read.
    """
    found = event.get("choices")
    several = [] if found is None else as_list(found)
    read = None if several is None else [as_object(one) for one in several]
    if read is None or None in read:
        raise EngineUnavailable("an upstream's stream is no stream of a completion")
    return [one for one in read if one is not None]


def cached_tokens(event: JSON) -> int:
    """Of the prompt, as far as an event says."""
    usage = as_object(event.get("usage")) or {}
    details = as_object(usage.get("prompt_tokens_details")) or {}
    cached = details.get("cached_tokens")
    return cached if type(cached) is int and cached > 0 else 0
