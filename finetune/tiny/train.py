"""Train `mull-tiny` from nothing: `python -m finetune.tiny.train --out models/mull-tiny`.

Data-parallel over CPU processes in float32, Muon for the matrices and AdamW for the rest. The loss
is on solutions to imitate, and on solutions to judge as far as their first wrong line, token by
token; an earlier layer learns to tell the next token, too. Towards the end most solutions to judge
are the model's own: made-up mistakes are not those that it makes. A run killed half-way continues
from its last checkpoint, and draws the same batches that it would have drawn; a checkpoint of
another recipe, or of other data, is refused.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from finetune.muon import Muon
from finetune.tiny import loop, sampling
from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.problems import Example, draw, examples


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
    temperature: float = 0.6
    processes: int = 2
    verified: float = 0.4
    """The share of sequences that are to be judged, not imitated."""
    own_from: int = 3300
    """The step after which the model samples solutions of its own, to be judged."""
    own_samples: int = 10_000
    own_share: float = 0.75
    """Of the sequences that are to be judged, from then on."""
    own_verified: float = 0.6
    """What `verified` is from then on."""
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
    for left in (checkpoint, *work.glob("own-*.json")):
        left.unlink(missing_ok=True)


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
        _batches(recipe, rank, tokenizer, done.steps, model, checkpoint.parent),
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
    recipe: Recipe,
    rank: int,
    tokenizer: PreTrainedTokenizerFast,
    start: int,
    model: Qwen3ForCausalLM,
    work: Path,
) -> Iterator[loop.Batch]:
    """From step `start` on; `model` is asked for its own solutions when the time has come."""

    def rows(pool: int) -> Iterator[loop.Row]:
        rng = random.Random(f"pool {recipe.seed} {pool} {rank}")
        return map(row, examples(rng, verified=recipe.verified))

    def row(example: Example) -> loop.Row:
        return (loop.imitated if example.right is None else loop.judged)(tokenizer, example)

    pad = loop.token_id(tokenizer, tokenizers.PAD)
    pooled = partial(loop.pooled, batch=recipe.batch, pad=pad)
    before = max(0, recipe.own_from - start)
    yield from islice(pooled(rows, seed=str(recipe.seed), start=start), before)
    own = _own(recipe, rank, tokenizer, model, work / f"own-{rank}.json", anew=before > 0)

    def rows_with_own(pool: int) -> Iterator[loop.Row]:
        rng = random.Random(f"pool with own {recipe.seed} {pool} {rank}")
        imitated, made_up = examples(rng), examples(rng, verified=1.0)
        while True:
            if rng.random() >= recipe.own_verified:
                yield row(next(imitated))
            else:
                yield row(rng.choice(own) if rng.random() < recipe.own_share else next(made_up))

    late = max(0, start - recipe.own_from)
    yield from pooled(rows_with_own, seed=f"{recipe.seed} with own", start=late)


def _own(
    recipe: Recipe,
    rank: int,
    tokenizer: PreTrainedTokenizerFast,
    model: Qwen3ForCausalLM,
    kept: Path,
    *,
    anew: bool,
) -> list[Example]:
    """Solutions of the model as it is now, judged; `kept` has them if a stopped run goes on."""
    rng = random.Random(f"own {recipe.seed} {rank}")
    items = [draw(rng, held_out=False) for _ in range(recipe.own_samples // recipe.processes)]
    if anew or not kept.exists():
        torch.manual_seed(rng.getrandbits(40))
        model.eval()
        texts = sampling.sample(model, tokenizer, items, temperature=1.0, shown=rank == 0)
        model.train()
        kept.write_text(json.dumps(texts))
    texts = json.loads(kept.read_text())
    return [Example.judging(item, text) for item, text in zip(items, texts, strict=True)]


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
