"""Adapters as they are trained, and as they are served.

vLLM serves plain LoRA: A and B of one rank, on a base that nothing else has changed. PiSSA and
OLoRA change the base, and are written as the difference, which is exact and twice the rank. DoRA
scales rows, and is approximated by the best LoRA of a rank. IA3 and prefixes are served by nobody.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import save_file

from finetune.keys import Keys

_UNSERVED = {"lm_head", "embed_tokens"}
VIRTUAL_TOKENS = 20
"""Of a prefix."""


def configured(keys: Keys, *, scored: bool) -> PeftConfig:
    """What peft is to make.

    Raises:
        SystemExit: The keys contradict each other, or ask for what cannot be served.
    """
    task, model = keys.task, keys.model
    kind = "SEQ_CLS" if scored else "CAUSAL_LM"
    plain = task.peft_method == "lora"
    if not plain and (model.use_dora or model.use_rslora or task.init_lora_weights != "default"):
        raise SystemExit(
            f"'use_dora', 'use_rslora' and 'init_lora_weights' are of lora, not {task.peft_method}"
        )
    if task.peft_method == "prefix":
        return PrefixTuningConfig(task_type=kind, num_virtual_tokens=VIRTUAL_TOKENS)
    if task.peft_method == "ia3":
        targets = ["k_proj", "v_proj", "down_proj"]
        return IA3Config(task_type=kind, target_modules=targets, feedforward_modules=["down_proj"])
    targets = model.lora_target_modules or ["all-linear"]
    if _UNSERVED & set(targets):
        raise SystemExit("'lora_target_modules': vLLM serves no adapter of embeddings or head")
    if model.use_dora and task.init_lora_weights != "default":
        raise SystemExit("'use_dora' and 'init_lora_weights' exclude each other")
    return LoraConfig(
        task_type=kind,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        init_lora_weights=True if task.init_lora_weights == "default" else task.init_lora_weights,
        bias="none",
    )


@dataclass(frozen=True, slots=True)
class Saved:
    """What was written."""

    rank: int
    servable: bool
    error: float | None = None
    """Of what is served in place of what was trained: the norm of the difference of both updates,
    relative to that of the trained one. None: nothing was converted."""


def save(model: PeftModel, folder: Path, *, initial: Path | None, rank: int) -> Saved:
    """Write the adapter so that vLLM serves it, if that can be.

    `initial` is the adapter before training, where the base was changed for it; `rank` is that of
    an approximation.
    """
    config = model.peft_config["default"]
    if not isinstance(config, LoraConfig):
        model.save_pretrained(str(folder), selected_adapters=["default"])
        return Saved(0, servable=False)
    if config.use_dora:
        return _approximated(model, config, folder, rank)
    if initial is not None:
        model.save_pretrained(
            str(folder),
            selected_adapters=["default"],
            path_initial_model_for_weight_conversion=str(initial),
        )
        return Saved(2 * config.r, servable=True)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    return Saved(config.r, servable=True)


def _approximated(model: PeftModel, config: LoraConfig, folder: Path, rank: int) -> Saved:
    """The best LoRA of a rank: the largest singular values of what DoRA adds to each weight.

    peft's own conversion leaves the magnitudes out, which is wrong by some 30 %.
    """
    weights: dict[str, torch.Tensor] = {}
    lost = whole = 0.0
    for name, layer in cast(Any, model).base_model.model.named_modules():
        if not hasattr(layer, "lora_magnitude_vector") or "default" not in cast(Any, layer).lora_A:
            continue
        update = _dora_update(layer)
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        root = values[:rank].sqrt()
        a, b = root[:, None] * right[:rank], left[:, :rank] * root
        weights[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = config.to_dict() | {"use_dora": False, "r": rank, "lora_alpha": rank}
    said |= {"use_rslora": False, "lora_dropout": 0.0, "inference_mode": True}
    said["target_modules"] = sorted(config.target_modules or [])
    said["peft_type"] = "LORA"
    said = {key: value for key, value in said.items() if _is_json(value)}
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=1) + "\n")
    return Saved(rank, servable=True, error=(lost / whole) ** 0.5 if whole else 0.0)


def _dora_update(layer: Any) -> torch.Tensor:
    """What DoRA adds to a weight, (outputs, inputs), in float32 (Liu et al. 2024)."""
    weight = layer.get_base_layer().weight.detach().float()
    a, b = (
        getattr(layer, name)["default"].weight.detach().float() for name in ("lora_A", "lora_B")
    )
    changed = weight + layer.scaling["default"] * (b @ a)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().float()
    return (magnitude / changed.norm(dim=1))[:, None] * changed - weight


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
