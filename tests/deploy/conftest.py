"""The chart, rendered by Helm."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "chart"

Manifest = dict[str, Any]
Render = Callable[[dict[str, Any]], dict[tuple[str, str], Manifest]]
"""From values to manifests by kind and name; ValueError is Helm's refusal."""


@pytest.fixture(scope="session")
def render() -> Generator[Render]:
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed: it has no wheel for this machine")
    command = [sys.executable, str(Path(__file__).with_name("helm.py")), str(CHART)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout

        @cache
        def rendered(values: str) -> dict[tuple[str, str], Manifest]:
            asked.write(values + "\n")
            asked.flush()
            reply = json.loads(told.readline())
            if "error" in reply:
                raise ValueError(reply["error"])
            assert reply["lint"] == []
            found: dict[tuple[str, str], Manifest] = {}
            for name, text in reply["files"].items():
                for one in yaml.load_all(text, _Unique) if name.endswith(".yaml") else ():
                    if one is not None:
                        key = (one["kind"], one["metadata"]["name"])
                        assert key not in found
                        found[key] = one
            return found

        yield lambda values: rendered(json.dumps(values))
        asked.close()


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML parsers silently keep one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice in one mapping: {keys}"
        return super().construct_mapping(node, deep=deep)
