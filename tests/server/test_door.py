"""The door: who is inside at a signal stays until done, or is told; nobody else comes in."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.door import Door
from strategies.core.aio import Background


class App:
    """Answers when it is told to; a stream begins at once."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/stream":
            await StreamingResponse(self._pieces())(scope, receive, send)
            return
        self.begun.set()
        await self.may_end.wait()
        await PlainTextResponse("whole")(scope, receive, send)

    async def _pieces(self):
        yield b"begun"
        self.begun.set()
        await self.may_end.wait()
        yield b", whole"


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def door(app: App) -> Door:
    door = Door()
    door.app = app
    return door


def asking(door: Door) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://door")


async def test_what_is_inside_ends_and_nobody_else_comes_in(app: App, door: Door):
    async with asking(door) as client, Background(client.get("/")) as inside:
        await app.begun.wait()
        async with Background(door.drain(30, asyncio.Event())) as draining:
            await asyncio.sleep(0)
            refused = await client.get("/")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["message"] == "the server is stopping"
            assert not draining.done()
            app.may_end.set()
            reply = await inside
            assert (reply.status_code, reply.text) == (200, "whole")
            await draining


async def wait_out(door: Door) -> None:
    await door.drain(0.05, asyncio.Event())


async def hurry(door: Door) -> None:
    at_once = asyncio.Event()
    at_once.set()
    await door.drain(3600, at_once)


@pytest.mark.parametrize("drain", [wait_out, hurry])
async def test_who_stays_too_long_is_told(
    app: App, door: Door, drain: Callable[[Door], Awaitable[None]]
):
    async with asking(door) as client, Background(client.get("/")) as inside:
        await app.begun.wait()
        await drain(door)
        reply = await inside
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "service_unavailable"


async def test_a_stream_that_has_begun_is_broken_off_without_an_end(app: App, door: Door):
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/stream", "asgi": {"spec_version": "2.3"}}
    async with Background(door(scope, receive, send)) as inside:  # type: ignore[arg-type]
        await app.begun.wait()
        await door.drain(0.05, asyncio.Event())
        await inside
    assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"] is True


async def test_a_cancellation_from_elsewhere_stays_one(app: App, door: Door):
    async with asking(door) as client, Background(client.get("/")) as inside:
        await app.begun.wait()
        inside.cancel()
        with pytest.raises(asyncio.CancelledError):
            await inside


async def test_without_an_app_there_is_a_503(door: Door):
    door.app = None
    async with asking(door) as client:
        reply = await client.get("/health")
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == "the engine is starting"
