"""Requests that are none of ours, byte for byte to an upstream and back, as they come."""

import asyncio
import json
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress

import httpx
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from server import metrics
from server.errors import reply_to
from server.gateway.fleet import SESSION, Fleet, Lost, Upstream
from server.keys.keyring import CREDENTIALS
from server.selection import ENDPOINTS
from server.sse import gone
from server.wire import as_object
from strategies.core.aio import Background
from strategies.core.errors import EngineUnavailable

_OF_THE_LINE = {
    "connection",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Headers that speak of one connection only."""


class Passing:
    """An ASGI app that is an upstream's."""

    def __init__(self, fleet: Fleet, *, most_bytes: int) -> None:
        """Bodies up to `most_bytes` are held until there is a reply, and may be sent again."""
        self._fleet = fleet
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a client that leaves ends it there, too."""
        if scope["type"] != "http":
            return
        held, more = await _held(receive, self._most_bytes)
        if held is None:
            return  # the client left before it had said everything
        if more is not None:  # the line is read by whoever sends the body on
            with suppress(_Left):
                await self._pass(scope, more, send, again=False, model="")
            return
        again = scope["method"] in ("GET", "HEAD") or scope["path"] in ENDPOINTS
        model = _model(held) if len(self._fleet.upstreams) > 1 else ""
        passing = Background(self._pass(scope, held, send, again=again, model=model))
        async with passing as work, Background(gone(receive)) as leaving:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()

    async def _pass(
        self,
        scope: Scope,
        body: bytes | AsyncGenerator[bytes, None],
        send: Send,
        *,
        again: bool,
        model: str,
    ) -> None:
        """Ask one upstream after the other until one has begun to reply.

        What may not be done twice is asked again only where no connection was made.
        """
        key = Headers(scope=scope).get(SESSION)
        tried: list[Upstream] = []
        lost = EngineUnavailable("no upstream is well; try again")
        while len(tried) <= self._fleet.terms.retries:
            upstream = self._fleet.place(key, model, but=tried)
            if upstream is None:
                break
            metrics.RETRIED.inc(bool(tried))
            tried.append(upstream)
            begun = False

            async def begin(message: Message) -> None:
                nonlocal begun
                begun = True
                await send(message)

            try:
                passed = await self._one(upstream, scope, body, begin, tried=tried)
                if passed:
                    return
            except Lost as error:
                lost = error
                never = isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
                late = isinstance(error.__cause__, httpx.TimeoutException)
                if begun:
                    raise
                if not isinstance(body, bytes) or not (never or (again and not late)):
                    break
        await reply_to(lost)(scope, _nothing, send)

    async def _one(
        self,
        upstream: Upstream,
        scope: Scope,
        body: bytes | AsyncGenerator[bytes, None],
        send: Send,
        *,
        tried: Collection[Upstream],
    ) -> bool:
        """Pass a reply back; not if the upstream serves nobody now and another may."""
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        query = scope["query_string"].decode("latin-1")
        request = httpx.Request(
            scope["method"],
            f"{upstream.url}{path}{'?' * bool(query)}{query}",
            headers=self._headers(scope),
            content=body or None,
            extensions={"timeout": upstream.client.timeout.as_dict()},
        )
        async with upstream.asked(request) as reply:
            if reply.status_code == 503 and isinstance(body, bytes):
                other = self._fleet.place(None, "", but=tried)
                if other is not None and len(tried) <= self._fleet.terms.retries:
                    return False
            headers = [
                (name.lower(), value)
                for name, value in reply.headers.raw
                if name.lower().decode("latin-1") not in _OF_THE_LINE
            ]
            status = reply.status_code
            metrics.PASSED.labels(f"{status // 100}xx").inc()
            await send({"type": "http.response.start", "status": status, "headers": headers})
            async for piece in reply.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        return True

    def _headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        key, dropped = self._fleet.terms.key, _OF_THE_LINE
        if self._fleet.terms.keyed:
            dropped = dropped | set(CREDENTIALS)
        elif key is not None:
            dropped = dropped | {"authorization"}
        found = [
            (name, value.strip())
            for name, value in scope["headers"]
            if name.decode("latin-1").lower() not in dropped
        ]
        if key is not None:
            found.append((b"authorization", f"Bearer {key.get_secret_value()}".encode()))
        return found


class _Left(Exception):
    """The client has left in the midst of its request."""


async def _held(
    receive: Receive, most: int
) -> tuple[bytes | None, AsyncGenerator[bytes, None] | None]:
    """A body that is no larger than that; else a generator of it. None: the client has left."""
    held = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None, None
        held += message.get("body", b"")
        if not message.get("more_body", False):
            return held, None
        if len(held) > most:
            return held, _all(held, receive)


async def _all(held: bytes, receive: Receive) -> AsyncGenerator[bytes, None]:
    yield held
    while (message := await receive())["type"] != "http.disconnect":
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
    raise _Left


def _model(body: bytes) -> str:
    """The model that a body names; empty if it names none."""
    try:
        said = as_object(json.loads(body)) or {}
    except (ValueError, RecursionError):
        return ""
    return str(said.get("model") or "")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
