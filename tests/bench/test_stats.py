"""The statistics that the measurements share, against counting by hand."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import auc, best_at, majority_at, pass_at, standard_error

samples = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.booleans()), min_size=2, max_size=7
)


@given(samples, st.integers(1, 7))
def test_pass_and_best_are_averages_over_all_choices(drawn, k):
    k = min(k, len(drawn))
    choices = list(combinations(range(len(drawn)), k))
    passed = sum(any(drawn[at][1] for at in chosen) for chosen in choices)
    best = sum(drawn[max(chosen, key=lambda at: (drawn[at][0], -at))][1] for chosen in choices)
    scores, right = zip(*drawn, strict=True)
    assert pass_at(k, len(drawn), sum(right)) == pytest.approx(passed / len(choices))
    assert best_at(k, scores, right) == pytest.approx(best / len(choices))


@given(samples)
def test_auc_counts_pairs_and_half_of_the_ties(drawn):
    ups = [score for score, good in drawn if good]
    downs = [score for score, good in drawn if not good]
    area = auc([score for score, _ in drawn], [good for _, good in drawn])
    if ups and downs:
        won = sum((up > down) + 0.5 * (up == down) for up in ups for down in downs)
        assert area == pytest.approx(won / (len(ups) * len(downs)))
    else:
        assert area is None


def test_majority_ignores_missing_answers():
    assert majority_at(3, ["4", None, None], [True, False, False]) == 1
    assert majority_at(3, ["5", "5", "4"], [False, False, True]) == 0
    assert majority_at(2, [None, None], [False, False]) == 0


def test_majority_answers_with_the_first_that_says_it():
    answers, right = ["24"] * 6, [True] + [False] * 5  # the same value, by other numbers
    assert majority_at(6, answers, right) == pytest.approx(1 / 6, abs=0.2)


def test_majority_of_fewer_is_less_sure():
    answers, right = ["4"] * 6 + ["5"] * 4, [True] * 6 + [False] * 4
    one, few, all_of_them = (majority_at(k, answers, right, draws=2000) for k in (1, 3, 10))
    assert one == pytest.approx(0.6, abs=0.04)
    assert few == pytest.approx(0.667, abs=0.04)  # hypergeometric: (C(6,3) + C(6,2) 4) / C(10,3)
    assert all_of_them == 1


def test_majority_ties_go_to_the_first_drawn():
    assert majority_at(2, ["4", "5"], [True, False], draws=2000) == pytest.approx(0.5, abs=0.05)


def test_standard_error_of_the_mean():
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
