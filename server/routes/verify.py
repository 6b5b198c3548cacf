"""`POST /v1/verify`: the scores of given answers, by any verifier that can read them."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from server.adapters.binding import bound
from server.errors import refusal
from server.search import entered
from server.selection import SELECTION, owner, select
from server.wire import JSON, body_of
from strategies.core.answers import AnswerFormat
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from strategies.core.events import Scored
from strategies.core.strategy import VerifierChoice
from strategies.given import Given

router = APIRouter(tags=["mull"])

_LONGEST = 100_000
"""Characters of a candidate."""


class VerifyRequest(BaseModel):
    """A question, answers to it, and who is to judge them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(max_length=1000)
    messages: list[dict[str, Any]] = Field(min_length=1)
    candidates: list[str] = Field(min_length=1, max_length=256, description="Answers to judge.")
    verifier: VerifierChoice = Field(description="A kind from GET /v1/verifiers, or an object.")
    complete: bool = Field(
        default=True, description="Whether the answers are whole, rather than to be gone on with."
    )
    answer: AnswerFormat = Field(default=AnswerFormat(), description="How answers are read.")
    budget: Limits = Limits()


@router.post(
    "/v1/verify",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": VerifyRequest.model_json_schema()}},
        }
    },
)
async def verify(request: Request) -> Response:
    """Judge given answers: a score in [0, 1] for each, and one for each step where there are."""
    state = request.app.state
    raw = await body_of(request.receive, state.settings.max_body_bytes)
    if raw is None:
        return Response(status_code=400)  # the client left before it had said everything
    try:
        asked = VerifyRequest.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error, inside="") from error
    for at, text in enumerate(asked.candidates):
        if not 0 < len(text) <= _LONGEST:
            raise InvalidRequest(
                f"a candidate has 1 to {_LONGEST} characters", field=f"candidates.{at}"
            )
    strategy = Given(
        texts=tuple(asked.candidates),
        complete=asked.complete,
        verifier=asked.verifier,
        answer=asked.answer,
    )
    body: JSON = {"model": asked.model, "messages": asked.messages}
    state.settings.bounds(body)
    limits = asked.budget.capped(state.settings.limits)
    body, selection = select(strategy, limits, body, state.settings)
    selection.owner = owner(request.headers)
    selection.traceparent = request.headers.get("traceparent")
    token = SELECTION.set(selection)
    try:
        binding = bound(state.adapters, body, selection)
        async with entered(selection, request.scope), binding as body:
            reply = await state.chat.complete(body, request, watch=True)
    finally:
        SELECTION.reset(token)
    if isinstance(reply, Response):
        return reply
    return JSONResponse(_told(reply, selection.runs[-1]))


def _told(reply: JSON, run: Any) -> JSON:
    usage = run.usage()
    scored = [event for _, event in run.trace.events if isinstance(event, Scored)]
    return {
        "id": run.id,
        "object": "list",
        "model": reply["model"],
        "data": [
            {
                "object": "verdict",
                "index": event.index,
                "score": event.score,
                "steps": list(event.steps),
            }
            for event in scored
        ],
        "usage": {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.verifier,
            "total_tokens": usage.prompt + usage.verifier,
        },
    }
