"""How large a body may be, and what in it costs more than its bytes: turns, schemas, patterns.

vLLM bounds no body, and turns a pattern into a grammar on the event loop, in a time that is
quadratic in its length (60,000 characters: 8 s); a body's own bound would let that pass.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.wire import JSON, as_list, as_object
from strategies.core.errors import InvalidRequest

_KEPT_TO = ("response_format", "structured_outputs", "tools", "text")
"""Fields that hold schemas, grammars and patterns; `text` is the format of `/v1/responses`."""

_PATTERNS = ("pattern", "regex")

_LONGEST_PATTERN = 4096
_DEEPEST = 64


class Bounded:
    """ASGI middleware: no body is read beyond `most_bytes`, whoever reads it."""

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise InvalidRequest(f"the body is larger than {self._most_bytes} bytes")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a request may hold."""

    turns: int
    schema_chars: int

    def __call__(self, body: JSON) -> None:
        """Look at a request.

        Raises:
            InvalidRequest: It holds more; the field is named.
        """
        for field in ("messages", "input"):
            if len(as_list(body.get(field)) or ()) > self.turns:
                raise InvalidRequest(f"'{field}' has more than {self.turns} turns", field=field)
        for field in _KEPT_TO:
            if body.get(field):
                self._kept_to(body[field], field)

    def _kept_to(self, value: object, field: str) -> None:
        for depth, name, one in _parts(value):
            if depth > _DEEPEST:
                raise InvalidRequest(f"'{field}' is nested deeper than {_DEEPEST}", field=field)
            if name in _PATTERNS and isinstance(one, str) and len(one) > _LONGEST_PATTERN:
                raise InvalidRequest(
                    f"'{field}' has a pattern of more than {_LONGEST_PATTERN} characters",
                    field=field,
                )
        if len(json.dumps(value)) > self.schema_chars:
            raise InvalidRequest(
                f"'{field}' is longer than {self.schema_chars} characters", field=field
            )


def _parts(value: object) -> Iterator[tuple[int, str, object]]:
    """Everything in a value: how deep it lies, and under which name."""
    waiting: list[tuple[int, str, object]] = [(0, "", value)]
    while waiting:
        depth, name, one = found = waiting.pop()
        yield found
        inner = as_object(one)
        if inner is None and name == "json" and isinstance(one, str):  # vLLM takes it as text, too
            inner = _loaded(one)
        if inner is not None:
            waiting += [(depth + 1, key, part) for key, part in inner.items()]
            waiting += [
                (depth + 1, "pattern", key)
                for key in as_object(inner.get("patternProperties")) or ()
            ]
        waiting += [(depth + 1, name, part) for part in as_list(one) or ()]


def _loaded(text: str) -> JSON | None:
    try:
        return as_object(json.loads(text))
    except (ValueError, RecursionError):
        return None
