"""Equal tokens, and what a selection makes of scored candidates."""

import pytest

from bench.model import Sample, _said
from bench.overoptimise import _chosen, _measured
from bench.stats import calibration_error, tenths
from bench.stats import shares as shares_of


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        (50, [1, 0, 0]),
        (100, [1, 0, 0]),
        (200, [0, 1, 0]),
        (800, [0, 0, 1]),
        (900, [0, 0, 1]),
        (400, [0, 0.5, 0.5]),
    ],
)
def test_a_place_on_the_curve_is_between_its_neighbours(tokens: float, shares: list[float]):
    assert shares_of([100, 200, 800], tokens) == pytest.approx(shares)


CANDIDATES = [(0.9, 1.0, False, "1"), (0.5, 0.5, True, "2"), (0.5, 0.0, True, "2")]


def test_selections_of_scored_candidates():
    assert _chosen(CANDIDATES, "max", 0)[3] == "1"
    assert _chosen(CANDIDATES, "weighted", 0)[3] == "2"
    drawn = [_chosen(CANDIDATES, "soft", seed)[3] for seed in range(300)]
    assert 0.9 < drawn.count("1") / 300 < 1.0
    best = _measured([CANDIDATES], "max", 3)
    assert (best["proxy"][0], best["accuracy"][0]) == (1.0, 0.0)


def test_calibration_stops_at_the_first_wrong_line():
    sample = Sample(
        text="",
        right=False,
        answer=None,
        good=[True, False, False],
        likelihood=[1, 1, 1],
        verifier=[0.95, 0.95, 0.05],
    )
    [(lines, said, right)] = tenths(_said([sample]))
    assert (lines, said, right) == (2, pytest.approx(0.95), 0.5)
    assert calibration_error([(2, 0.95, 0.5)]) == pytest.approx(0.45)
    assert calibration_error([]) is None
