"""The thin layer around every generating endpoint: it reads the choice, and completes the reply."""

import json
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import reply_to
from server.reply import exact, mull_field, usage_of
from server.run import Selection
from server.selection import ENDPOINTS, SELECTION, choose
from server.wire import JSON, as_object
from strategies.core.errors import InvalidRequest, MullError


class Choosing:
    """ASGI middleware. A request that names no strategy passes through byte for byte."""

    def __init__(
        self, app: ASGIApp, *, models: Callable[[], Collection[str]], max_body_bytes: int
    ) -> None:
        self._app = app
        self._models = models
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ENDPOINTS:
            await self._app(scope, receive, send)
            return
        try:
            raw = await _body(receive, self._max_body_bytes)
            if raw is None:
                return  # the client left before it had said everything
            body = _object(raw)
            changed, selection = (None, None) if body is None else choose(body, self._models())
        except MullError as error:
            await reply_to(error)(scope, receive, send)
            return
        if selection is None:
            await self._app(scope, _replay(raw, receive), send)
            return
        raw = json.dumps(changed).encode()
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["content-length"] = str(len(raw))
        token = SELECTION.set(selection)
        try:
            await self._app(
                {**scope, "headers": headers.raw},
                _replay(raw, receive),
                _Completing(send, selection),
            )
        finally:
            SELECTION.reset(token)


class _Completing:
    """Sends on a reply, with exact usage; a whole JSON reply also gets the `mull` field."""

    def __init__(self, send: Send, selection: Selection) -> None:
        self._send = send
        self._selection = selection
        self._start: Message | None = None
        self._held = b""
        self._stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._stream = kind.startswith("text/event-stream")
            if message["status"] == 200 and kind.startswith("application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            self._held += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole(self._start)
            return
        elif (
            message["type"] == "http.response.body"
            and self._stream
            and b'"usage"' in message.get("body", b"")
        ):
            lines = message["body"].split(b"\n")
            message = {**message, "body": b"\n".join(self._line(line) for line in lines)}
        await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        reply: JSON = json.loads(self._held)
        spent = usage_of(self._selection)
        if spent is not None and isinstance(reply.get("usage"), dict):
            exact(reply["usage"], spent)
            reply["mull"] = mull_field(self._selection)
        raw = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(raw))
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": raw})

    def _line(self, line: bytes) -> bytes:
        """One line of an event stream.

        Usage may sit in the chunk or in the response or message that it carries.
        """
        if not line.startswith(b"data: {"):
            return line
        chunk: JSON = json.loads(line[len(b"data: ") :])
        spent = usage_of(self._selection)
        for holder in map(as_object, (chunk, chunk.get("response"), chunk.get("message"))):
            usage = None if holder is None else as_object(holder.get("usage"))
            if spent is not None and usage is not None:
                exact(usage, spent)
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()


def _object(raw: bytes) -> JSON | None:
    """The body as a JSON object; None where it is none, which vLLM refuses in its own words."""
    try:
        return as_object(json.loads(raw))
    except (ValueError, RecursionError):
        return None


async def _body(receive: Receive, limit: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise InvalidRequest(f"the body is larger than {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, and then whatever comes: the disconnect."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replayed
