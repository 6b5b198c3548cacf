"""The way in: what uvicorn holds while the app behind it comes, serves, drains and goes."""

import asyncio
import contextlib
import signal
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import reply_to
from strategies.core.errors import EngineUnavailable

_LOOK_SECONDS = 0.25
"""How often a draining server looks whether it is to end at once."""

_CANCEL_SECONDS = 5.0
"""For what was broken off to say so."""


class Leaving:
    """What signals ask for: the first to end, the next to end at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._hear)

    def _hear(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


class Server(uvicorn.Server):
    """Leaves signals to `Leaving`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Door:
    """An ASGI app: the one behind it; a 503 while there is none, and once it drains."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self._inside: set[asyncio.Task[object]] = set()
        self._draining = False
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await _own_lifespan(receive, send)
        elif self.app is not None and not self._draining:
            await self._enter(self.app, scope, receive, send)
        elif scope["type"] == "http":
            why = "the server is stopping" if self._draining else "the engine is starting"
            await reply_to(EngineUnavailable(why))(scope, receive, send)

    async def drain(self, seconds: float, at_once: asyncio.Event) -> None:
        """Let nobody in, and wait for those inside; whoever stays longer gets a 503.

        A stream that has begun is broken off instead, so that it cannot be taken for whole.
        """
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                while self._inside and not at_once.is_set():
                    await asyncio.wait([*self._inside], timeout=_LOOK_SECONDS)
        except TimeoutError:
            pass
        self._over = True
        left = [*self._inside]
        for one in left:
            one.cancel()
        if left:
            await asyncio.wait(left, timeout=_CANCEL_SECONDS)

    async def _enter(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        try:
            await app(scope, receive, sending)
        except asyncio.CancelledError:
            if not self._over:
                raise
            task.uncancel()
            if scope["type"] == "http" and not begun:
                await reply_to(EngineUnavailable("the server is stopping"))(scope, receive, send)
        finally:
            self._inside.discard(task)


async def _own_lifespan(receive: Receive, send: Send) -> None:
    """The app behind has a life of its own within the server's."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
