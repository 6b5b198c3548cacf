"""Adapters of the embedded model, trained for a few steps, and what a verifier says."""

import random
from itertools import islice

import pytest
import torch

from finetune.tiny import adapt, loop, sampling
from finetune.tiny.problems import draw, examples
from finetune.tiny.solution import solution
from finetune.tiny.verifier import Verifier
from models import MULL_TINY


@pytest.fixture(scope="module")
def solved():
    rng = random.Random(0)
    items = [draw(rng, held_out=True) for _ in range(6)]
    return [(item.prompt, solution(item, rng)) for item in items]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        adapt.Verifier(steps=3, batch=2, samples=8, warm_up=1),
        adapt.Prices(steps=3, batch=2, warm_up=1),
    ],
    ids=adapt.RECIPES,
)
def test_an_adapter_is_trained_and_loaded(recipe, tmp_path, solved):
    loop.processes(adapt._train, recipe.processes, recipe, MULL_TINY, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    adapted, plain = Verifier.load(MULL_TINY, tmp_path), Verifier.load(MULL_TINY, None)
    assert adapted.score(solved) != plain.score(solved)


def test_a_verifier_scores_each_line_and_nothing_that_follows_it(solved):
    verifier = Verifier.load(MULL_TINY, None)
    scores = verifier.score(solved)
    assert [len(lines) for lines in scores] == [text.count("\n") + 1 for _, text in solved]
    assert all(0 <= score <= 1 for lines in scores for score in lines)
    prompt, text = max(solved, key=lambda pair: pair[1].count("\n"))
    (whole,), (alone,) = (
        verifier.score([(prompt, one)]) for one in (text, text.split("\n")[0] + "\nx")
    )
    assert whole[0] == pytest.approx(alone[0], abs=1e-5)


def test_sampling_keeps_the_order_and_ends_where_the_model_ends():
    verifier = Verifier.load(MULL_TINY, None)
    items = [draw(random.Random(at), held_out=True) for at in range(9)]
    torch.manual_seed(0)
    texts = sampling.sample(verifier.model, verifier.tokenizer, items, temperature=0.7, shown=False)
    assert len(texts) == 9
    assert not any("<|" in text for text in texts)
    assert sum("Answer: \\boxed{" in text for text in texts) >= 7
    for item, text in zip(items, texts, strict=True):
        assert ("left:" in text) == (item.family == "countdown")


def test_rows_of_one_family_only():
    prompts = [one.prompt for one in islice(examples(random.Random(0), families=("prices",)), 50)]
    assert all(" coins. " in prompt and "coins does" in prompt for prompt in prompts)
