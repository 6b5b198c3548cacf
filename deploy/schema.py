"""Writes Mull's settings and methods of training into the chart's `values.schema.json`.

python -m deploy.schema
"""

import json
from pathlib import Path
from typing import Any

from finetune.methods import METHODS
from server.settings import FILE_ONLY, Settings

FILE = Path(__file__).parent / "chart" / "values.schema.json"


def current() -> dict[str, Any]:
    """The schema as it should be: the rest of it is written by hand."""
    schema = json.loads(FILE.read_text())
    fields = Settings.model_json_schema(mode="validation")["properties"]
    alone = {name: _alone(field) for name, field in fields.items() if name not in FILE_ONLY}
    secret = {name for name, field in alone.items() if field.pop("writeOnly", False)}
    schema["$defs"] |= {
        "settings": _closed({name: alone[name] for name in alone if name not in secret}),
        "secrets": _closed({name: alone[name] for name in alone if name in secret}),
        "config": _closed(
            {
                name: {"type": "object", "description": fields[name]["description"]}
                for name in sorted(FILE_ONLY)
            }
        ),
    }
    schema["properties"]["finetune"]["properties"]["method"] = {"enum": sorted(METHODS)}
    return schema


def _alone(field: dict[str, Any]) -> dict[str, Any]:
    """A field without the null that leaving it out says, and without what is for Python."""
    [kind] = [one for one in field.get("anyOf", [field]) if one.get("type") != "null"]
    dropped = {"anyOf", "default", "format", "title"}
    return {key: value for key, value in (field | kind).items() if key not in dropped}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


if __name__ == "__main__":
    FILE.write_text(json.dumps(current(), indent=2) + "\n")
