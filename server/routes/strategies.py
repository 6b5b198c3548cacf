"""`/v1/strategies` and `/v1/verifiers`: the catalogue, and a strategy as an endpoint of its own."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from server.errors import nearest, refusal
from server.reply import exact, native
from server.selection import SELECTION, parse, select
from server.verifiers.catalogue import VERIFIERS
from server.wire import as_object
from strategies.core.errors import InvalidRequest
from strategies.registry import STRATEGIES

router = APIRouter(tags=["mull"])


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


@router.post("/v1/strategies/{kind}")
async def solve(kind: str, request: Request) -> Response:
    """Run a strategy.

    The body holds model, messages, sampling fields, budget, and the strategy's own fields.
    """
    if kind not in STRATEGIES:
        raise InvalidRequest(
            f"there is no strategy '{kind}'; {nearest(kind, list(STRATEGIES))}", field="kind"
        )
    try:
        body: Any = await request.json()
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None
    fields = as_object(body)
    if fields is None:
        raise InvalidRequest("the body must be a JSON object")
    own = STRATEGIES[kind].model_fields
    strategy = parse(
        {"kind": kind} | {name: fields[name] for name in fields if name in own}, inside=""
    )
    rest = {name: value for name, value in fields.items() if name not in own and name != "budget"}
    if rest.get("stream"):
        raise InvalidRequest(
            "this route answers when the search is over; stream by /v1/chat/completions",
            field="stream",
        )
    chat = request.app.state.chat
    if (unknown := next((name for name in rest if name not in chat.fields), None)) is not None:
        raise InvalidRequest(
            f"'{unknown}' is neither a field of {kind} nor of a chat request; "
            f"{nearest(unknown, [*own, *chat.fields])}",
            field=unknown,
        )
    asked, selection = select(strategy, fields.get("budget"), rest)
    token = SELECTION.set(selection)
    try:
        reply = await chat.complete(asked, request)
    except ValidationError as error:
        raise refusal(error, inside="") from error
    finally:
        SELECTION.reset(token)
    if isinstance(reply, Response):
        return reply
    run = selection.runs[-1]
    spent = run.usage()
    return JSONResponse(
        native(run, selection, model=reply["model"], usage=exact(reply["usage"], spent))
    )
