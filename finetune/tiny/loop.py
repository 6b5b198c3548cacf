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
    """One sequence: its tokens, and what is to be said after each, or `IGNORED`."""

    ids: list[int]
    follows: list[int]
    early: list[int]
    """What an earlier layer is to say: the next token, as long as that is right."""


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs, what follows them, and what an earlier layer says, each (batch, length)."""


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
    loss: "Loss",
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
    parallel = DistributedDataParallel(loss)
    trained = [weight for weight in loss.parameters() if weight.requires_grad]
    tokens, mean = done.tokens, done.loss
    started = time.monotonic() - done.seconds
    shown = dist.get_rank() == 0
    with tqdm(
        total=steps, initial=done.steps, unit="step", disable=not shown, mininterval=2
    ) as bar:
        for step in range(done.steps, steps):
            for optimizer, initial in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = rate * schedule(step)
            inputs, follows, early = next(batches)
            value = parallel(inputs, follows, early)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            count = inputs.ne(loss.pad).sum()
            dist.all_reduce(count)
            tokens += int(count)
            mean = value.item() if mean == 0 else 0.95 * mean + 0.05 * value.item()
            seconds = time.monotonic() - started
            bar.set_postfix_str(
                f"loss {mean:.3f}, {tokens / 1e6:.2f} M tokens, {tokens / seconds:,.0f}/s",
                refresh=False,
            )
            bar.update()
            yield Done(step + 1, tokens, seconds, mean)


class Loss(torch.nn.Module):
    """The mean loss of one batch; logits are made only where something is to be said.

    With `exit_layer`, the layer of that number is to say what comes next as well, through the same
    norm and head (deep supervision, Lee et al. 2015, arXiv:1409.5185). The layers above then
    have something to compare with what was written, without which no verdict is learned.
    """

    def __init__(
        self, model: PreTrainedModel, *, exit_layer: int = 0, exit_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        assert head is not None
        self.head = head
        self.norm = self.decoder.get_submodule("norm")
        self.pad: int = model.config.pad_token_id
        self._exit_weight = exit_weight
        self._hidden: torch.Tensor | None = None
        if exit_layer:
            layer: torch.nn.Module = self.decoder.get_submodule(f"layers.{exit_layer - 1}")
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: torch.nn.Module, given: Any, hidden: Any) -> None:
        self._hidden = hidden[0] if isinstance(hidden, tuple) else hidden

    def forward(
        self, inputs: torch.Tensor, follows: torch.Tensor, early: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.decoder(input_ids=inputs, use_cache=False).last_hidden_state
        loss = self._told(hidden, follows)
        if self._hidden is not None:
            loss = loss + self._exit_weight * self._told(self.norm(self._hidden), early)
        return loss

    def _told(self, hidden: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        told = said.ne(IGNORED)
        return cross_entropy(self.head(hidden[told]), said[told])


def imitated(tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
    """The solution is to be written, or the results in it, if it is no way to the answer."""
    asked = tokenizer(tokenizers.render(example.system, example.prompt)).input_ids
    written = tokenizer(example.solution + tokenizers.END, return_offsets_mapping=True)
    solved = written.input_ids
    taught = example.taught or ((0, len(example.solution) + 1),)
    ends = (min(end, len(example.solution) + 1) for _, end in written["offset_mapping"])
    said = [
        token if any(begin < end <= last for begin, last in taught) else IGNORED
        for token, end in zip(solved, ends, strict=True)
    ]
    follows = [IGNORED] * (len(asked) - 1) + said + [IGNORED]
    return Row(asked + solved, follows, follows)


def judged(tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
    """Each token of the solution is to be followed by a verdict on everything up to it.

    The solution stands in the turn of a `verifier`. Verdicts are read at the ends of lines only,
    but a verdict on every token is learned sooner (Cobbe et al. 2021, arXiv:2110.14168). After the
    first wrong line (where Lightman et al. 2023, arXiv:2305.20050, end), only lines that are wrong
    by themselves have one, at their ends: that the others are worthless is known, and would teach
    no more than that late lines are.
    """
    assert example.right is not None
    asked = tokenizer(tokenizers.render(example.system, example.prompt, "verifier")).input_ids
    written = example.solution + tokenizers.END
    solved = tokenizer(written, return_offsets_mapping=True)
    good, bad = verdicts(tokenizer)
    right = len(written) if example.right > len(example.solution) else example.right
    last = example.solution.find("\n", right) + 1 or len(written)
    faulty = {min(end, len(example.solution)) for _, end in example.faults}
    faulty |= {len(written)} if len(example.solution) in faulty else set()
    follows = [
        (good if end <= right else bad) if start < last else (bad if end in faulty else IGNORED)
        for start, end in solved["offset_mapping"]
    ]
    early = [
        token if end <= right else IGNORED
        for token, (_, end) in zip(solved.input_ids, solved["offset_mapping"], strict=True)
    ]
    return Row(
        asked + solved.input_ids,
        [IGNORED] * len(asked) + follows,
        [IGNORED] * (len(asked) - 1) + early + [IGNORED],
    )


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
    early = torch.full((len(rows), width), IGNORED)
    for at, row in enumerate(rows):
        inputs[at, : len(row.ids)] = torch.tensor(row.ids)
        follows[at, : len(row.ids)] = torch.tensor(row.follows)
        early[at, : len(row.ids)] = torch.tensor(row.early)
    return inputs, follows, early


def adamw(weights: Sequence[torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW without decay, as everything here uses it."""
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
