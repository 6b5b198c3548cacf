"""What fixed numbers of samples elect, and how tokens are compared at equal accuracy."""

import pytest

from bench.optimal import Answered, _planning, _times
from bench.pool import Pool, Sample, elected, fixed

SAMPLES = [
    Sample(right=False, answer="1", score=0.9, tokens=10),
    Sample(right=True, answer="2", score=0.5, tokens=20),
    Sample(right=True, answer="2", score=0.5, tokens=30),
    Sample(right=False, answer=None, score=0.1, tokens=40),
]


def test_votes_and_scores_elect_differently():
    assert not elected("best-of-n", SAMPLES)
    assert elected("majority", SAMPLES)
    assert elected("weighted vote", SAMPLES)
    assert not elected("majority", SAMPLES[3:])


def test_a_fixed_number_pays_for_its_samples_and_their_judge():
    pool = Pool(samples=SAMPLES, judging=5.0)
    assert fixed("majority", 4, pool) == (1.0, 100.0)
    assert fixed("best-of-n", 4, pool) == (0.0, 120.0)
    assert fixed("best-of-n", 1, pool)[0] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    ("right", "times"), [(0.4, 40.0), (0.5, 16.0), (0.6, 8.0), (0.7, 4.0), (0.9, None)]
)
def test_tokens_to_be_as_accurate_lie_on_the_curve(right: float, times: float | None):
    def at(right: float, tokens: float) -> list[Answered]:
        return [Answered(right=right, tokens=tokens)]

    majority = {16: at(right, 1600.0 if right > 0.4 else 4000.0)}
    ours = {2: at(0.5, 100.0), 4: at(0.7, 400.0), 8: at(0.65, 800.0)}
    assert _times(ours, majority, [0]) == (None if times is None else pytest.approx(times))


def test_planning_is_what_surrounds_a_plan():
    names = ["started", "sampled", "planned", "started", "sampled", "planned", "chosen"]
    trace = [{"event": name, "seconds": float(at)} for at, name in enumerate(names)]
    assert _planning(trace) == 4.0
