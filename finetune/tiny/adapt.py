"""Train a LoRA adapter of `mull-tiny`: `python -m finetune.tiny.adapt KIND --out FOLDER`.

verifier: says after each line of a solution whether all is right so far. Learned from solutions
that the model itself samples, labelled by walking along them, and from made-up attempts.
prices: the family of problems that pretraining never saw, with replay of the others.
"""

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finetune.tiny import loop, sampling
from finetune.tiny.problems import FAMILIES, Example, draw, examples
from models import MULL_TINY

Kind = Literal["verifier", "prices"]
KINDS: tuple[Kind, ...] = ("verifier", "prices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides an adapter, besides the model."""

    steps: int = 400
    batch: int = 32
    seed: int = 0
    rank: int = 16
    alpha: int = 32
    rate: float = 2e-3
    warm_up: int = 20
    processes: int = 2
    samples: int = 12_000
    """verifier: how many solutions of its own the model is judged on."""
    temperature: float = 1.0
    """verifier: of those samples."""
    made_up: float = 0.3
    """verifier: the share of attempts that are made up."""
    replay: float = 0.5
    """prices: the share of problems from the other families."""


def main() -> None:
    """Parse the recipe, then train with one process a core."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--model", type=Path, default=MULL_TINY, help="default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="where the adapter goes")
    loop.flags(parser, asdict(Recipe()))
    options = vars(parser.parse_args())
    kind, model, out = options.pop("kind"), options.pop("model"), options.pop("out")
    recipe = Recipe(**options)
    loop.processes(_train, recipe.processes, kind, recipe, model, out)


def _train(rank: int, kind: Kind, recipe: Recipe, path: Path, out: Path) -> None:
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seed = f"{kind} {recipe.seed} {rank}"
    batches = (_verified if kind == "verifier" else _imitated)(
        recipe, model, tokenizer, seed, shown=rank == 0
    )
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
            task_type="CAUSAL_LM",
        ),
    )
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    steps = loop.descend(
        model,
        [loop.adamw(weights, recipe.rate)],
        batches,
        steps=recipe.steps,
        schedule=lambda step: min((step + 1) / recipe.warm_up, 1 - step / recipe.steps),
    )
    (done,) = deque(steps, maxlen=1)
    if rank == 0:
        adapted.save_pretrained(str(out))
        print(
            f"{kind} {recipe}: {done.tokens / 1e6:.2f} M tokens, last loss {done.loss:.3f}, "
            f"{(time.monotonic() - began) / 60:.1f} min in all -> {out}"
        )


def _verified(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: str,
    *,
    shown: bool,
) -> Iterator[loop.Batch]:
    rng = random.Random(f"samples {seed}")
    items = [draw(rng, held_out=False) for _ in range(recipe.samples // recipe.processes)]
    torch.manual_seed(rng.getrandbits(40))
    own = [
        Example.judging(item, text)
        for item, text in zip(
            items,
            sampling.sample(model, tokenizer, items, temperature=recipe.temperature, shown=shown),
            strict=True,
        )
    ]
    torch.manual_seed(recipe.seed)  # the same adapter to start from on every rank

    def rows(pool: int) -> Iterator[loop.Row]:
        rng = random.Random(f"{seed} {pool}")
        made_up = examples(rng, verified=1.0)
        while True:
            example = next(made_up) if rng.random() < recipe.made_up else rng.choice(own)
            yield loop.judged(tokenizer, example, role="assistant")

    return _pooled(recipe, model, rows)


def _imitated(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: str,
    *,
    shown: bool,
) -> Iterator[loop.Batch]:
    del shown  # nothing takes long

    def rows(pool: int) -> Iterator[loop.Row]:
        rng = random.Random(f"{seed} {pool}")
        new, old = examples(rng, families=("prices",)), examples(rng, families=FAMILIES)
        while True:
            yield loop.imitated(tokenizer, next(old if rng.random() < recipe.replay else new))

    return _pooled(recipe, model, rows)


def _pooled(
    recipe: Recipe, model: PreTrainedModel, rows: Callable[[int], Iterator[loop.Row]]
) -> Iterator[loop.Batch]:
    pad = model.config.pad_token_id
    assert pad is not None
    return loop.pooled(rows, batch=recipe.batch, pad=pad, seed=str(recipe.seed))


if __name__ == "__main__":
    main()
