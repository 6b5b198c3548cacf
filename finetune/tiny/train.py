"""Train `mull-tiny` from nothing: `python -m finetune.tiny.train --out models/mull-tiny`.

Data-parallel over CPU processes (gloo) in float32, Muon for the matrices and AdamW for the rest,
loss on the solution only. A run killed half-way continues from its last checkpoint, and draws the
same batches that it would have drawn.
"""

import argparse
import os
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.muon import Muon
from finetune.tiny.problems import training_items

BATCHES_PER_POOL = 12
"""Sequences are sorted by length within a pool of this many batches, which keeps padding small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights."""

    steps: int = 1500
    batch: int = 28
    seed: int = 0
    hidden: int = 256
    layers: int = 5
    intermediate: int = 704
    heads: int = 4
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: int = 50
    curriculum: int = 200
    decay: float = 0.5
    temperature: float = 0.8
    processes: int = 2
    init: str = ""
    """A finished model of the same shape to go on from, with its tokenizer; empty: from nothing."""


def main() -> None:
    """Parse the recipe, then train with one process a core."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mull-tiny"), help="where checkpoints go"
    )
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    defaults = Recipe()
    for name in Recipe.__slots__:
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help="default %(default)s",
        )
    options = vars(parser.parse_args())
    out, work, save_every = options.pop("out"), options.pop("work"), options.pop("save_every")
    recipe = Recipe(**options)
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_train, args=(recipe, out, work, save_every, port), nprocs=recipe.processes)


def _train(rank: int, recipe: Recipe, out: Path, work: Path, save_every: int, port: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // recipe.processes))
    torch.manual_seed(recipe.seed)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=recipe.processes
    )
    if recipe.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.init)
        model = LlamaForCausalLM.from_pretrained(recipe.init, dtype=torch.float32)
    else:
        tokenizer = tokenizers.build(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, tokenizer))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.muon_rate),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    checkpoint = work / "checkpoint.pt"
    done, tokens, spent = 0, 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)  # tensors and numbers only, never code
        if saved["recipe"] != repr(recipe):
            raise SystemExit(
                f"{checkpoint} was made by another recipe: {saved['recipe']}; choose another --work"
            )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done, tokens, spent = saved["step"], saved["tokens"], saved["seconds"]
    base_rates = (recipe.muon_rate, recipe.adam_rate)
    parallel = DistributedDataParallel(model)
    started = time.monotonic() - spent
    bar = tqdm(total=recipe.steps, initial=done, unit="step", disable=rank != 0, mininterval=2)
    smooth = 0.0
    for step, (inputs, labels) in enumerate(_batches(recipe, rank, tokenizer, done), done):
        if step == recipe.steps:
            break
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _schedule(recipe, step)
        loss = parallel(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        count = inputs.ne(_id(tokenizer, tokenizers.PAD)).sum()
        dist.all_reduce(count)
        tokens += int(count)
        smooth = loss.item() if smooth == 0 else 0.95 * smooth + 0.05 * loss.item()
        seconds = time.monotonic() - started
        bar.set_postfix_str(
            f"loss {smooth:.3f}, {tokens / 1e6:.2f} M tokens, {tokens / seconds:,.0f}/s",
            refresh=False,
        )
        bar.update()
        if rank == 0 and (step + 1) % save_every == 0:
            state = {
                "recipe": repr(recipe),
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "tokens": tokens,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    if rank == 0:
        bar.close()
        _save(model, tokenizer, recipe, out)
        seconds = time.monotonic() - started
        print(
            f"{recipe}: {tokens / 1e6:.2f} M tokens in {seconds / 60:.1f} min, "
            f"last loss {smooth:.3f} -> {out}"
        )
    dist.barrier()
    dist.destroy_process_group()


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_id(tokenizer, tokenizers.END),
        pad_token_id=_id(tokenizer, tokenizers.PAD),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


def _schedule(recipe: Recipe, step: int) -> float:
    """Warm up, stay, then decay linearly to nothing over the last `decay` of the steps."""
    decay_steps = recipe.steps * recipe.decay
    return min(1.0, (step + 1) / recipe.warm_up, (recipe.steps - step) / decay_steps)


def _batches(
    recipe: Recipe, rank: int, tokenizer: PreTrainedTokenizerFast, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(input_ids, labels)`, both (batch, length) int64.

    A pool depends on its number and the rank only.
    """
    pool = start // BATCHES_PER_POOL
    skip = start % BATCHES_PER_POOL
    while True:
        rng = random.Random(f"pool {recipe.seed} {pool} {rank}")
        encoded: list[tuple[list[int], list[int]]] = []
        longest = 3 if pool * BATCHES_PER_POOL < recipe.curriculum else 8
        for system, prompt, solution in islice(
            training_items(rng, longest), recipe.batch * BATCHES_PER_POOL
        ):
            asked = tokenizer(tokenizers.render(system, prompt)).input_ids
            solved = tokenizer(solution + tokenizers.END).input_ids
            encoded.append((asked, solved))
        encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [encoded[i : i + recipe.batch] for i in range(0, len(encoded), recipe.batch)]
        random.Random(f"order {recipe.seed} {pool}").shuffle(
            batches
        )  # the same on all ranks: equal lengths
        for batch in batches[skip:]:
            yield _pad(batch, _id(tokenizer, tokenizers.PAD))
        pool, skip = pool + 1, 0


def _pad(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-max(len(asked) + len(solved) for asked, solved in batch) // 16) * 16
    inputs = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for row, (asked, solved) in enumerate(batch):
        end = len(asked) + len(solved)
        inputs[row, :end] = torch.tensor(asked + solved)
        labels[row, len(asked) : end] = torch.tensor(solved)
    return inputs, labels


def _save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path
) -> None:
    half = model.bfloat16()
    half.generation_config = GenerationConfig(
        do_sample=True,
        temperature=recipe.temperature,
        eos_token_id=_id(tokenizer, tokenizers.END),
        pad_token_id=_id(tokenizer, tokenizers.PAD),
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
