"""`/v1/strategies` and `/v1/verifiers`: the catalogue, and a strategy as an endpoint of its own."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import JSONResponse, Response

from server.adapters.binding import bound
from server.errors import nearest
from server.reply import exact, native
from server.run import Selection
from server.search import entered
from server.selection import SELECTION, choose, equip, kind_of, parse
from server.sse import EventStream, Refused, event
from server.trace import told
from server.verifiers.catalogue import VERIFIERS
from server.wire import JSON, as_object, body_of
from strategies.core.aio import Background
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from strategies.registry import STRATEGIES

router = APIRouter(tags=["mull"])

KindInPath = Annotated[str, Path(json_schema_extra={"enum": list(STRATEGIES)})]
"""A strategy's kind, which OpenAPI lists; an unknown one is refused in our own words."""


@router.get("/v1/strategies")
async def strategies() -> dict[str, Any]:
    """Every strategy: what it does and costs, its paper, its parameters with defaults."""
    return {
        "object": "list",
        "data": [
            {
                "id": kind,
                "object": "strategy",
                "description": " ".join((model.__doc__ or "").split()),
                "cost": model.cost,
                "paper": model.paper,
                "defaults": model.model_validate({"kind": kind}).model_dump(mode="json"),
                "schema": model.model_json_schema(),
            }
            for kind, model in STRATEGIES.items()
        ],
    }


@router.get("/v1/verifiers")
async def verifiers() -> dict[str, Any]:
    """Every verifier that a strategy may name, with its parameters as JSON schema."""
    return {
        "object": "list",
        "data": [
            {
                "id": kind,
                "object": "verifier",
                "description": " ".join((model.__doc__ or "").split()),
                "schema": model.model_json_schema(),
            }
            for kind, model in VERIFIERS.items()
        ],
    }


_BODY = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0},
        "seed": {"type": "integer"},
        "stream": {"type": "boolean"},
        "store": {"type": "boolean"},
        "trace": {"enum": [True, False, "full", "summary"]},
        "budget": Limits.model_json_schema(),
    },
    "description": "A chat request, a budget, and the strategy's own fields (GET /v1/strategies).",
}


@router.post(
    "/v1/strategies/{kind}",
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}
    },
)
async def solve(kind: KindInPath, request: Request) -> Response:
    """Run a strategy.

    The body holds model, messages, sampling fields, budget, and the strategy's own fields.
    """
    own = kind_of(kind).model_fields
    state = request.app.state
    raw = await body_of(request.receive, state.settings.max_body_bytes)
    if raw is None:
        return Response(status_code=400)  # the client left before it had said everything
    try:
        body: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None
    fields = as_object(body)
    if fields is None:
        raise InvalidRequest("the body must be a JSON object")
    strategy = parse(
        {"kind": kind} | {name: fields[name] for name in fields if name in own}, inside=""
    )
    rest = {name: value for name, value in fields.items() if name not in own}
    streamed = rest.pop("stream", None)
    if streamed not in (None, True, False):
        raise InvalidRequest("'stream' is true or false", field="stream")
    chat = state.chat
    known = [*own, "budget", "trace", "store", *chat.fields]
    if (unknown := next((name for name in rest if name not in known), None)) is not None:
        raise InvalidRequest(
            f"'{unknown}' is neither a field of {kind} nor of a chat request; "
            f"{nearest(unknown, known)}",
            field=unknown,
        )
    names = state.adapters
    if names is not None:
        await names.look()
    asked, selection = choose(
        rest | {"strategy": strategy.model_dump(mode="json", exclude_unset=True)},
        state.served(),
        request.headers,
        request.url.path,
        state.settings,
    )
    assert selection is not None
    equip(selection, asked, state.shelf, state.settings)
    if streamed:
        events = _events(chat, asked, request, selection)
        return EventStream(events, heartbeat_seconds=state.settings.heartbeat_seconds)
    token = SELECTION.set(selection)
    try:
        async with entered(selection, request.scope), bound(names, asked, selection) as asked:
            reply = await chat.complete(asked, request, watch=True)
    finally:
        SELECTION.reset(token)
    if isinstance(reply, Response):
        return reply
    return JSONResponse(_told(reply, selection))


async def _events(
    chat: Any, asked: JSON, request: Request, selection: Selection
) -> AsyncGenerator[bytes, None]:
    """What happens, and then the reply as `result`."""
    binding = bound(request.app.state.adapters, asked, selection)
    async with entered(selection, request.scope), binding as asked:
        token = SELECTION.set(selection)  # a generator runs in the context of whoever iterates it
        completing = Background(chat.complete(asked, request, watch=False))
        async with completing as reply, Background(selection.begun.wait()) as begun:
            SELECTION.reset(token)
            await asyncio.wait({reply, begun}, return_when=asyncio.FIRST_COMPLETED)
            for run in selection.runs:
                async with aclosing(run.trace.follow()) as happening:
                    async for timed in happening:
                        said = told(timed)
                        yield event(said["event"], said)
            whole = await reply
    if isinstance(whole, Response):
        raise Refused(whole)
    yield event("result", _told(whole, selection))


def _told(reply: JSON, selection: Selection) -> JSON:
    run = selection.runs[-1]
    usage = exact(reply["usage"], run.usage())
    return native(run, selection, model=reply["model"], usage=usage)
