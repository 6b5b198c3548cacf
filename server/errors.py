"""One table from our errors to HTTP, in OpenAI's error shape."""

from difflib import get_close_matches

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from strategies.core.errors import (
    EngineUnavailable,
    InvalidRequest,
    MullError,
    NoCandidate,
    VerifierFailed,
)

_STATUS: dict[type[MullError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    NoCandidate: (422, "budget_exhausted"),
    VerifierFailed: (422, "verifier_failed"),
    EngineUnavailable: (503, "service_unavailable"),
}


def status_of(error: MullError) -> int:
    """The HTTP status of one of our errors; 500 where the table has none."""
    return next((status for kind, (status, _) in _STATUS.items() if isinstance(error, kind)), 500)


def reply_to(error: MullError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    status, kind = next(
        (row for cls, row in _STATUS.items() if isinstance(error, cls)), (500, "internal_error")
    )
    field = error.field if isinstance(error, InvalidRequest) else None
    return JSONResponse(
        {"error": {"message": str(error), "type": kind, "param": field, "code": status}},
        status_code=status,
        headers={"Retry-After": "5"} if status == 503 else None,
    )


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
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
