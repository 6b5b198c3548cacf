"""Train `mull-tiny` from nothing: `python -m finetune.tiny.train --out models/mull-tiny`.

Data-parallel over CPU processes in float32, Muon for the matrices and AdamW for the rest. The loss
is on solutions to imitate, and on solutions to judge as far as their first wrong line, token by
token; an earlier layer learns to tell the next token, too. A run killed half-way continues from its
last checkpoint, and draws the same batches that it would have drawn; a checkpoint of another
recipe, or of other data, is refused.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from finetune.tiny import loop
from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.muon import Muon
from finetune.tiny.problems import examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, besides the data that `problems` makes."""

    steps: int = 3900
    batch: int = 16
    seed: int = 0
    hidden: int = 256
    layers: int = 5
    intermediate: int = 704
    heads: int = 4
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: int = 30
    decay: float = 0.6
    temperature: float = 0.8
    processes: int = 2
    verified: float = 0.4
    """The share of sequences that are to be judged, not imitated."""
    exit_layer: int = 3
    """The layer that is to know the next token, too; the others compare with it. 0: none."""
    exit_weight: float = 0.5
    """What that weighs in the loss."""


def main() -> None:
    """Parse the recipe, then train with one process a core."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mull-tiny"), help="where checkpoints go"
    )
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    loop.flags(parser, asdict(Recipe()))
    options = vars(parser.parse_args())
    out, work, save_every = options.pop("out"), options.pop("work"), options.pop("save_every")
    run(Recipe(**options), out, work, save_every)


def run(recipe: Recipe, out: Path, work: Path, save_every: int) -> None:
    """Train to the end, from the checkpoint in `work` if there is one, and save to `out`.

    Raises:
        SystemExit: the recipe makes no sense, or the checkpoint was made by another one, or from
            other data.
    """
    if not 0 <= recipe.exit_layer < recipe.layers:
        raise SystemExit(f"--exit-layer is one below the last of {recipe.layers} layers, or 0")
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = _loaded(checkpoint)
        if saved["recipe"] != repr(recipe):
            raise SystemExit(
                f"{checkpoint} was made by another recipe: {saved['recipe']}; choose another --work"
            )
        if saved["data"] != _data(recipe):
            raise SystemExit(f"{checkpoint} was made from other data; choose another --work")
    work.mkdir(parents=True, exist_ok=True)
    loop.processes(_train, recipe.processes, recipe, out, checkpoint, save_every)
    checkpoint.unlink(missing_ok=True)


def _data(recipe: Recipe) -> str:
    """A digest that changes with the tokenizer, or with how problems are made."""
    drawn = examples(random.Random(recipe.seed), verified=recipe.verified)
    texts = [tokenizers.build(recipe.seed).backend_tokenizer.to_str()]
    texts += [repr(example) for example in islice(drawn, 500)]
    return sha256("\n".join(texts).encode()).hexdigest()


def _loaded(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True)  # tensors and numbers only, never code


def _train(rank: int, recipe: Recipe, out: Path, checkpoint: Path, save_every: int) -> None:
    torch.manual_seed(recipe.seed)
    tokenizer = tokenizers.build(recipe.seed)
    model = _untrained(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]
    optimizers = [
        Muon(matrices, lr=recipe.muon_rate, rank=rank, ranks=recipe.processes),
        loop.adamw(others, recipe.adam_rate),
    ]
    data = _data(recipe)
    done = loop.Done()
    if checkpoint.exists():
        saved = _loaded(checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done = loop.Done(**saved["done"])
    steps = loop.descend(
        loop.Loss(model, exit_layer=recipe.exit_layer, exit_weight=recipe.exit_weight),
        optimizers,
        _batches(recipe, rank, tokenizer, done.steps),
        steps=recipe.steps,
        schedule=lambda step: _schedule(recipe, step),
        done=done,
    )
    for done in steps:
        if rank == 0 and done.steps % save_every == 0:
            state = {
                "recipe": repr(recipe),
                "data": data,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "done": asdict(done),
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    if rank == 0:
        _save(model, tokenizer, recipe, out)
        print(
            f"{recipe}: {done.tokens / 1e6:.2f} M tokens in {done.seconds / 60:.1f} min, "
            f"last loss {done.loss:.3f} -> {out}"
        )


def _untrained(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Each layer begins as the identity, which lets it learn several times sooner."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=loop.token_id(tokenizer, tokenizers.END),
            pad_token_id=loop.token_id(tokenizer, tokenizers.PAD),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def _schedule(recipe: Recipe, step: int) -> float:
    """Warm up, stay, then decay linearly to nothing over the last `decay` of the steps."""
    decay_steps = recipe.steps * recipe.decay
    return min(1.0, (step + 1) / recipe.warm_up, (recipe.steps - step) / decay_steps)


def _batches(
    recipe: Recipe, rank: int, tokenizer: PreTrainedTokenizerFast, start: int
) -> Iterator[loop.Batch]:
    def rows(pool: int) -> Iterator[loop.Row]:
        rng = random.Random(f"pool {recipe.seed} {pool} {rank}")
        for example in examples(rng, verified=recipe.verified):
            if example.right is None:
                yield loop.imitated(tokenizer, example)
            else:
                yield loop.judged(tokenizer, example)

    pad = loop.token_id(tokenizer, tokenizers.PAD)
    return loop.pooled(rows, batch=recipe.batch, pad=pad, seed=str(recipe.seed), start=start)


def _save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path
) -> None:
    half = model.bfloat16()
    half.generation_config = GenerationConfig(
        do_sample=True,
        temperature=recipe.temperature,
        eos_token_id=loop.token_id(tokenizer, tokenizers.END),
        pad_token_id=loop.token_id(tokenizer, tokenizers.PAD),
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
