"""The planner: what an answer's confidence, the gain of more and the price of a token decide."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.core.calibration import (
    FEATURES,
    Ballot,
    Bin,
    Calibration,
    Logit,
    More,
    Rule,
    Stage,
    features,
    leader,
    plan,
)

FLAT = (0.0,) * len(FEATURES)


def logit(bias: float = 0.0, **weights: float) -> Logit:
    by_name = dict(zip(FEATURES, FLAT, strict=True))
    named = {name.replace("_", " "): weight for name, weight in weights.items()}
    assert named.keys() <= by_name.keys()
    return Logit(weights=tuple((by_name | named).values()), bias=bias)


def stage(samples: int, *more: More) -> Stage:
    return Stage(
        samples=samples,
        centre=FLAT,
        scale=(1.0,) * len(FEATURES),
        difficulty=(logit(), logit(share_of_the_leading_answer=20.0, bias=-14.0)),
        right=logit(share_of_the_leading_answer=10.0, bias=-5.0),
        more=more,
    )


def calibration(rule: Rule = "votes") -> Calibration:
    def more(option: str, tokens: float, gain: float) -> More:
        """It gains so much where the leader has half of the samples, and nothing if it has all."""
        half, whole = math.log((0.5 + gain) / (0.5 - gain)), 4.9
        slope = 2 * (whole - half)
        return More(
            option=option,
            right=logit(share_of_the_leading_answer=slope, bias=whole - slope),
            tokens=(tokens, tokens),
        )

    return Calibration(
        name="small",
        model="fake",
        digests={},
        verifier={"kind": "likelihood"},
        rule=rule,
        bins=(Bin(below=0.5, problems=10), Bin(below=1.0, problems=10)),
        stages=(
            stage(2, more("4", 40.0, 0.2), more("8", 120.0, 0.225), more("beam", 90.0, 0.25)),
            stage(4, more("8", 80.0, 0.05)),
            stage(8),
        ),
        searches={"beam": {"kind": "beam_search", "width": 2, "branch": 2}},
        cells=(),
        fixed=((20.0, 0.4), (40.0, 0.5), (80.0, 0.55), (160.0, 0.7)),
    )


ballots = st.lists(
    st.builds(
        Ballot,
        st.none() | st.integers(0, 3),
        st.none() | st.floats(0, 1),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(ballots, st.sampled_from(["votes", "weighted", "max"]))
def test_features_are_numbers_and_the_leader_is_one_of_the_answers(found, rule):
    first = leader(found, rule)
    places = [one.place for one in found if one.place is not None]
    assert (first in places) if places else first is None
    raw = features(found, rule, 10)
    assert len(raw) == len(FEATURES)
    assert all(0 <= x <= 1 for x in raw[2:8])


def test_what_nobody_knows_is_as_usual():
    known = [Ballot(0, 0.9, 9, 0.8), Ballot(0, 0.9, 9, 0.6), Ballot(1, 0.1, 9, 0.5)]
    assert features(known, "votes", 10)[-2:] == pytest.approx((0.7, 0.5))
    assert features([*known, Ballot(0, 0.9, 9)], "votes", 10)[-2:] == pytest.approx((0.7, 0.5))
    unknown = features([Ballot(0, 0.9, 9), Ballot(1, 0.9, 9)], "votes", 10)
    assert all(math.isnan(x) for x in unknown[-2:])
    centred = stage(2).model_copy(update={"centre": (0.5,) * len(FEATURES)})
    assert centred.scaled(unknown)[-2:] == [0.0, 0.0]
    nobody = features([Ballot(None, 0.0, 9, 0.9)], "votes", 10)  # elects nothing
    assert centred.scaled(nobody)[-2] == 0.0


def test_rules_elect_differently():
    found = [Ballot(0, 0.2, 9), Ballot(0, 0.3, 9), Ballot(1, 0.9, 9), Ballot(None, 1.0, 9)]
    assert leader(found, "votes") == 0
    assert leader(found, "weighted") == 1
    assert leader(found, "max") == 1
    assert leader([Ballot(2, None, 9), Ballot(1, None, 9)], "votes") == 2


@settings(deadline=None)
@given(ballots)
def test_posterior_and_confidence_are_probabilities(found):
    one = stage(2)
    raw = features(found, "votes", 10)
    assert sum(one.posterior(raw)) == pytest.approx(1)
    assert 0 <= one.confidence(raw) <= 1


def test_knots_say_how_often_it_was_so():
    one = stage(2).model_copy(update={"knots": ((0.2, 0.1), (0.6, 0.3), (0.9, 0.8))})

    def at(said: float) -> float:
        from math import log

        fixed = one.model_copy(update={"right": logit(bias=log(said / (1 - said)))})
        return fixed.confidence(FLAT)

    assert [at(said) for said in (0.1, 0.4, 0.75, 0.99)] == pytest.approx([0.1, 0.2, 0.55, 0.8])


def test_price_is_the_slope_of_the_hull():
    known = calibration()
    assert known.price(30) == pytest.approx(0.005)
    assert known.price(60) == pytest.approx(0.2 / 120)  # (80, 0.55) lies below the hull
    assert known.price(1e6) == 0.0


SPLIT = [Ballot(0, None, 20), Ballot(1, None, 20)]
AGREED = [Ballot(0, None, 20), Ballot(0, None, 20)]


def planned(found, price: float = 0.0, left: float | None = None, most: int = 64, wanted=None):
    return plan(
        calibration(), found, prompt_tokens=9, price=price, left=left, most=most, wanted=wanted
    )


def test_it_goes_on_where_it_gains_and_stops_where_that_costs_more():
    assert planned(SPLIT).option == "beam"
    assert planned(SPLIT, price=0.003).option == "4"  # for half the tokens, most of the gain
    assert planned(SPLIT, price=1.0).option is None
    assert planned(AGREED).option is None  # spoils what is right already


def test_what_does_not_fit_is_no_option():
    assert planned(SPLIT, left=89).option == "4"
    assert planned(SPLIT, left=39).option is None
    assert planned(SPLIT, most=4, left=89).option == "4"
    assert planned(SPLIT, most=2, left=89).option is None


def test_a_wanted_confidence_is_worth_any_price_until_it_is_there():
    assert planned(SPLIT, price=1.0, wanted=0.9).option is not None
    assert planned(AGREED, wanted=0.9).option is None


@settings(deadline=None)
@given(ballots, st.floats(0, 0.1), st.floats(0, 0.1))
def test_dearer_tokens_never_buy_more(found, cheap, dear):
    low, high = sorted((cheap, dear))
    assert planned(found, price=high).tokens <= planned(found, price=low).tokens + 1e-9


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"searches": {}}, "beam"),
        ({"verifier": None}, "verifier"),
        ({"bins": (Bin(below=1.0, problems=9),)}, "bins"),
        ({"stages": (stage(4), stage(2))}, "ascend"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, names):
    with pytest.raises(ValidationError, match=names):
        Calibration.model_validate(calibration().model_dump() | change)


def test_the_file_round_trips():
    known = calibration()
    assert Calibration.model_validate_json(known.model_dump_json()) == known
