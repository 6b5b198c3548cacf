"""JSON as it comes from outside: typed views of values that may be anything."""

from typing import Any, cast

from starlette.types import Receive

from strategies.core.errors import InvalidRequest

JSON = dict[str, Any]


def as_object(value: object) -> JSON | None:
    """The value if it is a JSON object."""
    return cast(JSON, value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """The value if it is a JSON array."""
    return cast(list[Any], value) if isinstance(value, list) else None


async def body_of(receive: Receive, limit: int) -> bytes | None:
    """A request's body; None if the client left before it had said everything.

    Raises:
        InvalidRequest: It is larger than `limit` bytes.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise InvalidRequest(f"the body is larger than {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(chunks)
