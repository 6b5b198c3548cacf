"""The problems of the embedded model: right solutions, and a test side that training never sees."""

import random
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.problems import (
    SYSTEM,
    apply,
    draw,
    grade,
    moves,
    solvable,
    test_set,
    training_items,
    value_of,
)

test_set.__test__ = False  # a function of the product, not a test


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**9),
    family=st.sampled_from(["word", "countdown"]),
    held_out=st.booleans(),
)
def test_every_solution_is_right(seed, family, held_out):
    item = draw(random.Random(seed), held_out=held_out, family=family)
    assert grade(item, item.solution)
    assert item.held_out == held_out
    for line in item.solution.splitlines()[:-1]:
        left, operator, right, result = (
            line.split(": ")[1].split(" (left")[0].replace("=", "").split()
        )
        assert apply(int(left), operator, int(right)) == int(result)


def test_training_and_test_are_disjoint_by_what_makes_a_problem_the_same():
    tested = {item.identity for seed in range(3) for item in test_set(seed, 100)}
    rng = random.Random(5)
    trained = {draw(rng, held_out=False).identity for _ in range(20_000)}
    assert len(tested) > 500
    assert not tested & trained
    assert all(draw(rng, held_out=True).held_out for _ in range(200))


def test_other_words_or_another_order_are_the_same_problem():
    rng = random.Random(1)
    seen: dict[str, bool] = {}
    for _ in range(3000):
        item = draw(rng, held_out=rng.random() < 0.5, steps=2)
        assert seen.setdefault(item.identity, item.held_out) == item.held_out
    assert len(seen) < 3000  # the same problem did come back in other words


def test_test_sets_are_repeatable_distinct_and_balanced():
    once, again = test_set(0, 96), test_set(0, 96)
    assert once == again
    assert len({item.identity for item in once}) == 192
    assert {item.steps for item in once if item.family == "word"} == set(range(1, 9))
    three = [item for item in once if item.family == "countdown" and item.steps == 2]
    assert len(three) == 32


def test_training_items_are_seeded():
    first, second = (list(islice(training_items(random.Random(3)), 20)) for _ in range(2))
    assert first == second


@given(st.lists(st.integers(0, 199), min_size=2, max_size=4))
def test_moves_keep_their_promises(numbers):
    state = tuple(sorted(numbers))
    for left, operator, right, after in moves(state):
        assert left >= right
        assert len(after) == len(state) - 1
        assert apply(left, operator, right) in after
        if operator == "/":
            assert left % right == 0
    if len(state) == 2:
        for _, _, _, (result,) in moves(state):
            assert solvable(state, result)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(10 + 7) - 2", 15),
        ("1 / 3", Fraction(1, 3)),
        ("2 ** 9", None),
        ("1 / 0", None),
        ("x", None),
        ("1 +", None),
    ],
)
def test_value_of_is_arithmetic_only(expression, value):
    assert value_of(expression) == value


def test_grading_refuses_wrong_numbers_and_missing_boxes():
    item = draw(random.Random(2), held_out=True, family="countdown", steps=2)
    assert not grade(item, f"\\boxed{{{item.target}}}")
    assert not grade(item, item.answer)
    assert grade(item, f"first \\boxed{{1}} then \\boxed{{{item.answer}}}")


def test_the_chat_template_renders_what_training_saw():
    tokenizer = tokenizers.build(0, samples=200)
    for system in (None, SYSTEM[0]):
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "Tom has 5 apples."})
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        assert rendered == tokenizers.render(system, "Tom has 5 apples.")
        assert tokenizer.decode(tokenizer(rendered).input_ids) == rendered
    assert len(tokenizer("\n").input_ids) == 1
    assert len(tokenizer("123").input_ids) == 3
