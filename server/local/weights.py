"""An adapter's configuration and tensors, compared with the model that it is for.

vLLM checks the configuration; what it would accept and then ignore, or answer wrongly with, is
found here.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors import safe_open as _safe_open  # pyright: ignore[reportUnknownVariableType]
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.platforms import current_platform

from server.adapters.folder import CONFIG, WEIGHTS
from server.errors import refusal
from server.wire import as_object
from strategies.core.errors import InvalidRequest

safe_open: Any = _safe_open
_MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

_PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not packed or quantised."""

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
                part = opened.get_slice(name)
                shape = part.get_shape()
                if part.get_dtype() not in _PLAIN:
                    return None
                if name.endswith(".weight") and len(shape) == 2:
                    found[name.removesuffix(".weight")] = (shape[0], shape[1])
    # Some models are stored under other names than they run by.
    usual = any(re.fullmatch(r"model\.layers\.\d+\..+", name) for name in found)
    return found if usual else None


def examine(folder: Path, served: Served) -> None:
    """Whether an adapter fits the model that is served, and would do what it was trained to.

    Reads all of its weights: not for the event loop.

    Raises:
        InvalidRequest: It does not; the message says which part.
    """
    helper = _helper(folder / CONFIG, served.lora)
    sides: dict[str, dict[str, torch.Size]] = {}
    acting: set[str] = set()
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
                tensor = tensor.float()
                if not tensor.isfinite().all():
                    raise _refused(f"'{key}' holds numbers that are not finite")
                acting |= {match["side"]} if tensor.any() else set[str]()
                sides.setdefault(match["layer"], {})[match["side"]] = tensor.shape
    except (SafetensorError, OSError) as error:
        raise _refused(f"{WEIGHTS} is damaged: {error}") from None
    if not sides:
        raise _refused(f"{WEIGHTS} holds no matrix")
    for side in sorted({"A", "B"} - acting):
        raise _refused(f"it does nothing: all lora_{side} are zero")
    for layer, shapes in sides.items():
        try:
            rank, scaling = helper.get_rank_and_scaling(layer)
        except Exception as error:  # of the patterns, which are regular expressions
            raise _refused(f"{CONFIG}: {error}") from None
        if not isfinite(scaling) or abs(scaling) > torch.finfo(torch.float16).max:
            raise _refused(f"{CONFIG} scales '{layer}' by {scaling:g}")
        if not scaling:
            raise _refused(f"it does nothing: {CONFIG} scales '{layer}' by 0")
        _fits(layer, shapes, rank, served)


class _Config(BaseModel):
    """The fields of peft's configuration that vLLM reads, with their types."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    r: int
    lora_alpha: float
    target_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False


def _helper(path: Path, lora: LoRAConfig) -> PEFTHelper:
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
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        raise _refused(f"{CONFIG}: {refusal(error, inside='')}") from None
    known: dict[str, Any] = {
        field.name: config[field.name] for field in fields(PEFTHelper) if field.name in config
    }
    try:
        helper = PEFTHelper.from_dict(known)  # pyright: ignore[reportUnknownMemberType]
        helper.validate_legal(lora)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _refused(str(error)) from None
    return helper


def _fits(layer: str, shapes: Mapping[str, torch.Size], rank: int, served: Served) -> None:
    name = layer.rsplit(".", 1)[-1]
    targets: Collection[str] | None = served.lora.target_modules
    if targets is not None and name not in targets:
        raise _refused(
            f"'{layer}' would be ignored: this server adapts {', '.join(sorted(targets))} only "
            "(--lora-target-modules)"
        )
    if name == "lm_head" and current_platform.is_cpu():
        # Which rows of prompt log-probabilities are its own is not told there (see `cpu.py`).
        raise _refused("on a CPU no adapter of the output layer is served")
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
