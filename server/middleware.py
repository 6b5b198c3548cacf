"""The thin layer around every generating endpoint: it reads the choice, and completes the reply."""

import asyncio
import json
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, aclosing

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.adapters.binding import Names, bound
from server.calibration.shelf import Shelf
from server.errors import reply_to
from server.reply import exact, mull_field, usage_of
from server.run import Selection
from server.search import entered
from server.selection import ENDPOINTS, MANY, SELECTION, choose, equip
from server.settings import Settings
from server.sse import HEARTBEAT
from server.trace import told
from server.wire import JSON, as_list, as_object, body_of
from strategies.core.aio import Background
from strategies.core.errors import InvalidRequest, MullError
from strategies.core.events import Grown


class Choosing:
    """ASGI middleware. A request that names no strategy passes through byte for byte."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        models: Callable[[], Collection[str]],
        names: Callable[[], Names | None],
        settings: Settings,
        shelf: Shelf,
    ) -> None:
        self._app = app
        self._shelf = shelf
        self._models = models
        self._names = names
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "")
        read = ENDPOINTS + MANY if self._names() is None else _READ
        if scope["type"] != "http" or scope["method"] != "POST" or path not in read:
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as stack:
            selection: Selection | None = None
            try:
                raw = await body_of(receive, self._settings.max_body_bytes)
                if raw is None:
                    return  # the client left before it had said everything
                asked = body = _object(raw)
                if body is not None:
                    headers, names, chosen = Headers(scope=scope), self._names(), body
                    if names is not None:
                        await names.look()
                    if path not in _NAMING:
                        chosen, selection = choose(
                            body, self._models(), headers, path, self._settings
                        )
                    if selection is not None:
                        equip(selection, chosen, self._shelf, self._settings)
                        await stack.enter_async_context(entered(selection, scope))
                    binding = bound(names, chosen, selection, counted=path in ENDPOINTS)
                    asked = await stack.enter_async_context(binding)
                    if names is not None:
                        _refuse(asked, headers, names)
            except MullError as error:
                await reply_to(error)(scope, receive, send)
                return
            if asked is not body:
                raw = json.dumps(asked).encode()
                changed = MutableHeaders(raw=list(scope["headers"]))
                changed["content-length"] = str(len(raw))
                scope = {**scope, "headers": changed.raw}
            replayed = _replay(raw, receive)
            if asked is None or selection is None:
                await self._app(scope, replayed, send)
            else:
                await self._search(scope, replayed, send, asked, selection)

    async def _search(
        self, scope: Scope, receive: Receive, send: Send, asked: JSON, selection: Selection
    ) -> None:
        """Let vLLM answer by the strategy, and complete what it says."""
        completing = _Completing(
            send,
            selection,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            several=asked.get("n") not in (None, 1),
        )
        token = SELECTION.set(selection)
        try:
            async with AsyncExitStack() as stack:
                if asked.get("stream"):
                    await stack.enter_async_context(Background(completing.beat()))
                    if selection.trace == "full":
                        kind = _CHUNKS[scope["path"]]
                        narrating = completing.narrate(asked.get("model"), kind)
                        await stack.enter_async_context(Background(narrating))
                await self._app(scope, receive, completing)
        finally:
            SELECTION.reset(token)


_NAMING = (
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/generative_scoring",
    "/inference/v1/generate",
    "/cohere/v2/chat",
    "/v1/systemone",
)
"""Further endpoints that name a model, where nothing is chosen."""

_READ = (*ENDPOINTS, *MANY, *_NAMING)

_CHUNKS = {
    "/v1/chat/completions": "chat.completion.chunk",
    "/v1/completions": "text_completion",
}


class _Completing:
    """Sends on a reply, with exact usage; a whole JSON reply also gets the `mull` field.

    A stream gets comments while it is silent and, if asked for, what happens as chunks of its own;
    its last chunk gets the `mull` field.
    """

    def __init__(
        self, send: Send, selection: Selection, *, heartbeat_seconds: float, several: bool
    ) -> None:
        self._send = send
        self._selection = selection
        self._heartbeat_seconds = heartbeat_seconds
        self._several = several
        self._start: Message | None = None
        self._held = b""
        self._streaming = asyncio.Event()
        self._over = False
        self._told = False
        self._last = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if message["status"] == 200 and kind.startswith("application/json"):
                self._start = message
                return
            await self._send(message)
            if kind.startswith("text/event-stream"):
                self._streaming.set()  # from here on others may send between vLLM's pieces
            return
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._start is not None:
                self._held += body
                if not message.get("more_body", False):
                    await self._send_whole(self._start)
                return
            self._over = not message.get("more_body", False)
            telling = self._several or b'"usage"' in body or b'"finish_reason":"' in body
            if self._streaming.is_set() and telling:
                message = {**message, "body": b"\n".join(map(self._line, body.split(b"\n")))}
        self._last = time.monotonic()
        await self._send(message)

    async def beat(self) -> None:
        """Send a comment whenever the stream has been silent for a while."""
        await self._streaming.wait()
        while not self._over:
            silent = time.monotonic() - self._last
            if silent >= self._heartbeat_seconds:
                await self._comment(HEARTBEAT)
                silent = 0.0
            await asyncio.sleep(self._heartbeat_seconds - silent)

    async def narrate(self, model: object, kind: str) -> None:
        """Send what happens in the run as chunks without choices."""
        await self._selection.begun.wait()
        run = self._selection.runs[-1]
        head: JSON = {"id": run.id, "object": kind, "created": int(time.time()), "model": model}
        async with aclosing(run.trace.follow()) as happening:
            async for timed in happening:
                if isinstance(timed[1], Grown):
                    continue  # what is not the answer's is not to be read as if it were
                chunk: JSON = head | {"choices": [], "mull": {"run": run.id} | told(timed)}
                await self._comment(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    async def _comment(self, piece: bytes) -> None:
        """Put a piece between those of vLLM, which are whole events each."""
        await self._streaming.wait()
        if not self._over:
            self._last = time.monotonic()
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _send_whole(self, start: Message) -> None:
        reply = as_object(json.loads(self._held)) or {}  # vLLM says null to a client that left
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
        choices = as_list(chunk.get("choices"))
        outcome = self._selection.runs[-1].outcome if self._selection.runs else None
        if choices is not None and outcome is not None:
            found = [one for one in choices if one["index"] < len(outcome.ranked)]
            if choices and not found:
                return b""  # vLLM opens all the choices asked for; there were fewer answers
            chunk["choices"] = found
            if not self._told:
                self._told = True
                chunk["mull"] = mull_field(self._selection)
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()


def _refuse(asked: JSON, headers: Headers, names: Names) -> None:
    """What would outlive the request that holds an adapter, or name another behind its back."""
    if asked.get("background") and names.meant(str(asked.get("model"))) is not None:
        raise InvalidRequest("adapters serve no background responses", field="background")
    if "x-amzn-sagemaker-adapter-identifier" in headers:
        raise InvalidRequest("name the adapter in 'model'", field="model")


def _object(raw: bytes) -> JSON | None:
    """The body as a JSON object; None where it is none, which vLLM refuses in its own words."""
    try:
        return as_object(json.loads(raw))
    except (ValueError, RecursionError):
        return None


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
