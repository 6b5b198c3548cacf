"""Tokens, rows, Muon over processes, and a training that goes on where it was stopped."""

import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.muon import orthogonalised
from finetune.tiny import loop, train
from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.problems import SYSTEM, examples


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.build(0, samples=300)


def test_the_chat_template_renders_what_training_saw(tokenizer):
    for system in (None, SYSTEM[0]):
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "Tom has 5 apples."})
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        assert rendered == tokenizers.render(system, "Tom has 5 apples.")
        assert tokenizer.decode(tokenizer(rendered).input_ids) == rendered
    assert len(tokenizer("\n").input_ids) == 1
    assert len(tokenizer("123").input_ids) == 3


def test_an_imitated_row_teaches_the_solution_and_its_end(tokenizer):
    example = next(examples(random.Random(0)))
    row = loop.imitated(tokenizer, example)
    taught = [token for token in row.follows if token != loop.IGNORED]
    assert tokenizer.decode(taught) == example.solution + tokenizers.END
    for at, token in enumerate(row.follows):
        if token != loop.IGNORED:
            assert row.ids[at + 1] == token


def test_of_a_walk_at_random_only_the_results_are_imitated(tokenizer):
    walked = next(one for one in examples(random.Random(0)) if one.taught)
    row = loop.imitated(tokenizer, walked)
    taught = tokenizer.decode([token for token in row.follows if token != loop.IGNORED])
    lines = walked.solution.split("\n")
    results = [line.split(" = ")[1] for line in lines[:-1]]
    assert taught.replace(" ", "") == "".join(f"{one}\n" for one in results).replace(" ", "") + (
        lines[-1] + tokenizers.END
    ).replace(" ", "")


def test_a_judged_row_has_a_verdict_on_every_token(tokenizer):
    good, bad = loop.verdicts(tokenizer)
    kinds: set[bool] = set()
    for example in islice(examples(random.Random(1), verified=1.0), 50):
        assert example.right is not None
        row = loop.judged(tokenizer, example)
        right = example.solution[: example.right] + tokenizers.END * (
            example.right > len(example.solution)
        )
        asked = tokenizers.render(example.system, example.prompt, "verifier")
        start = len(tokenizer(asked).input_ids)
        assert row.follows[:start] == [loop.IGNORED] * start
        for at in range(start, len(row.ids)):
            before = tokenizer.decode(row.ids[start : at + 1])
            if right.startswith(before):
                assert row.follows[at] == good
                assert row.early[at - 1] == row.ids[at]
            else:
                later = "\n" in before.removeprefix(right).removesuffix("\n")
                whole = before.endswith(tokenizers.END)
                ends = {end for _, end in example.faults}
                told = len(before) in ends or (whole and len(example.solution) + 1 in ends)
                told |= len(before) == len(example.solution) and len(before) + 1 in ends
                assert row.follows[at] == (loop.IGNORED if later and not told else bad)
                assert row.early[at - 1] == loop.IGNORED
            kinds.add(right.startswith(before))
        assert tokenizer.decode(row.ids) == asked + example.solution + tokenizers.END
    assert kinds == {True, False}


def test_batches_go_on_from_any_step(tokenizer):
    def rows(pool: int):
        for example in examples(random.Random(pool)):
            yield loop.imitated(tokenizer, example)

    def batches(start: int):
        return loop.pooled(rows, batch=3, pad=0, seed="x", start=start)

    whole = list(islice(batches(0), 30))
    late = list(islice(batches(17), 13))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[17:], late, strict=True))


def test_orthogonalised_directions_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32), (48, 48)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape), 5))
        assert values.min() > 0.3
        assert values.max() < 1.4


SMALL = ["--batch", "2", "--hidden", "32", "--layers", "2", "--intermediate", "32", "--heads", "1"]
SMALL += ["--exit-layer", "1", "--own-from", "24", "--own-samples", "8"]


def training(work: Path) -> subprocess.Popen[bytes]:
    """A small training with its checkpoint in `work`, and what it says in `work.log`."""
    paths = ["--work", str(work), "--out", str(work / "out"), "--save-every", "3"]
    with work.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune.tiny.train", *SMALL, *paths, "--steps", "45"],
            stdout=log,
            stderr=log,
        )


def told(work: Path) -> str:
    """What a training says that runs to its end."""
    training(work).wait(120)
    return work.with_suffix(".log").read_text()


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "out" / "model.safetensors")


def test_an_early_layer_learns_what_comes_next_and_adapters_need_none(tokenizer):
    torch.manual_seed(0)
    rows = [loop.imitated(tokenizer, one) for one in islice(examples(random.Random(0)), 4)]
    batch = loop.padded(rows, pad=0)
    recipe = train.Recipe(layers=2, hidden=32, intermediate=32, heads=1, exit_layer=1)
    model = train._untrained(recipe, tokenizer)
    plain, deep = loop.Loss(model)(*batch), loop.Loss(model, exit_layer=1, exit_weight=0.5)(*batch)
    # Layers begin as the identity, so the first says the same as the last.
    assert deep.item() == pytest.approx(1.5 * plain.item(), rel=1e-5)


def test_a_layer_that_is_not_there_cannot_learn(tmp_path):
    with pytest.raises(SystemExit, match="--exit-layer"):
        train.run(train.Recipe(layers=3, exit_layer=3), tmp_path, tmp_path, 1)


@pytest.mark.slow
def test_a_stopped_training_goes_on_and_ends_with_the_same_weights(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert training(whole).wait(120) == 0
    assert not (whole / "checkpoint.pt").exists()
    checkpoint = stopped / "checkpoint.pt"
    process = training(stopped)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(30) != 0
    saved = torch.load(checkpoint, weights_only=True)
    assert 0 < saved["done"]["steps"] < 45
    for field, value, complaint in (
        ("recipe", "another", "another recipe"),
        ("data", "other", "other data"),
    ):
        torch.save(saved | {field: value}, checkpoint)
        assert complaint in told(stopped)
    saved["done"]["tokens"] += 10**9  # which the report shows if it is read
    torch.save(saved, checkpoint)
    assert "1000." in told(stopped)
    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
