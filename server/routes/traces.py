"""`/v1/traces/{id}`: what a run did, and what a running one does, for the key that started it."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.reply import summary
from server.run import Run
from server.selection import owner
from server.sse import EventStream, event
from server.trace import told

router = APIRouter(tags=["mull"])


@router.get("/v1/traces/{name}")
async def trace(name: str, request: Request) -> dict[str, Any]:
    """A run by its id (`mull.run` in replies) or by the `X-Request-Id` that it was asked with."""
    return summary(_find(name, request))


@router.get("/v1/traces/{name}/events")
async def events(name: str, request: Request) -> Response:
    """The run's events so far and then as they happen, as server-sent events."""
    run = _find(name, request)

    async def follow() -> AsyncGenerator[bytes, None]:
        async for timed in run.trace.follow():
            said = told(timed)
            yield event(said["event"], said)

    return EventStream(follow(), heartbeat_seconds=request.app.state.settings.heartbeat_seconds)


def _find(name: str, request: Request) -> Run:
    return request.app.state.store.find(name, owner(request.headers))
