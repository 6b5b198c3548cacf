"""Mends three faults of vLLM 0.32 on CPU; knows nothing of Mull and does nothing until called."""

import os
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, TypeAlias

import psutil

if TYPE_CHECKING:
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

Rows: TypeAlias = "slice | torch.Tensor"
"""Rows of a batch: a slice where they are neighbours, because indexing copies."""


def mend() -> None:
    """Mend LoRA and seeds on CPU, once a process; elsewhere do nothing.

    It is called before the engine's process is forked, and by vLLM itself in every process that
    is spawned (entry point `vllm.general_plugins`).
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        mend_lora()
        mend_seed()


@cache
def mend_lora() -> None:
    """Apply an adapter to the rows of its own requests only, all of them in one product.

    vLLM indexes the stacked adapters by every token's slot. A base request's slot is -1: once all
    slots are filled, that is the last adapter (vllm#48421). The index also copies an adapter's
    weights for every token, which made decoding three times slower than without adapters.
    """
    from vllm.lora.punica_wrapper import punica_cpu

    class Grouped(punica_cpu.PunicaWrapperCPU):
        """A step's rows grouped by slot; rows of the base model are in no group."""

        def update_metadata(
            self,
            mapping: "LoRAMapping",
            lora_index_to_id: list[int | None],
            max_loras: int,
            vocab_size: int,
            **kwargs: object,
        ) -> None:
            super().update_metadata(  # pyright: ignore[reportUnknownMemberType]
                mapping, lora_index_to_id, max_loras, vocab_size, **kwargs
            )
            self._tokens = _rows_by_slot(mapping.index_mapping, lora_index_to_id)
            self._samples = _rows_by_slot(mapping.prompt_mapping, lora_index_to_id)
            self._sample_count = len(mapping.prompt_mapping)

        def add_lora_linear(
            self,
            y: "torch.Tensor",
            x: "torch.Tensor",
            lora_a_stacked: "tuple[torch.Tensor, ...]",
            lora_b_stacked: "tuple[torch.Tensor, ...]",
            scale: float,
            output_slices: tuple[int, ...],
            *,
            buffer: "tuple[torch.Tensor, ...] | None" = None,
            **kwargs: object,
        ) -> None:
            """Add `x @ A @ B * scale` to each slice of `y`'s columns; `buffer` is not needed."""
            for slot, rows in self._tokens:
                inputs, start = x[rows], 0
                for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                    columns = y[:, start : start + width]
                    _expand(columns, rows, _shrink(inputs, a[slot, 0], scale), b[slot, 0])
                    start += width

        def add_shrink(
            self,
            y: "tuple[torch.Tensor, ...] | torch.Tensor",
            x: "torch.Tensor",
            lora_a_stacked: "tuple[torch.Tensor, ...]",
            scale: float,
            **kwargs: object,
        ) -> None:
            """Set `y[i] = x @ A[i] * scale`: half of a linear layer, when adapters are sharded."""
            x = x.view(-1, x.shape[-1])
            for slot, rows in self._tokens:
                for output, a in zip(y, lora_a_stacked, strict=True):
                    output[rows] = _shrink(x[rows], a[slot, 0], scale).to(output.dtype)

        def add_expand(
            self,
            y: "torch.Tensor",
            x: "tuple[torch.Tensor, ...] | torch.Tensor",
            lora_b_stacked: "tuple[torch.Tensor, ...]",
            output_slices: tuple[int, ...],
            offset_start: int = 0,
            add_inputs: bool = True,
            **kwargs: object,
        ) -> None:
            """Add `x[i] @ B[i]` to each slice of `y`'s columns: the other half."""
            y = y.view(-1, y.shape[-1])
            for slot, rows in self._tokens:
                start = offset_start
                for shrunk, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                    columns = y[:, start : start + width]
                    _expand(columns, rows, shrunk[rows], b[slot, 0], add=add_inputs)
                    start += width

        def add_lora_embedding(
            self,
            y: "torch.Tensor",
            x: "torch.Tensor",
            lora_b_stacked: "torch.Tensor",
            add_inputs: bool = True,
            **kwargs: object,
        ) -> None:
            """Add `x @ B` to `y`, where `x` is what A holds for each token."""
            for slot, rows in self._tokens:
                _expand(y, rows, x[rows], lora_b_stacked[slot, 0], add=add_inputs)

        def add_lora_logits(
            self,
            y: "torch.Tensor",
            x: "torch.Tensor",
            lora_a_stacked: "torch.Tensor",
            lora_b_stacked: "torch.Tensor",
            scale: float,
            *,
            buffer: "torch.Tensor | None" = None,
            **kwargs: object,
        ) -> None:
            """Add `x @ A @ B * scale` to `y`, whose vocabulary may be padded differently."""
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            width = min(y.shape[-1], lora_b_stacked.shape[-2])
            for slot, rows in self._sampled(len(x), lora_b_stacked):
                shrunk = _shrink(x[rows], lora_a_stacked[slot, 0], scale)
                _expand(y[:, :width], rows, shrunk, lora_b_stacked[slot, 0, :width])

        def _sampled(self, count: int, lora_b_stacked: "torch.Tensor") -> "list[tuple[int, Rows]]":
            """The groups of `count` rows of logits.

            One row a sample, except for log-probabilities of a prompt: those rows are one
            request's, and vLLM does not say whose.

            Raises:
                RuntimeError: It matters whose.
            """
            if count == self._sample_count:
                return self._samples
            groups = [group for group in self._samples if lora_b_stacked[group[0]].any()]
            if not groups:
                return []
            slot, rows = groups[0]
            if isinstance(rows, slice) and rows == slice(0, self._sample_count):
                return [(slot, slice(0, count))]
            raise RuntimeError("prompt log-probabilities beside an adapter of the output layer")

    punica_cpu.PunicaWrapperCPU = Grouped


def _rows_by_slot(
    adapters: Iterable[int], adapter_by_slot: list[int | None]
) -> "list[tuple[int, Rows]]":
    """The rows of each slot, given each row's adapter; 0 is the base model, which has no slot."""
    import torch

    rows_by_adapter: dict[int, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter > 0:
            rows_by_adapter.setdefault(adapter, []).append(row)
    groups: list[tuple[int, Rows]] = []
    for adapter, rows in rows_by_adapter.items():
        first, end = rows[0], rows[-1] + 1
        neighbours = end - first == len(rows)
        group = slice(first, end) if neighbours else torch.tensor(rows)
        groups.append((adapter_by_slot.index(adapter), group))
    return groups


def _shrink(x: "torch.Tensor", a: "torch.Tensor", scale: float) -> "torch.Tensor":
    product = x.to(a.dtype) @ a.t()
    return product if scale == 1 else product * scale


def _expand(
    y: "torch.Tensor", rows: Rows, shrunk: "torch.Tensor", b: "torch.Tensor", *, add: bool = True
) -> None:
    if not add:
        y[rows] = 0
    shrunk, b = shrunk.to(y.dtype), b.to(y.dtype).t()
    if isinstance(rows, slice):
        y[rows].addmm_(shrunk, b)
    else:
        y.index_add_(0, rows, shrunk @ b)


@cache
def mend_seed() -> None:
    """Keep a seeded request's generator still while its prompt is computed in chunks.

    vLLM samples a token after every chunk, throws it away and winds the generator back by an
    offset, which CPU generators do not have: that error ends the engine.
    """
    from vllm.v1.worker import cpu_worker
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    class Seeded(CPUModelRunner):
        """A row whose token will be thrown away lends no generator: nothing to wind back."""

        def _sample(
            self,
            logits: "torch.Tensor | None",
            spec_decode_metadata: "SpecDecodeMetadata | None",
        ) -> "SamplerOutput":
            with self._unseeded():
                return super()._sample(logits, spec_decode_metadata)

        def _bookkeeping_sync(
            self,
            scheduler_output: "SchedulerOutput",
            sampler_output: "SamplerOutput",
            logits: "torch.Tensor | None",
            hidden_states: "torch.Tensor",
            num_scheduled_tokens: int,
        ):
            with self._unseeded():
                return super()._bookkeeping_sync(
                    scheduler_output, sampler_output, logits, hidden_states, num_scheduled_tokens
                )

        @contextmanager
        def _unseeded(self) -> Generator[None]:
            generators = self.input_batch.generators
            discarded = self.discard_request_mask.np
            held = {row: generators.pop(row) for row in list(generators) if discarded[row]}
            try:
                yield
            finally:
                generators.update(held)

    cpu_worker.CPUModelRunner = Seeded  # pyright: ignore[reportPrivateImportUsage]


class Guard:
    """Ends an engine that outlives its API process; vLLM adds it to the worker's bases.

    Pass it as `worker_extension_cls`, then call it with the API process's own number:
    `await engine.collective_rpc("guard", args=(os.getpid(),))`.
    """

    def guard(self, api_pid: int) -> bool:
        """Watch the process from now on; False if it is no ancestor, as on another machine.

        The parent's number would not do: the worker may be a child of the engine's process, which
        has no watch of its own.
        """
        between: list[psutil.Process] = []
        for ancestor in psutil.Process().parents():
            if ancestor.pid == api_pid:
                watch = Thread(
                    target=_die_after, args=(ancestor, between), name="mull-guard", daemon=True
                )
                watch.start()
                return True
            between.append(ancestor)
        return False


def _die_after(api: psutil.Process, between: list[psutil.Process]) -> None:
    """End this process, and those between it and the API process, once that has ended.

    A death signal (prctl) would be simpler, but it also fires when the thread that started the
    engine ends. Nobody is left to answer, so nothing is asked or cleaned up.
    """
    with suppress(psutil.NoSuchProcess):
        while api.is_running() and api.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    for process in between:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)
