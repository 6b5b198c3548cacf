"""Server-sent events of our own routes: heartbeats in silence, and an end with the client."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import reply_to, shape
from server.wire import JSON
from strategies.core.aio import Background
from strategies.core.errors import MullError

_log = logging.getLogger(__name__)

HEARTBEAT = b": mull\n\n"
"""A comment: it keeps the connection open, and clients skip it."""


def event(name: str, data: JSON) -> bytes:
    """One named event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def failed(error: Exception) -> bytes:
    """What ends a stream of named events."""
    return event("error", shape(error))


class Refused(Exception):
    """A source that ends with a whole reply instead of events."""

    def __init__(self, reply: Response) -> None:
        super().__init__()
        self.reply = reply


class EventStream(Response):
    """Sends events as they come; closes their source when the client leaves.

    What goes wrong before the first event is an ordinary reply with its status; after it, an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        *,
        heartbeat_seconds: float,
        failure: Callable[[Exception], bytes] = failed,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._source = source
        self._heartbeat_seconds = heartbeat_seconds
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        heard: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        started = False
        async with Background(self._pump(heard)), Background(gone(receive)) as leaving:
            leaving.add_done_callback(lambda _: heard.put_nowait(None))
            while not leaving.done():
                try:
                    piece = await asyncio.wait_for(heard.get(), self._heartbeat_seconds)
                except TimeoutError:
                    piece = HEARTBEAT
                if isinstance(piece, Exception):
                    if not started:
                        reply = piece.reply if isinstance(piece, Refused) else reply_to(piece)
                        await reply(scope, receive, send)
                        return
                    piece = self._failure(piece)
                if not started:
                    started = True
                    headers = self.raw_headers
                    start = {"type": "http.response.start", "status": 200, "headers": headers}
                    await send(start)
                if piece is None:
                    await send({"type": "http.response.body", "body": b""})
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _pump(self, heard: asyncio.Queue[bytes | Exception | None]) -> None:
        try:
            async with aclosing(self._source) as pieces:
                async for piece in pieces:
                    heard.put_nowait(piece)
        except Exception as error:
            if not isinstance(error, MullError | Refused):
                _log.exception("a stream of events failed")
            heard.put_nowait(error)
        heard.put_nowait(None)


async def gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
