"""An adapter's configuration and tensors, compared with the model that it is for.

vLLM checks the configuration; what it would accept and then ignore, or answer wrongly with, is
found here.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import safe_open as _safe_open  # pyright: ignore[reportUnknownVariableType]
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

from server.adapters.folder import CONFIG, WEIGHTS
from server.wire import as_object
from strategies.core.errors import InvalidRequest

safe_open: Any = _safe_open
_MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

Layers = Mapping[str, tuple[int, int]]
"""By name, a linear layer's (outputs, inputs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What adapters have to fit."""

    layers: Layers | None
    """None where the model's files do not say."""
    lora: LoRAConfig


def layers(model: Path) -> Layers | None:
    """The linear layers in a model's folder; None if it has no plain safetensors files."""
    found: dict[str, tuple[int, int]] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                shape = opened.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2:
                    found[name.removesuffix(".weight")] = (shape[0], shape[1])
    # Quantised layers are packed, and some models are stored under other names than they run by.
    usual = any(re.fullmatch(r"model\.layers\.\d+\..+", name) for name in found)
    return found if usual else None


def examine(folder: Path, served: Served) -> None:
    """Whether an adapter fits the model that is served, and would do what it was trained to.

    Reads all of its weights: not for the event loop.

    Raises:
        InvalidRequest: It does not; the message says which part.
    """
    helper = _helper(folder / CONFIG)
    try:
        helper.validate_legal(served.lora)
    except ValueError as error:
        raise _refused(str(error)) from None
    sides: dict[str, dict[str, torch.Size]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                match = _MATRIX.fullmatch(key)
                if match is None:
                    raise _refused(
                        f"'{key[:200]}' is no matrix of a LoRA; those are called "
                        "base_model.model.<layer>.lora_A.weight and …lora_B.weight"
                    )
                tensor: torch.Tensor = opened.get_tensor(key)
                if not tensor.is_floating_point() or tensor.dim() != 2:
                    raise _refused(f"'{key}' is no matrix of floating-point numbers")
                if not tensor.isfinite().all():
                    raise _refused(f"'{key}' holds numbers that are not finite")
                sides.setdefault(match["layer"], {})[match["side"]] = tensor.shape
    except (SafetensorError, OSError) as error:
        raise _refused(f"{WEIGHTS} is damaged: {error}") from None
    if not sides:
        raise _refused(f"{WEIGHTS} holds no matrix")
    for layer, shapes in sides.items():
        _fits(layer, shapes, helper.get_rank_and_scaling(layer)[0], served)


def _helper(path: Path) -> PEFTHelper:
    try:
        config = as_object(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise _refused(f"{CONFIG} is not JSON: {error}") from None
    if config is None:
        raise _refused(f"{CONFIG} is not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(f"an adapter of kind '{str(kind)[:50]}' cannot be served; LORA can")
    if config.get("fan_in_fan_out") or config.get("trainable_token_indices"):
        raise _refused("'fan_in_fan_out' and 'trainable_token_indices' cannot be served")
    known: dict[str, Any] = {
        field.name: config[field.name] for field in fields(PEFTHelper) if field.name in config
    }
    try:
        return PEFTHelper.from_dict(known)  # pyright: ignore[reportUnknownMemberType]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _refused(f"{CONFIG}: {error}") from None


def _fits(layer: str, shapes: Mapping[str, torch.Size], rank: int, served: Served) -> None:
    name = layer.rsplit(".", 1)[-1]
    targets: Collection[str] | None = served.lora.target_modules
    if targets is not None and name not in targets:
        raise _refused(
            f"'{layer}' would be ignored: this server adapts {', '.join(sorted(targets))} only "
            "(--lora-target-modules)"
        )
    if set(shapes) != {"A", "B"}:
        raise _refused(f"of '{layer}' there is only lora_{next(iter(shapes))}")
    a, b = shapes["A"], shapes["B"]
    if a[0] != rank or b[1] != rank:
        raise _refused(
            f"the matrices of '{layer}' have rank {a[0]} and {b[1]}, and {CONFIG} says {rank}"
        )
    if served.layers is None or ".experts" in layer:
        return
    if layer not in served.layers:
        raise _refused(f"the model has no layer '{layer[:200]}'")
    outputs, inputs = served.layers[layer]
    if (b[0], a[1]) != (outputs, inputs):
        raise _refused(
            f"the matrices of '{layer}' are for {a[1]} inputs and {b[0]} outputs; the model's "
            f"layer has {inputs} and {outputs}"
        )


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"the adapter cannot be served: {why}", field="path")
