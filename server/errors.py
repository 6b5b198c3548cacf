"""One table from our errors to HTTP, in OpenAI's error shape."""

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from server import metrics
from strategies.core.errors import (
    BudgetSpent,
    Busy,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    MullError,
    NoCandidate,
    NotFound,
    StorageFailed,
    Unauthorized,
    VerifierFailed,
)

_STATUS: dict[type[MullError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "not_found"),
    NoCandidate: (422, "budget_exhausted"),
    BudgetSpent: (422, "budget_exhausted"),
    VerifierFailed: (422, "verifier_failed"),
    Busy: (429, "rate_limit_exceeded"),
    EngineUnavailable: (503, "service_unavailable"),
    StorageFailed: (507, "storage_failed"),
}


def status_of(error: Exception) -> int:
    """The HTTP status of one of our errors; 500 where the table has none."""
    return next((status for kind, (status, _) in _STATUS.items() if isinstance(error, kind)), 500)


def shape(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status, kind = next(
        (row for cls, row in _STATUS.items() if isinstance(error, cls)), (500, "internal_error")
    )
    field = error.field if isinstance(error, InvalidRequest) else None
    code = "invalid_api_key" if isinstance(error, Unauthorized) else status
    said = str(error) if isinstance(error, MullError) else "an internal error; see the server's log"
    return {"error": {"message": said, "type": kind, "param": field, "code": code}}


def reply_to(error: Exception) -> JSONResponse:
    """An error as a whole reply, which is counted."""
    kind = shape(error)["error"]["type"]
    scarce = error.scarce if isinstance(error, Busy) else None
    metrics.REFUSED.labels(scarce or kind).inc()
    seconds = error.seconds if isinstance(error, Busy) else 5
    status = status_of(error)
    headers = {"Retry-After": str(seconds)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(shape(error), status_code=status, headers=headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """An exception handler for `MullError`."""
    assert isinstance(error, MullError)
    return reply_to(error)


def refusal(error: ValidationError, *, inside: str) -> InvalidRequest:
    """Turn pydantic's first finding into a refusal that names the field below `inside`."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join([part for part in (inside, *path) if part])
    return InvalidRequest(f"{field}: {first['msg']}", field=field)


def nearest(name: str, known: list[str]) -> str:
    """A hint for a wrong name: the nearest right one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
