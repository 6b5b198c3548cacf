"""What a training took: tokens, floating-point operations, time and memory."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any

FORWARD, BACKWARD = 2, 4
"""Operations per parameter and token (Kaplan et al. 2020, arXiv:2001.08361)."""


@dataclass(slots=True)
class Ledger:
    """Starts when it is made. Changes as it is told."""

    frozen: int
    """Parameters that are not trained, embeddings left out."""
    trained: int
    tokens: int = 0
    """Read forwards and backwards."""
    sampled: int = 0
    """Generated to be learned from, by a model of this size."""
    _began: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    @property
    def flops(self) -> float:
        """Of a frozen weight the gradient is not needed, but it must pass through.

        What a reference or a teacher reads is not counted.
        """
        through = FORWARD + BACKWARD / 2
        learned = FORWARD + BACKWARD
        sampling = FORWARD * self.sampled * (self.frozen + self.trained)
        return sampling + self.tokens * (through * self.frozen + learned * self.trained)

    def figures(self) -> dict[str, float]:
        """For the manifest."""
        return {
            "tokens": float(self.tokens),
            "sampled_tokens": float(self.sampled),
            "flops": float(self.flops),
            "seconds": round(time.monotonic() - self._began, 1),
            "cpu_seconds": round(time.process_time() - self._cpu, 1),
            "peak_memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }


def sizes(model: Any) -> tuple[int, int]:
    """Parameters that stay and that are trained, without embeddings."""
    embedded = {id(weight) for weight in model.get_input_embeddings().parameters()}
    sizes = {True: 0, False: 0}
    for weight in model.parameters():
        if id(weight) not in embedded:
            sizes[weight.requires_grad] += weight.numel()
    return sizes[False], sizes[True]
