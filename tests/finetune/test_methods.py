"""Every method of `mull-finetune`, for a few steps on real data, and what vLLM makes of it.

The examples are run as their first lines say, on fewer rows and for fewer steps.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune import training
from finetune.checks import EXACT
from finetune.methods import METHODS

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "training_scripts" / "all_methods.py"
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples" / "finetune").glob("*.yaml"))}
FEW: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.002,
    "check_samples": 1,
}
LESS: dict[str, dict[str, Any]] = {
    "sft": {"eval_steps": 2},
    "distill": {"max_completion_length": 16},
    "grpo": {
        "per_device_train_batch_size": 32,
        "max_completion_length": 96,
        "temperature": 1.5,
    },
}
COMMON = FEW | {
    "model_name_or_path": "models/mull-tiny",
    "dataset_name": "runs/rows/demonstrations.jsonl",
    "lora_r": 8,
    "seed": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "loraplus": {"loraplus_lr_ratio": 8},
    "muon": {"muon": True, "learning_rate": 0.02},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True, "convert_rank": 64},
    "ia3": {"peft_method": "ia3"},
    "prefix": {"peft_method": "prefix"},
    "whole": {"max_steps": 4, "save_steps": 2},
    "again": {"max_steps": 4, "save_steps": 2},
    "near": {"max_steps": 4, "kl_to_base": 0.5},
    "resumed": {
        "max_steps": 4,
        "save_steps": 2,
        "output_dir": "runs/whole",
        "publish_to": "runs/resumed/adapter",
        "resume_from_checkpoint": "runs/whole/checkpoint-2",
    },
}
UNSERVED = {"reward", "ia3", "prefix"}


def flags(keys: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def commands(example: str) -> list[list[str]]:
    """What an example's first lines say to run; the last one trains."""
    lines = EXAMPLES[example].read_text().split("\n\n")[0].splitlines()
    return [line.removeprefix("#").split() for line in lines if line.startswith("#   ")]


def trains(example: str, **more: Any) -> tuple[str, list[str]]:
    *_, (_, method, *arguments) = commands(example)
    few = FEW | {"gradient_accumulation_steps": 1} | LESS.get(example, {}) | more
    return method, [*arguments, *flags(few)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root."""
    root = tmp_path_factory.mktemp("root")
    for name in ("examples", "models"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture(scope="module")
def two(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes that train together; started first, as an engine spends its start waiting."""
    (_, *rows), _ = commands("chat")
    subprocess.run([sys.executable, *rows, "--count=60"], check=True, timeout=200, cwd=place)
    method, arguments = trains("chat", kl_to_base=0.1, output_dir="runs/two")
    torchrun = Path(sys.executable).with_name("torchrun")
    launcher = [torchrun, "--nproc_per_node=2", "--redirects=3", "--log-dir=said", "-m"]
    process = subprocess.Popen(
        [*launcher, "finetune", method, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield process
    process.terminate()
    process.communicate()


@pytest.fixture(scope="module")
def trained(place: Path, two: object) -> tuple[Path, dict[str, str]]:
    """Where the runs wrote, and what each said."""
    others = [commands(example)[:-1] for example in EXAMPLES if example != "chat"]
    rows = {tuple(words[2:]) for made in others for words in made}
    fewer = [[*words, "--count", "3" if "--held-out" in words else "60"] for words in rows]
    runs = {name: trains(name) for name in EXAMPLES}
    for name, more in VARIANTS.items():
        runs[name] = ("sft", flags(COMMON | {"output_dir": f"runs/{name}"} | more))
    told = place / "runs.json"
    told.write_text(json.dumps({"rows": sorted(fewer), "runs": runs}))
    done = subprocess.run(
        [sys.executable, SCRIPT, told], capture_output=True, text=True, timeout=900, cwd=place
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "{'loss'" not in done.stdout  # the trainer's own way to tell
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
    return place / "runs", {line["run"]: line["said"] for line in map(json.loads, lines)}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter" / "manifest.json").read_text())


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_each_method_has_an_example():
    assert {trains(example)[0] for example in EXAMPLES} == METHODS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXAMPLES, *VARIANTS])
def test_each_way_to_train_is_served_exactly_or_says_that_it_is_not(trained, name: str):
    out, said = trained
    if name == "qlora" and find_spec("bitsandbytes") is None:
        assert said[name].endswith("not installed: pip install bitsandbytes==0.50.2")
        return
    assert said[name] == "published"
    if name in UNSERVED:
        assert not (out / name / "adapter" / "manifest.json").exists()
        return
    told = manifest(out / name)
    assert 0 <= told["evaluation"]["max_logprob_error"] <= EXACT
    assert told["kind"] == ("verifier" if name == "verifier" else "policy")
    assert told["recipe"]["learning_rate"]
    assert told["recipe"]["base_quantization"] == ("nf4" if name == "qlora" else None)
    assert told["compute"]["tokens"] > 0
    assert (out / name / "adapter" / "README.md").exists()
    if name in VARIANTS:
        assert told["data"].keys() == {"demonstrations.jsonl"}
    if name == "dora":
        assert 0 < told["evaluation"]["conversion_error"] < 0.1


@pytest.mark.slow
def test_the_same_seed_makes_the_same_bytes_and_so_does_a_resumed_run(trained):
    out, _ = trained
    assert weights(out / "whole") == weights(out / "again") == weights(out / "resumed")
    assert weights(out / "whole") != weights(out / "near")


@pytest.mark.slow
def test_a_finished_adapter_tells_what_it_is_worth(trained):
    out, _ = trained
    found = manifest(out / "sft")["evaluation"]
    assert found["task.problems"] == 3
    assert 0 <= found["task.accuracy"] <= 1
    assert found["task.answer_tokens"] > 0
    report = json.loads((out / "sft" / "data_report.json").read_text())
    assert report["rows"] == report["kept"] == 60
    told = log(out / "sft")
    assert [line["step"] for line in told if "loss" in line] == [1, 2]
    assert [line["step"] for line in told if "eval_loss" in line] == [2]
    assert {"general.accuracy", "task.accuracy"} <= manifest(out / "replay")["evaluation"].keys()
    pissa = load_file(out / "pissa" / "adapter" / "adapter_model.safetensors")
    assert {weight.shape[0] for key, weight in pissa.items() if "lora_A" in key} == {16}


@pytest.mark.slow
def test_tensorboard_is_told_what_the_log_is_told(trained):
    out, _ = trained
    (folder,) = (out / "sft" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx({line["step"]: line["loss"] for line in log(out / "sft")[:2]})


@pytest.mark.slow
def test_two_processes_train_together_and_one_publishes(
    trained, two: subprocess.Popen[str], place: Path
):
    out, _ = trained
    _, errors = two.communicate(timeout=280)
    assert two.returncode == 0, errors[-8000:]
    said = {
        path.relative_to(path.parents[1]).as_posix(): path.read_text()
        for path in (place / "said").rglob("std*.log")
    }
    assert said["1/stdout.log"] == said["1/stderr.log"] == said["0/stderr.log"] == ""
    assert "step 2/2  loss" in said["0/stdout.log"]
    assert said["0/stdout.log"].count("published") == 1
    assert "{'loss'" not in said["0/stdout.log"]
    assert manifest(out / "two")["compute"]["processes"] == 2
    alone, together = (log(out / name)[0]["num_tokens"] for name in ("chat", "two"))
    assert 1.5 < together / alone < 2.5


def test_what_the_processes_at_hand_cannot_do_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it for good
    with pytest.raises(SystemExit, match="'fsdp' splits the base over GPUs"):
        training.run("sft", [*flags(COMMON | {"output_dir": "runs/split"}), "--fsdp"], prog="test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="start it without torchrun"):
        training.run(*trains("grpo"), prog="test")
