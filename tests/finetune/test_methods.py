"""Every method of `mull-finetune`, for a few steps on real data, and what vLLM makes of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.checks import EXACT
from finetune.methods import METHODS
from models import MULL_TINY

SCRIPT = Path(__file__).parent / "training_scripts" / "all_methods.py"
COMMON = {
    "model_name_or_path": str(MULL_TINY),
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "lora_r": 8,
    "learning_rate": 0.002,
    "grader": "finetune.tiny.rows:grade",
    "seed": 3,
}
OWN: dict[str, dict[str, Any]] = {
    "verifier": {"label_good": "<|good|>", "label_bad": "<|bad|>"},
    "distill": {"teacher_model_name_or_path": str(MULL_TINY), "max_completion_length": 16},
    "grpo": {
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "max_completion_length": 96,
        "temperature": 1.5,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "loraplus": {"loraplus_lr_ratio": 8},
    "muon": {"muon": True, "learning_rate": 0.02},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True, "convert_rank": 64},
    "ia3": {"peft_method": "ia3"},
    "prefix": {"peft_method": "prefix"},
    "kl": {"kl_to_base": 0.5},
    "again": {},
    "whole": {"max_steps": 4, "save_steps": 2},
}
UNSERVED = {"reward", "ia3", "prefix"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for columns in ("demonstrations", "steps", "pairs", "labelled", "prompts"):
        out = str(folder / f"{columns}.jsonl")
        command = [sys.executable, "-m", "finetune.tiny.rows", columns, "--count", "60"]
        subprocess.run([*command, "--out", out], check=True, timeout=60)
    held_out = [sys.executable, "-m", "finetune.tiny.rows", "prompts", "--held-out"]
    held_out += ["--count", "6", "--out", str(folder / "exam.jsonl")]
    subprocess.run(held_out, check=True, timeout=60)
    return folder


def flags(keys: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where the runs wrote, and what each said."""
    out = tmp_path_factory.mktemp("runs")
    runs: dict[str, tuple[str, list[str]]] = {}
    for name, method in METHODS.items():
        keys = COMMON | {"dataset_name": rows / f"{method.columns}.jsonl"}
        keys |= {"output_dir": out / name} | OWN.get(name, {})
        runs[name] = (name, flags(keys))
    for name, more in VARIANTS.items():
        keys = COMMON | {"dataset_name": rows / "demonstrations.jsonl", "output_dir": out / name}
        runs[name] = ("sft", flags(keys | more))
    sft = COMMON | {"dataset_name": rows / "demonstrations.jsonl", "max_steps": 4, "save_steps": 2}
    exam = {"check_problems": rows / "exam.jsonl", "check_samples": 1, "test_split_size": 0.1}
    stopped = {"output_dir": out / "whole", "publish_to": out / "resumed" / "adapter"}
    resume = {"resume_from_checkpoint": out / "whole" / "checkpoint-2"}
    runs["resumed"] = ("sft", flags(sft | stopped | resume))
    runs["checked"] = ("sft", flags(COMMON | {"dataset_name": rows / "demonstrations.jsonl"}))
    runs["checked"][1].extend(flags({"output_dir": out / "checked"} | exam))
    told = out / "runs.json"
    told.write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, SCRIPT, told], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-8000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
    return out, {line["run"]: line["said"] for line in map(json.loads, lines)}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter" / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS, "resumed", "checked"])
def test_each_way_to_train_is_served_exactly_or_says_that_it_is_not(trained, name: str):
    out, said = trained
    assert said[name] == "published"
    if name in UNSERVED:
        assert not (out / name / "adapter" / "manifest.json").exists()
        return
    told = manifest(out / name)
    assert 0 <= told["evaluation"]["max_logprob_error"] <= EXACT
    assert told["kind"] == ("verifier" if name == "verifier" else "policy")
    assert told["recipe"]["learning_rate"]
    assert told["compute"]["tokens"] > 0
    assert (out / name / "adapter" / "README.md").exists()
    if name not in METHODS:
        assert told["data"].keys() == {"demonstrations.jsonl"}
    if name == "dora":
        assert 0 < told["evaluation"]["conversion_error"] < 0.1


@pytest.mark.slow
def test_the_same_seed_makes_the_same_bytes_and_so_does_a_resumed_run(trained):
    out, _ = trained
    for one, other in (("sft", "again"), ("whole", "resumed")):
        first, second = (
            (out / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for name in (one, other)
        )
        assert first == second
    assert (out / "sft" / "adapter" / "adapter_model.safetensors").read_bytes() != (
        out / "kl" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_finished_adapter_tells_what_it_is_worth(trained):
    out, _ = trained
    found = manifest(out / "checked")["evaluation"]
    assert found["task.problems"] == 6
    assert 0 <= found["task.accuracy"] <= 1
    assert found["task.answer_tokens"] > 0
    report = json.loads((out / "checked" / "data_report.json").read_text())
    assert report["rows"] == report["kept"] == 60
    log = [json.loads(line) for line in (out / "checked" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2]
    pissa = load_file(out / "pissa" / "adapter" / "adapter_model.safetensors")
    assert {weight.shape[0] for key, weight in pissa.items() if "lora_A" in key} == {16}
