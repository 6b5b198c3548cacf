"""Votes and their early stops, held against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core.vote import (
    StopRule,
    Tally,
    decided,
    fewest_to_decide,
    likely_to_decide,
    majority_confidence,
    unassailable,
)

RULES: tuple[StopRule, ...] = ("never", "unassailable", "confidence", "window")
CONFIDENCE = 0.9
WINDOW = 3


def tallied(ballots: list[str | None]) -> Tally:
    tally = Tally()
    for index, answer in enumerate(ballots):
        vote(tally, answer, index)
    return tally


def vote(tally: Tally, answer: str | None, index: int, weight: float = 1.0) -> None:
    if answer is None:
        tally.blank()
        return
    place = tally.answers.index(answer) if answer in tally.answers else None
    tally.count(place, answer, weight, index)


def over(rule: StopRule, tally: Tally, left: int) -> bool:
    return decided(rule, tally, left, confidence=CONFIDENCE, window=WINDOW)


def fewest(rule: StopRule, tally: Tally, left: int) -> int:
    return fewest_to_decide(rule, tally, left, confidence=CONFIDENCE, window=WINDOW)


ballots = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9)


def test_equivalent_answers_add_up_under_the_first_form():
    tally = Tally()
    assert tally.count(None, "1/2", 0.5, 0) == "1/2"
    assert tally.count(None, "3", 0.25, 1) == "3"
    assert tally.count(0, "0.5", 0.25, 2) == "1/2"
    tally.blank()
    assert tally.answers == ["1/2", "3"]
    assert tally.weights == [0.75, 0.25]
    assert tally.recent == ["1/2", "3", "1/2", None]
    assert tally.lead == (0.75, 0.25)


def test_an_empty_vote_has_no_leader():
    assert Tally().ranked() == []
    assert Tally().lead == (0.0, 0.0)


def test_a_tie_goes_to_the_earliest_sample_whatever_arrived_first():
    tally = Tally()
    vote(tally, "late", 5)
    vote(tally, "early", 7)
    vote(tally, "late", 6)
    vote(tally, "early", 2)
    assert [tally.answers[place] for place in tally.ranked()] == ["early", "late"]


@settings(deadline=None)
@given(ballots)
def test_the_order_of_counting_does_not_change_the_ranking(votes: list[str | None]):
    forwards, backwards = Tally(), Tally()
    for index, answer in enumerate(votes):
        vote(forwards, answer, index)
    for index, answer in reversed(list(enumerate(votes))):
        vote(backwards, answer, index)
    assert [forwards.answers[place] for place in forwards.ranked()] == [
        backwards.answers[place] for place in backwards.ranked()
    ]


def test_majority_confidence_is_the_beta_posterior():
    assert majority_confidence(4, 0) == 0.96875
    assert majority_confidence(0, 0) == 0.5
    assert majority_confidence(3, 3) == 0.5
    assert majority_confidence(3, 0) == 0.9375
    # P(p > 1/2) under Beta(6, 3), by integration of p^5 (1-p)^2 / B(6, 3) with B(6, 3) = 1/168
    integral = 1 / 6 - 2 / 7 + 1 / 8 - (0.5**6 / 6 - 2 * 0.5**7 / 7 + 0.5**8 / 8)
    assert majority_confidence(5, 2) == pytest.approx(168 * integral, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_confidence_grows_with_the_lead(best: int, second: int):
    here = majority_confidence(best, second)
    assert 0 < here <= 1
    assert majority_confidence(best + 1, second) >= here
    assert majority_confidence(best, second + 1) <= here
    assert here + majority_confidence(second, best) == pytest.approx(1)


@pytest.mark.parametrize("left", range(6))
def test_unassailable_is_exactly_when_no_continuation_draws_level(left: int):
    for best in range(7):
        for second in range(best + 1):
            level = any(
                second + others.count("second") >= best + others.count("best")
                for others in product(("best", "second"), repeat=left)
            )
            assert unassailable(best, second, left) == (not level), (best, second)


@settings(deadline=None, max_examples=60)
@given(ballots, st.integers(0, 4))
def test_an_unassailable_vote_keeps_its_winner_over_every_continuation(
    votes: list[str | None], left: int
):
    tally = tallied(votes)
    if not over("unassailable", tally, left):
        return
    winner = tally.answers[tally.ranked()[0]]
    for rest in product(["a", "b", "c", "new", None], repeat=left):
        full = tallied([*votes, *rest])
        assert full.answers[full.ranked()[0]] == winner


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 8)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_an_unassailable_weighted_vote_survives_the_heaviest_opposition(
    votes: list[tuple[str, int]], left: int
):
    tally = Tally()
    for index, (answer, eighths) in enumerate(votes):
        vote(tally, answer, index + left, eighths / 8)
    if not over("unassailable", tally, left):
        return
    winner = tally.answers[tally.ranked()[0]]
    other = "b" if winner == "a" else "a"
    for index in range(left):  # lower indices: they would win a tie
        vote(tally, other, index)
    assert tally.answers[tally.ranked()[0]] == winner


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(RULES), ballots, st.integers(0, 12))
def test_fewest_to_decide_is_the_fewest(rule: StopRule, votes: list[str | None], left: int):
    tally = tallied(votes)
    known = [*tally.answers, "new"]

    def can_decide(more: int) -> bool:
        return any(over(rule, tallied([*votes, *[answer] * more]), left - more) for answer in known)

    if left == 0 or over(rule, tally, left):
        return  # nobody asks then
    found = fewest(rule, tally, left)
    assert 1 <= found <= left
    assert not any(can_decide(fewer) for fewer in range(1, found))
    assert found == left or can_decide(found)


@pytest.mark.parametrize(
    ("rule", "expected"), [("never", 16), ("unassailable", 9), ("confidence", 4), ("window", 4)]
)
def test_what_sixteen_samples_start_with(rule: StopRule, expected: int):
    assert fewest_to_decide(rule, Tally(), 16, confidence=0.95, window=4) == expected


def test_a_window_is_decided_by_agreement_and_only_when_it_is_full():
    assert over("window", tallied(["a", "a", "a"]), 5)
    assert not over("window", tallied(["a", "a"]), 5)
    assert not over("window", tallied(["b", "a", "a", "a"]), 5)  # windows do not slide
    assert not over("window", tallied(["a", None, "a"]), 5)
    assert not over("window", tallied(["a", None, None, None]), 5)
    assert over("window", tallied(["b", "a", None, "a", "a", "a"]), 5)


def test_a_spoiled_window_is_waited_out_together_with_the_next():
    assert fewest("window", tallied(["a", "b"]), 9) == 1 + WINDOW
    assert fewest("window", tallied(["a", None]), 9) == 1 + WINDOW
    assert fewest("window", tallied(["a", "a"]), 9) == 1
    assert fewest("window", tallied(["a", "b"]), 2) == 2


@pytest.mark.parametrize("rule", RULES)
def test_a_vote_without_answers_or_without_samples_left_is_not_decided_early(rule: StopRule):
    assert not over(rule, tallied([]), 5)
    assert not over(rule, tallied([None, None, None]), 5)
    assert not over(rule, tallied(["a", "a", "a"]), 0)


@pytest.mark.parametrize("rule", ["never", "unassailable", "confidence", "window"])
@given(votes=ballots, left=st.integers(0, 12))
def test_likely_to_decide_is_no_less_than_the_fewest_and_no_more_than_all(
    rule: StopRule, votes: list[str | None], left: int
):
    found = likely_to_decide(rule, tallied(votes), left, confidence=CONFIDENCE, window=WINDOW)
    assert fewest(rule, tallied(votes), left) <= found <= left


def test_a_clear_vote_goes_on_by_the_fewest_and_a_close_one_with_all():
    def likely(rule: StopRule, votes: str, left: int) -> int:
        return likely_to_decide(rule, tallied(list(votes)), left, confidence=0.95, window=4)

    assert likely("unassailable", "aaaaaaaab", 7) == 1
    assert likely("unassailable", "abcde", 3) == 3
    assert likely("confidence", "aaab", 12) < 12
    assert likely("confidence", "aabb", 12) == 12
