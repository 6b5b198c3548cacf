"""Train a LoRA adapter of `mull-tiny`: `python -m finetune.tiny.adapt KIND --out FOLDER`.

verifier: says after each line of a solution whether all is right so far. Learned from solutions
that the model itself samples, labelled by walking along them, and from made-up attempts.
prices: the family of problems that pretraining never saw, with replay of the others.
"""

import argparse
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finetune.adapter import Base, Manifest, publishing
from finetune.ledger import Ledger, sizes
from finetune.muon import Muon
from finetune.tiny import loop, sampling
from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.problems import FAMILIES, Example, draw, examples
from models import MULL_TINY


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(ABC):
    """Everything that decides an adapter, besides the model and the data."""

    steps: int = 300
    batch: int = 32
    seed: int = 0
    rank: int = 16
    alpha: int = 32
    rate: float = 0.02
    """Muon's: weights that Muon made are large, and AdamW moves them too little."""
    warm_up: int = 10
    processes: int = 2

    def judging(self) -> dict[str, Any] | None:
        """How the server is to ask the adapter, if it judges."""
        return None

    @abstractmethod
    def batches(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rank: int
    ) -> Iterator[loop.Batch]:
        """What one process learns from, without end; `model` is not adapted yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier(Recipe):
    """Learns to judge."""

    samples: int = 6_000
    """How many solutions of its own the model is judged on."""
    temperature: float = 1.0
    """Of those samples."""
    made_up: float = 0.3
    """The share of attempts that are made up."""

    def judging(self) -> dict[str, Any]:
        """The labels, what they follow, and in whose turn the answer is read."""
        answers, verdicts = (f"{tokenizers.START}{role}\n" for role in ("assistant", "verifier"))
        return {
            "labels": {"good": tokenizers.GOOD, "bad": tokenizers.BAD},
            "delimiter": "\n",
            "opening": {"answers": answers, "verdicts": verdicts},
        }

    def batches(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rank: int
    ) -> Iterator[loop.Batch]:
        """The model's own solutions, and made-up ones, with verdicts."""
        rng = random.Random(f"verifier's samples {self.seed} {rank}")
        items = [draw(rng, held_out=False) for _ in range(self.samples // self.processes)]
        torch.manual_seed(rng.getrandbits(40))
        texts = sampling.sample(
            model, tokenizer, items, temperature=self.temperature, shown=rank == 0
        )
        own = [Example.judging(item, text) for item, text in zip(items, texts, strict=True)]
        torch.manual_seed(self.seed)  # the same adapter to start from on every rank

        def rows(pool: int) -> Iterator[loop.Row]:
            rng = random.Random(f"verifier {self.seed} {rank} {pool}")
            made_up = examples(rng, verified=1.0)
            while True:
                example = next(made_up) if rng.random() < self.made_up else rng.choice(own)
                yield loop.judged(tokenizer, example)

        pad = loop.token_id(tokenizer, tokenizers.PAD)
        return loop.pooled(rows, batch=self.batch, pad=pad, seed=str(self.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices(Recipe):
    """Learns another family."""

    steps: int = 560
    batch: int = 16
    rate: float = 0.01
    replay: float = 0.5
    """The share of problems from the families that pretraining saw."""

    def batches(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rank: int
    ) -> Iterator[loop.Batch]:
        """Right solutions."""

        def rows(pool: int) -> Iterator[loop.Row]:
            rng = random.Random(f"prices {self.seed} {rank} {pool}")
            new, old = examples(rng, families=("prices",)), examples(rng, families=FAMILIES)
            while True:
                yield loop.imitated(tokenizer, next(old if rng.random() < self.replay else new))

        pad = loop.token_id(tokenizer, tokenizers.PAD)
        return loop.pooled(rows, batch=self.batch, pad=pad, seed=str(self.seed))


RECIPES: dict[str, type[Recipe]] = {"verifier": Verifier, "prices": Prices}


def main() -> None:
    """Parse the recipe, then train with one process a core."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, recipe in RECIPES.items():
        flags = kinds.add_parser(kind, help=recipe.__doc__, description=recipe.__doc__)
        flags.add_argument("--model", type=Path, default=MULL_TINY, help="default %(default)s")
        flags.add_argument("--out", type=Path, required=True, help="where the adapter goes")
        loop.flags(flags, asdict(recipe()))
    options = vars(parser.parse_args())
    kind, model, out = options.pop("kind"), options.pop("model"), options.pop("out")
    recipe = RECIPES[kind](**options)
    loop.processes(_train, recipe.processes, recipe, model, out)


def _train(rank: int, recipe: Recipe, path: Path, out: Path) -> None:
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batches = recipe.batches(model, tokenizer, rank)
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
        loop.Loss(model),
        [Muon(weights, lr=recipe.rate, weight_decay=0.0, rank=rank, ranks=recipe.processes)],
        batches,
        steps=recipe.steps,
        schedule=lambda step: min((step + 1) / recipe.warm_up, 1 - step / recipe.steps),
    )
    (done,) = deque(steps, maxlen=1)
    if rank == 0:
        adapted.peft_config["default"].base_model_name_or_path = path.name
        judging = recipe.judging()
        manifest = Manifest(
            kind="verifier" if judging else "policy",
            base=Base.of(path, tokenizer),
            judging=judging,
            recipe=asdict(recipe),
            compute={
                "tokens": done.tokens,
                "flops": Ledger(*sizes(adapted), tokens=done.tokens).flops,
                "seconds": round(time.monotonic() - began, 1),
            },
        )
        with publishing(out) as folder:
            adapted.save_pretrained(str(folder))
            manifest.write(folder)
        print(
            f"{recipe}: {done.tokens / 1e6:.2f} M tokens, last loss {done.loss:.3f}, "
            f"{(time.monotonic() - began) / 60:.1f} min in all -> {out}"
        )


if __name__ == "__main__":
    main()
