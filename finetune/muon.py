"""Muon (Jordan et al. 2024) in float32: momentum, orthogonalised by a Newton-Schulz iteration.

`torch.optim.Muon` iterates in bfloat16, which processors without bfloat16 instructions run some 25
times slower than float32; on those it would cost more than the forward and backward passes
together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For two-dimensional weights only; embeddings, norms and heads belong to another optimizer."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iterations: int = 5,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """With several `ranks`, each orthogonalises its share and tells the others."""
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "iterations": iterations,
            },
        )
        self.rank, self.ranks = rank, ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Apply one update from the gradients at hand; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])  # Nesterov
                owner = index % self.ranks
                if owner == self.rank:
                    update = orthogonalised(update, group["iterations"]).contiguous()
                if self.ranks > 1:
                    dist.broadcast(update, src=owner)
                # A wide matrix keeps unit update size per output; a tall one needs more.
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """The nearest matrix, (rows, columns), with all singular values near one."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
