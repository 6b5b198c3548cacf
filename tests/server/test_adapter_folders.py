"""Adapters are looked at before the engine sees them: what is refused, and in which words."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.lora import LoRAConfig

from models import MULL_TINY
from server.adapters.folder import CONFIG, WEIGHTS, inside, take_in
from server.local.weights import Served, examine, layers
from strategies.core.errors import InvalidRequest

RANK = 4
SERVED = Served(layers=layers(MULL_TINY), lora=LoRAConfig(max_lora_rank=16))
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model as peft saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MULL_TINY)
    config = LoraConfig(
        r=RANK,
        target_modules=["q_proj", "o_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.o_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    folder = tmp_path_factory.mktemp("adapters") / "sound"
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return changed


def put(side: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    key = Q.format(side)
    return tensors(lambda held: held.update({key: make(held[key]).contiguous()}))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def rename(held: dict[str, torch.Tensor]) -> None:
        for key in list(held):
            held[key.replace(old, new)] = held.pop(key)

    return tensors(rename)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 1] = float("nan")
    return tensor


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "bad JSON": (lambda folder: (folder / CONFIG).write_text("{"), "not JSON"),
    "JSON of another kind": (lambda folder: (folder / CONFIG).write_text("[]"), "not a JSON obj"),
    "no rank": (
        lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA"}'),
        "r: Field required",
    ),
    "rank of another type": (config(r="x"), "adapter_config.json: "),
    "corrupt": (cut, "damaged"),
    "foreign bytes": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 999), "damaged"),
    "a pickle": (pickled, "is a pickle|are a pickle"),
    "a link out": (
        lambda folder: (
            (folder / "README.md").unlink(missing_ok=True)
            or (folder / "README.md").symlink_to("/etc/passwd")
        ),
        "link out of",
    ),
    "a directory for a file": (
        lambda folder: (folder / CONFIG).unlink() or (folder / CONFIG).mkdir(),
        "no regular file",
    ),
    "a pipe": (
        lambda folder: (folder / CONFIG).unlink() or os.mkfifo(folder / CONFIG),
        "no regular file",
    ),
    "a long configuration": (config(padding="x" * (1 << 20)), "more than the 1048576 bytes"),
    "rank above the server's": (config(r=32), "greater than max_lora_rank 16"),
    "rank unlike the weights": (config(r=8), "rank 4 and 4, and adapter_config.json says 8"),
    "shapes of a smaller layer": (put("B", lambda b: b[:-8]), "256 inputs and 248 outputs"),
    "inputs of a smaller layer": (put("A", lambda a: a[:, :-8]), "248 inputs"),
    "not a number": (put("A", poisoned), "not finite"),
    "whole numbers": (put("A", lambda a: a.int()), "floating-point"),
    "an extra layer": (renamed("layers.4", "layers.99"), "no layer 'model.layers.99"),
    "another prefix": (
        renamed("model.model.layers", "model.model.language_model.layers"),
        "no layer 'model.language_model",
    ),
    "prefix left out": (renamed("base_model.model.model", "model"), "no matrix of a LoRA"),
    "half a pair": (tensors(lambda held: held.pop(Q.format("B"))), "only lora_A"),
    "an adapter's name in the keys": (renamed("lora_A.", "lora_A.default."), "no matrix of a LoRA"),
    "the model's own weights": (
        tensors(lambda held: held.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
        "'base_model.model.lm_head.weight' is no matrix",
    ),
    "no matrix at all": (tensors(lambda held: held.clear()), "holds no matrix"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "saved modules": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (config(bias="all"), "bias"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights"),
    "aLoRA": (config(alora_invocation_tokens=[1]), "aLoRA"),
    "layer replication": (config(layer_replication=[[0, 1]]), "layer_replication"),
    "QALoRA": (config(use_qalora=True), "QALoRA"),
    "IA3": (config(peft_type="IA3"), "kind 'IA3'"),
    "prefix tuning": (config(peft_type="PREFIX_TUNING"), "kind 'PREFIX_TUNING'"),
}


def looked_at(folder: Path, into: Path, served: Served = SERVED) -> str:
    into.mkdir()
    digest = take_in(folder, folder.parent, into, most_bytes=1 << 20)
    examine(into, served)
    return digest


def test_a_sound_adapter_is_taken_in_with_its_own_files_only(sound: Path, tmp_path: Path):
    folder = tmp_path / "given"
    shutil.copytree(sound, folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    digest = looked_at(folder, tmp_path / "taken")
    names = {path.name for path in (tmp_path / "taken").iterdir()}
    assert names <= {CONFIG, WEIGHTS, "README.md", "manifest.json"}
    assert (tmp_path / "taken" / WEIGHTS).read_bytes() == (sound / WEIGHTS).read_bytes()
    assert digest == looked_at(folder, tmp_path / "again")
    config(lora_alpha=3)(folder)
    assert digest != looked_at(folder, tmp_path / "other")


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_adapters_are_refused_by_what_is_wrong(broken: str, sound: Path, tmp_path: Path):
    folder = tmp_path / "given"
    shutil.copytree(sound, folder)
    change, words = BROKEN[broken]
    change(folder)
    with pytest.raises(InvalidRequest, match=words) as refused:
        looked_at(folder, tmp_path / "taken")
    assert refused.value.field == "path"
    assert len(str(refused.value)) < 600


def test_weights_are_bounded_and_targets_have_to_be_served(sound: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InvalidRequest, match="more than the 1000 bytes"):
        take_in(sound, sound.parent, tmp_path / "taken", most_bytes=1000)
    served = Served(layers=None, lora=LoRAConfig(max_lora_rank=16, target_modules=["q_proj"]))
    with pytest.raises(InvalidRequest, match="would be ignored: this server adapts q_proj only"):
        looked_at(sound, tmp_path / "targets", served)
    served = Served(layers=None, lora=LoRAConfig(max_lora_rank=16))
    looked_at(sound, tmp_path / "unknown", served)


def test_folders_come_from_where_the_operator_says(sound: Path, tmp_path: Path):
    root = sound.parent
    assert inside(root, "sound") == inside(root, str(sound)) == sound.resolve()
    (root / "away").symlink_to(tmp_path)
    for outside in ("../", "/etc", "away", "nowhere", "sound/" + CONFIG, "x" * 5000, "a\0b"):
        with pytest.raises(InvalidRequest, match="no such folder"):
            inside(root, outside)
    with pytest.raises(InvalidRequest, match="MULL_ADAPTER_IMPORTS"):
        inside(None, "sound")
