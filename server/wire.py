"""JSON as it comes from outside: typed views of values that may be anything."""

from typing import Any, cast

JSON = dict[str, Any]


def as_object(value: object) -> JSON | None:
    """The value if it is a JSON object."""
    return cast(JSON, value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """The value if it is a JSON array."""
    return cast(list[Any], value) if isinstance(value, list) else None
