"""`/v1/strategies/{kind}/batch`: many prompts, one budget, results as they are decided."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.adapters.binding import bound
from server.batch.asked import Asked, read
from server.batch.running import course
from server.keys.accounts import TAB
from server.routes.strategies import KindInPath
from server.selection import owner
from server.sse import EventStream, event, gone
from server.wire import JSON, as_object, body_of
from strategies.core.aio import Background
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest

router = APIRouter(tags=["mull"])

_PATH = "/v1/strategies/{kind}/batch"

_BODY = {
    "type": "object",
    "required": ["model", "requests", "budget"],
    "properties": {
        "model": {"type": "string"},
        "requests": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["custom_id", "body"],
                "properties": {
                    "custom_id": {"type": "string", "minLength": 1},
                    "method": {"const": "POST"},
                    "url": {"const": "/v1/chat/completions"},
                    "body": {"type": "object", "required": ["messages"]},
                },
            },
        },
        "budget": Limits.model_json_schema(),
        "allocation": {"enum": ["marginal", "equal"]},
        "stream": {"type": "boolean"},
        "store": {"type": "boolean"},
    },
    "description": "Lines of an OpenAI batch file, a budget for all of them together, sampling "
    "fields for lines that have none of their own, and the strategy's fields.",
}


@router.post(
    _PATH,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}
    },
)
async def solve(kind: KindInPath, request: Request) -> Response:
    """Run a strategy on many prompts under one budget.

    A whole reply lists the results in order; a stream has an event for each as it is decided.
    """
    state = request.app.state
    raw = await body_of(request.receive, state.settings.max_body_bytes)
    if raw is None:
        return Response(status_code=400)  # the client left before it had said everything
    try:
        fields = as_object(json.loads(raw))
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None
    if fields is None:
        raise InvalidRequest("the body must be a JSON object")
    if state.adapters is not None:
        await state.adapters.look()
    asked = read(
        kind,
        fields,
        models=state.served(),
        headers=request.headers,
        settings=state.settings,
        shelf=state.shelf,
        chat=state.chat,
    )
    happening = _happening(asked, request)
    if asked.streamed:
        return EventStream(_streamed(happening), heartbeat_seconds=state.settings.heartbeat_seconds)
    async with Background(_whole(happening)) as reply, Background(gone(request.receive)) as left:
        await asyncio.wait({reply, left}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await reply) if reply.done() else Response(status_code=499)


@router.get(f"{_PATH}/{{name}}")
async def account(kind: KindInPath, name: str, request: Request) -> dict[str, Any]:
    """How far a batch is or came, by the `X-Request-Id` that it was started with."""
    return request.app.state.batches.find(kind, name, owner(request.headers)).account()


async def _happening(asked: Asked, request: Request) -> AsyncGenerator[tuple[str, JSON], None]:
    """The batch's events, with the adapters that it needs in the engine to its end."""
    state = request.app.state
    first = asked.lines[0]
    async with bound(state.adapters, first.body, first.selection) as body:
        for line in asked.lines:  # a name means one version in all of the batch
            line.selection.versions = first.selection.versions
            line.selection.tab = request.scope.get(TAB)
        lines = tuple(replace(one, body=one.body | {"model": body["model"]}) for one in asked.lines)
        asked = replace(asked, lines=lines)
        events = course(asked, state.chat, request, state.admission, state.batches)
        async with aclosing(events):
            async for one in events:
                yield one


async def _streamed(
    happening: AsyncGenerator[tuple[str, JSON], None],
) -> AsyncGenerator[bytes, None]:
    async with aclosing(happening):
        async for name, said in happening:
            yield event(name, said)


async def _whole(happening: AsyncGenerator[tuple[str, JSON], None]) -> JSON:
    """All of it as one reply, in the order of the lines."""
    results: dict[int, JSON] = {}
    last: JSON = {}
    async with aclosing(happening):
        async for name, said in happening:
            if name == "result":
                results[said.pop("index")] = said
            elif name == "done":
                last = said
    return last | {"object": "list", "data": [results[at] for at in sorted(results)]}
