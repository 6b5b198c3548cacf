"""The problems of the embedded model: right solutions, and a test side that training never sees."""

import random
import re
from fractions import Fraction
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.tiny import countdown, word
from finetune.tiny.countdown import operations, solvable, value_of
from finetune.tiny.problems import FAMILIES, Example, draw, exam, examples, grade
from finetune.tiny.solution import (
    Item,
    Walk,
    answered,
    attempt,
    boxed,
    faults,
    judged,
    right_until,
    solution,
    wander,
)

ALL = (*FAMILIES, "prices")


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 10**9), family=st.sampled_from(ALL), held_out=st.booleans())
def test_every_solution_is_right_in_every_line(seed, family, held_out):
    rng = random.Random(seed)
    item = draw(rng, held_out=held_out, family=family)
    assert item.held_out == held_out
    for _ in range(3):
        written = solution(item, rng)
        assert grade(item, written)
        assert all(good for _, good in judged(item, written))
        for line in written.splitlines()[:-1]:
            said = line.split(": ")[-1] if item.family != "countdown" else line.split(" (left")[0]
            if "=" in said:
                expression, result = said.split(" = ")
                assert value_of(expression) == int(result)


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 10**9), family=st.sampled_from(ALL))
def test_an_attempt_is_right_until_it_slips_and_never_again(seed, family):
    rng = random.Random(seed)
    item = draw(rng, held_out=False, family=family)
    written = attempt(item, rng, slip=0.5)
    verdicts = [good for _, good in judged(item, written)]
    assert verdicts == sorted(verdicts, reverse=True)
    if verdicts[-1]:
        assert grade(item, written)


def test_a_word_problem_has_many_right_solutions_that_share_little():
    rng = random.Random(0)
    different, shared = [], []
    for _ in range(20):
        item = draw(rng, held_out=False, family="word", steps=6)
        solutions = {solution(item, rng) for _ in range(200)}
        different.append(len(solutions))
        results = [
            {line.split(" = ")[1] for line in one.splitlines() if " = " in line}
            for one in solutions
        ]
        shared += [len(a & b) / len(a | b) for a, b in pairwise(results)]
    assert sum(different) / len(different) > 100
    assert sum(shared) / len(shared) < 0.5


def test_a_verdict_follows_the_walk_not_the_answer():
    start = word.Sum(
        (word.Fact("Tom", 1, 40), word.Fact("bags", 1, 12, 3), word.Fact("shop", -1, 9))
    )
    item = draw(random.Random(0), held_out=False, family="word")
    item = type(item)(family="word", steps=3, prompt="", answer="67", identity="", start=start)
    right = "Tom: 40\nbags: 3 * 12 = 36\nbags: 40 + 36 = 76\nshop: 76 - 9 = 67\n"
    assert [good for _, good in judged(item, right + "Answer: \\boxed{67}")] == [True] * 5
    split = "bags: 3 * 10 = 30\nbags: 3 * 2 = 6\nbags: 30 + 6 = 36\nshop: 36 - 9 = 27\n"
    assert all(good for _, good in judged(item, split + "Tom: 27 + 40 = 67\nAnswer: \\boxed{67}"))
    for wrong, first in (
        ("Tom: 40\nTom: 40 + 40 = 80", 1),  # a fact taken twice
        ("Tom: 40\nshop: 40 - 9 = 32", 1),  # wrong arithmetic
        ("Tom: 40\nshop: 40 + 9 = 49", 1),  # the wrong sign
        ("Tom: 40\nAnswer: \\boxed{67}", 1),  # unfinished, though the answer is right
        (right + "Answer: \\boxed{76}", 4),
    ):
        verdicts = [good for _, good in judged(item, wrong)]
        assert verdicts.index(False) == first, wrong


def test_a_countdown_line_is_good_while_the_target_can_be_reached():
    item = Item(
        family="countdown",
        steps=2,
        prompt="",
        answer="14",
        identity="",
        start=countdown.Numbers(14, (2, 3, 4), ("2", "3", "4")),
        numbers=(4, 3, 2),
        target=14,
    )
    good = "4 * 3 = 12 (left: 2, 12)\n12 + 2 = 14 (left: 14)\nAnswer: \\boxed{(4 * 3) + 2}"
    assert all(verdict for _, verdict in judged(item, good))
    otherwise = good.replace("(4 * 3) + 2", "2 + (4 * 3)")
    assert all(verdict for _, verdict in judged(item, otherwise))
    lost = "4 + 3 = 7 (left: 2, 7)\n7 + 2 = 9 (left: 9)\nAnswer: \\boxed{(4 + 3) + 2}"
    assert [verdict for _, verdict in judged(item, lost)] == [True, False, False]


def test_training_and_test_are_disjoint_by_what_makes_a_problem_the_same():
    tested = {item.identity for seed in range(3) for item in exam(seed, 100, ALL)}
    rng = random.Random(5)
    trained = {
        draw(rng, held_out=False, family=family).identity for family in ALL for _ in range(7000)
    }
    assert len(tested) > 700
    assert not tested & trained
    assert all(draw(rng, held_out=True).held_out for _ in range(200))


def test_other_words_or_another_order_are_the_same_problem():
    rng = random.Random(1)
    prompts: dict[str, set[str]] = {}
    for _ in range(6000):
        item = draw(rng, held_out=False, family="word", steps=1)
        prompts.setdefault(item.identity, set()).add(item.prompt)
    sums = [told for identity, told in prompts.items() if re.fullmatch(r"1\*.* 1\*.*", identity)]
    numbers = [tuple(re.findall("[0-9]+", prompt)) for prompt in max(sums, key=len)]
    assert len({tuple(sorted(one)) for one in numbers if len(one) == 2}) == 1
    assert len({one for one in numbers if len(one) == 2}) == 2, "in both orders"


@pytest.mark.parametrize("family", ["countdown", "prices"])
def test_no_tested_problem_begins_as_one_that_is_trained_on(family):
    """Word problems do: the sums that they are made of are few."""
    rng = random.Random(2)

    def beginnings(held_out: bool) -> set[str]:
        items = [draw(rng, held_out=held_out, family=family) for _ in range(4000)]
        asked = [f"{item.numbers} {item.target}" if item.numbers else "" for item in items]
        return {
            f"{numbers} {solution(item, random.Random(0)).splitlines()[:2]}"
            for item, numbers in zip(items, asked, strict=True)
            if item.steps > 1
        }

    assert len(beginnings(True) & beginnings(False)) == 0


def test_an_exam_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="'countdown' has fewer than 700"):
        exam(0, 700, ("countdown",))


def test_pretraining_never_sees_the_domain_that_is_kept_for_adapters():
    prompts = [example.prompt for example in islice(examples(random.Random(0)), 2000)]
    assert not any("price" in prompt or "cost" in prompt for prompt in prompts)


def test_exams_are_repeatable_distinct_and_balanced():
    once, again = exam(0, 96), exam(0, 96)
    assert once == again
    assert len({item.identity for item in once}) == 192
    depths = [item.steps for item in once if item.family == "word"]
    assert {depths.count(steps) for steps in word.STEPS} == {12}
    assert sum(item.steps == 2 for item in once if item.family == "countdown") == 48


def test_training_examples_are_seeded():
    first, second = (list(islice(examples(random.Random(3), verified=0.3), 40)) for _ in range(2))
    assert first == second
    shares = [
        example.right is not None
        for example in islice(examples(random.Random(4), verified=0.3), 2000)
    ]
    assert 0.25 < sum(shares) / len(shares) < 0.35


def test_attempts_to_judge_are_right_about_half_of_the_time():
    for family in ALL:
        drawn = examples(random.Random(5), verified=1.0, families=(family,))
        good = [one.right == len(one.solution) + 1 for one in islice(drawn, 1000)]
        assert 0.25 < sum(good) / len(good) < 0.75, family


@given(st.lists(st.integers(0, 199), min_size=2, max_size=4))
def test_operations_keep_their_promises(numbers):
    ordered = tuple(sorted(numbers))
    for left, operator, right, result, after in operations(ordered):
        assert left >= right
        assert len(after) == len(ordered) - 1
        assert result in after
        assert value_of(f"{left} {operator} {right}") == result <= countdown.LARGEST
    signs = {operator for _, operator, *_ in operations((3, 6))}
    assert signs == set("+-*/")
    if len(ordered) == 2:
        for *_, (result,) in operations(ordered):
            assert solvable(ordered, result)


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
    expression = boxed(solution(item, random.Random(0)))
    assert not grade(item, f"\\boxed{{{item.target}}}")
    assert not grade(item, str(expression))
    assert grade(item, f"first \\boxed{{1}} then \\boxed{{{expression}}}")


def test_right_is_what_leads_to_the_answer_character_by_character():
    item = draw(random.Random(3), held_out=False, family="word", steps=4)
    assert Example.judging(item, "nonsense\n\nAnswer: \\boxed{1}").right == 0
    assert [good for _, good in judged(item, "nonsense\n\nAnswer: \\boxed{1}")] == [False] * 3
    rng = random.Random(0)
    for family in ALL:
        for _ in range(30):
            item = draw(rng, held_out=False, family=family)
            right = solution(item, rng)
            at = rng.randrange(len(right))
            assert right_until(item, right) == len(right) + 1
            assert right_until(item, right[:at]) == at
            assert right_until(item, right[:at] + "#" + right[at + 1 :]) == at
    item = draw(rng, held_out=False, family="countdown", steps=2)
    last = solution(item, rng).split("\n")[-1]
    assert right_until(item, last) == 0  # an answer that was not worked out


def countdown_item(numbers: tuple[int, ...], target: int) -> Item:
    ordered = tuple(sorted(numbers))
    return Item(
        family="countdown",
        steps=len(numbers) - 1,
        prompt="",
        answer=str(target),
        identity="",
        start=countdown.Numbers(target, ordered, tuple(map(str, ordered))),
        numbers=numbers,
        target=target,
    )


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("11 - 6 = 5 (left: 2, 5)\n5 * 2 = 14 (left: 14)\n{}", [1, 2]),  # claimed, not computed
        ("11 - 6 = 5 (left: 2, 5)\n5 * 2 = 10 (left: 10)\n{}", [1, 2]),  # honest, and lost
        ("11 + 6 = 17 (left: 2, 17)\n17 - 3 = 14 (left: 14)\n{}", [1, 2]),  # there is no 3
        ("11 - 6 = 5 (left: 2, 5)\n5 * 2 = 10 (left: 14)\n{}", [1, 2]),
        ("6 / 2 = 3 (left: 3, 11)\n11 + 3 = 14 (left: 14)\n{}", []),
    ],
)
def test_later_lines_are_faulty_by_themselves_or_follow_in_good_faith(
    written: str, wrong: list[int]
):
    item = countdown_item((6, 2, 11), 14)
    right = "11 + (6 / 2)"
    text = written.format(answered(right if not wrong else "(11 - 6) * 2"))
    lines = text.split("\n")
    starts = [sum(len(line) + 1 for line in lines[:at]) for at in range(len(lines))]
    assert faults(item, text) == [(starts[at], starts[at] + len(lines[at]) + 1) for at in wrong]


def test_made_up_attempts_without_hope_mostly_claim_what_they_need():
    rng = random.Random(5)
    lost = claimed = 0
    while lost < 300:
        item = draw(rng, held_out=False, family="countdown")
        text = attempt(item, rng, slip=0.5)
        *_, before, _ = ["", *text.split("\n")]
        if right_until(item, text) <= len(text) and "(left:" in before and "," not in before:
            lost += 1
            claimed += before.endswith(f"(left: {item.target})")
    assert 0.4 < claimed / lost < 0.9


def test_a_walk_at_random_computes_rightly_wherever_it_leads():
    rng = random.Random(6)
    reached = 0
    for _ in range(200):
        item = draw(rng, held_out=False, family="countdown")
        written, results = wander(item, rng)
        assert all(0 <= begin < end <= len(written) + 1 for begin, end in results)
        at: Walk | None = item.start
        for line in written.split("\n")[:-1]:
            assert at is not None
            (move,) = {move.line(): move for move in at.moves() if move.line() == line}.values()
            at = move.after(move.result)
        assert at is not None
        assert boxed(written) == at.finished()
        reached += grade(item, written)
    assert 0 < reached < 100  # most ways lead nowhere
