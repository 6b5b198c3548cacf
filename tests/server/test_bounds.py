"""What costs an engine more than its bytes is bounded, and named."""

import json
from typing import Any

import pytest

from server.bounds import Bounds
from strategies.core.errors import InvalidRequest

BOUNDS = Bounds(turns=3, schema_chars=1000)
LONG = "a" * 4097


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"properties": found}
    return found


def test_what_is_usual_passes():
    BOUNDS({})
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}
    BOUNDS(
        {
            "messages": [{}] * 3,
            "input": "a" * 10_000,
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
            "structured_outputs": {"json": json.dumps(schema), "regex": "a" * 800},
            "tools": None,
            "text": {"format": {"type": "text"}},
        }
    )


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [{}] * 4}, "messages"),
        ({"input": [{}] * 4}, "input"),
        ({"structured_outputs": {"regex": LONG}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"pattern": LONG}}}, "structured_outputs"),
        ({"structured_outputs": {"json": json.dumps({"pattern": LONG})}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "x" * 1000}}, "structured_outputs"),
        ({"response_format": {"patternProperties": {LONG: {}}}}, "response_format"),
        ({"response_format": nested(70)}, "response_format"),
        ({"text": {"format": {"schema": {"items": [{"pattern": LONG}]}}}}, "text"),
        ({"tools": [{"function": {"parameters": nested(900)}}]}, "tools"),
        ({"tools": [{"function": {"name": "x"}}] * 99}, "tools"),
    ],
    ids=lambda one: json.dumps(one)[:40],
)
def test_what_is_more_is_refused_by_name(body: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as refused:
        BOUNDS(body)
    assert refused.value.field == field
