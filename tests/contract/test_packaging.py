"""What is installed is ours alone, and imports point one way."""

import ast
import sys
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["server", "strategies", "finetune", "models"])
def test_each_package_belongs_to_mull_alone(package: str):
    assert set(packages_distributions()[package]) == {"mull"}


def test_the_entry_points_load():
    [endpoint] = entry_points(group="vllm.endpoint_plugins", name="mull")
    [general] = entry_points(group="vllm.general_plugins", name="mull")
    assert endpoint.value == "server.local.plugin:plugin"
    assert general.value == "server.local.cpu:mend"


def test_strategies_import_only_the_standard_library_pydantic_and_math_verify():
    allowed = {"strategies", "pydantic", "math_verify", *sys.stdlib_module_names}
    files = sorted((ROOT / "strategies").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_no_field_of_a_strategy_hides_a_field_of_chat():
    from strategies.core.strategy import Strategy
    from strategies.registry import STRATEGIES

    # The native route puts them side by side. `n` is the strategy's, and documented so.
    chat = {"stop", "temperature", "top_p", "seed", "max_tokens", "messages", "model", "stream"}
    chat |= {"budget", "tools", "logprobs", "response_format", "user", "metadata"}
    for model in STRATEGIES.values():
        assert issubclass(model, Strategy)
        assert not set(model.model_fields) & chat


def test_the_shipped_model_is_small_and_safe():
    folder = ROOT / "models" / "mull-tiny"
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".jinja", ".safetensors", ".md"}
    assert (folder / "model.safetensors").stat().st_size < 20e6
    assert "majority@16" in (folder / "README.md").read_text()
