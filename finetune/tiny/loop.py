"""Data-parallel training on CPU processes, shared by pretraining and adapters.

One process a core (gloo), one thread each, float32: on two cores that makes some three times the
tokens of one process with two threads.
"""

import argparse
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.problems import Example

IGNORED = -100

BATCHES_PER_POOL = 12
"""Sequences are sorted by length within a pool of this many batches, which keeps padding small."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: its tokens, what follows each (or `IGNORED`), and what each of those weighs."""

    ids: list[int]
    follows: list[int]
    weight: float = 1.0


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs, what follows them, and weights, each (batch, length)."""


@dataclass(frozen=True, slots=True)
class Done:
    """What has been done after a step."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    """Smoothed over some twenty steps."""


def flags(parser: argparse.ArgumentParser, recipe: dict[str, Any]) -> None:
    """One flag for each field of a recipe, with its value as the default."""
    for name, value in recipe.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help="default %(default)s",
        )


def processes(work: Callable[..., None], count: int, *arguments: object) -> None:
    """Run `work(rank, *arguments)` in `count` processes that can reduce over each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Whoever ends this process ends its children, too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        spawn(_process, args=(work, count, port, arguments), nprocs=count, daemon=True)
    finally:
        signal.signal(signal.SIGTERM, before)


def _process(
    rank: int, work: Callable[..., None], count: int, port: int, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count
    )
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def descend(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[Batch],
    *,
    steps: int,
    schedule: Callable[[int], float],
    done: Done | None = None,
) -> Iterator[Done]:
    """Train from `done`, or from nothing, to `steps`; one item after each step.

    `schedule(step)` scales the rates that the optimizers came with.
    """
    done = done or Done()
    rates = [
        [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    parallel = DistributedDataParallel(_Loss(model))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    pad = model.config.pad_token_id
    tokens, loss = done.tokens, done.loss
    started = time.monotonic() - done.seconds
    shown = dist.get_rank() == 0
    with tqdm(
        total=steps, initial=done.steps, unit="step", disable=not shown, mininterval=2
    ) as bar:
        for step in range(done.steps, steps):
            for optimizer, initial in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = rate * schedule(step)
            inputs, follows, weights = next(batches)
            value = parallel(inputs, follows, weights)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            count = inputs.ne(pad).sum()
            dist.all_reduce(count)
            tokens += int(count)
            loss = value.item() if loss == 0 else 0.95 * loss + 0.05 * value.item()
            seconds = time.monotonic() - started
            bar.set_postfix_str(
                f"loss {loss:.3f}, {tokens / 1e6:.2f} M tokens, {tokens / seconds:,.0f}/s",
                refresh=False,
            )
            bar.update()
            yield Done(step + 1, tokens, seconds, loss)


class _Loss(torch.nn.Module):
    """The weighted mean loss of one batch; logits are made only where something follows."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        assert head is not None
        self.head = head

    def forward(
        self, inputs: torch.Tensor, follows: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.decoder(input_ids=inputs, use_cache=False).last_hidden_state
        told = follows.ne(IGNORED)
        losses = cross_entropy(self.head(hidden[told]), follows[told], reduction="none")
        return (losses * weights[told]).sum() / weights[told].sum()


def imitated(tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
    """The solution is to be written."""
    asked = tokenizer(tokenizers.render(example.system, example.prompt)).input_ids
    solved = tokenizer(example.solution + tokenizers.END).input_ids
    return Row(asked + solved, [IGNORED] * (len(asked) - 1) + solved + [IGNORED])


def judged(
    tokenizer: PreTrainedTokenizerFast, example: Example, *, role: str, weight: float = 1.0
) -> Row:
    """Each token of the solution is to be followed by a verdict on everything up to it.

    `role` is whose turn the solution is. Verdicts are read at the ends of lines only, but a verdict
    on every token is learned sooner (Cobbe et al. 2021, arXiv:2110.14168). There are none after the
    first wrong line (as in Lightman et al. 2023, arXiv:2305.20050): that those lines are worthless
    is known, and would teach no more than that late lines are.
    """
    assert example.right is not None
    asked = tokenizer(tokenizers.render(example.system, example.prompt, role)).input_ids
    written = example.solution + tokenizers.END
    solved = tokenizer(written, return_offsets_mapping=True)
    good, bad = verdicts(tokenizer)
    right = len(written) if example.right == len(example.solution) else example.right
    last = example.solution.find("\n", right) + 1 or len(written)
    follows = [
        (good if end <= right else bad) if start < last else IGNORED
        for start, end in solved["offset_mapping"]
    ]
    return Row(asked + solved.input_ids, [IGNORED] * len(asked) + follows, weight)


def verdicts(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The tokens that say good and bad."""
    return token_id(tokenizer, tokenizers.GOOD), token_id(tokenizer, tokenizers.BAD)


def line_ends(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens after which a verdict is due."""
    return {token_id(tokenizer, tokenizers.END), tokenizer("\n").input_ids[0]}


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Of a special token."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


def pooled(
    rows: Callable[[int], Iterator[Row]], *, batch: int, pad: int, seed: str, start: int = 0
) -> Iterator[Batch]:
    """Endless batches from step `start` on.

    `rows(pool)` draws the rows of one pool; a pool depends on nothing but its number. The order of
    the batches depends on `seed` alone, so that ranks which share it get equal lengths together.
    """
    pool, skip = divmod(start, BATCHES_PER_POOL)
    while True:
        drawn = rows(pool)
        together = [next(drawn) for _ in range(batch * BATCHES_PER_POOL)]
        together.sort(key=lambda row: len(row.ids))
        batches = [together[at : at + batch] for at in range(0, len(together), batch)]
        random.Random(f"order {seed} {pool}").shuffle(batches)
        for one in batches[skip:]:
            yield padded(one, pad)
        pool, skip = pool + 1, 0


def padded(rows: Sequence[Row], pad: int) -> Batch:
    """The rows side by side."""
    width = -(-max(len(row.ids) for row in rows) // 8) * 8
    inputs = torch.full((len(rows), width), pad)
    follows = torch.full((len(rows), width), IGNORED)
    weights = torch.ones((len(rows), width))
    for at, row in enumerate(rows):
        inputs[at, : len(row.ids)] = torch.tensor(row.ids)
        follows[at, : len(row.ids)] = torch.tensor(row.follows)
        weights[at] = row.weight
    return inputs, follows, weights


def adamw(weights: Sequence[torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW without decay, as everything here uses it."""
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
