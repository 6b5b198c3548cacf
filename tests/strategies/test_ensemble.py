"""Several verifiers as one."""

import pytest

from strategies.core.errors import VerifierFailed
from strategies.core.testing import FakeEngine, FakeVerifier, context
from strategies.core.types import Candidate, Problem, Verdict
from strategies.ensemble import Agree, Ensemble

PROBLEM = Problem(token_ids=(1,))
CANDIDATES = [
    Candidate(index=at, text=f"{at}", token_ids=(at,), finish_reason="stop") for at in range(3)
]


def by(*scores: float) -> FakeVerifier:
    return FakeVerifier(lambda candidate: scores[candidate.index])


async def judged(agree: Agree, *members: FakeVerifier) -> list[float]:
    async with context(FakeEngine([""])) as ctx:
        verdicts = await Ensemble(members, agree).judge(PROBLEM, CANDIDATES, ctx)
    return [verdict.score for verdict in verdicts]


@pytest.mark.parametrize(
    ("agree", "expected"),
    [("mean", [0.5, 0.5, 0.3]), ("min", [0.1, 0.4, 0.0]), ("vote", [0.5, 0.0, 0.5])],
)
async def test_how_they_agree(agree: Agree, expected: list[float]):
    scores = await judged(agree, by(0.9, 0.6, 0.0), by(0.1, 0.4, 0.6))
    assert scores == pytest.approx(expected)


async def test_a_tie_shares_the_vote():
    assert await judged("vote", by(0.5, 0.5, 0.1), by(0.1, 0.9, 0.2)) == [0.25, 0.75, 0.0]


async def test_steps_agree_step_by_step_where_all_have_as_many():
    class Steps(FakeVerifier):
        def __init__(self, *steps: float) -> None:
            super().__init__(lambda candidate: steps[-1])
            self.steps = steps

        async def judge(self, problem, candidates, ctx):  # type: ignore[no-untyped-def]
            return [Verdict(score=self.steps[-1], steps=self.steps) for _ in candidates]

    async with context(FakeEngine([""])) as ctx:
        same = Ensemble([Steps(0.2, 0.8), Steps(0.6, 0.4)], "min")
        other = Ensemble([Steps(0.2, 0.8), Steps(0.6)], "min")
        assert (await same.judge(PROBLEM, CANDIDATES, ctx))[0].steps == (0.2, 0.4)
        assert (await other.judge(PROBLEM, CANDIDATES, ctx))[0].steps == ()


async def test_one_without_an_opinion_leaves_all_without():
    def fail(candidate: Candidate) -> float:
        raise VerifierFailed("no opinion")

    with pytest.raises(VerifierFailed):
        await judged("mean", by(1, 1, 1), FakeVerifier(fail))


def test_it_needs_what_its_members_need():
    plain, reading = by(0, 0, 0), FakeVerifier(lambda one: 0.0, logprobs=20, reads=True)
    both = Ensemble([plain, reading], "mean")
    assert both.logprobs == 20
    assert both.aside(90) == 10
    assert both.stepwise
    assert Ensemble([plain, plain], "mean").logprobs is None
    assert not Ensemble([plain, plain], "vote").stepwise
