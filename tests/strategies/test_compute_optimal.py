"""Compute-optimal with a calibration: all samples vote, the plan is on record, budgets hold."""

from math import exp

import pytest

from strategies.compute_optimal import ComputeOptimal
from strategies.core.budget import Limits
from strategies.core.calibration import Stage
from strategies.core.errors import BudgetSpent
from strategies.core.events import Chosen, Planned, Sampled
from strategies.core.testing import FakeEngine, FakeVerifier, context
from strategies.core.types import Problem
from tests.strategies.test_calibration import calibration, logit, stage

PROBLEM = Problem(token_ids=(1, 2, 3), max_tokens=12, seed=7)
SPLIT = [f"The answer is {n}." for n in (1, 2, 3, 3, 3, 3, 3, 3)]
AGREED = ["The answer is 3."] * 8


async def solved(texts, strategy=None, *, limits=None, known=None, verifier=None):
    engine = FakeEngine(texts)
    async with context(engine, limits=limits, verifier=verifier) as ctx:
        ctx.calibration = known or calibration().model_copy(
            update={"searches": {}, "stages": more()}
        )
        outcome = await (strategy or ComputeOptimal()).solve(PROBLEM, ctx)
    plans = [event for event in ctx.events if isinstance(event, Planned)]
    return outcome, plans, engine, ctx


def more():
    """The stages without the search."""
    return tuple(
        one.model_copy(update={"more": tuple(m for m in one.more if m.option.isdigit())})
        for one in calibration().stages
    )


async def test_samples_that_agree_end_it_after_the_probe():
    outcome, plans, engine, _ = await solved(AGREED)
    assert engine.calls == 2
    assert outcome.chosen.answer == "3"
    assert outcome.stopped == "decided"
    assert outcome.confidence == plans[-1].confidence
    assert (outcome.confidence or 0) > 0.99
    assert [one.option for one in plans] == [None]


async def test_samples_that_differ_go_on_stage_by_stage_and_all_vote():
    outcome, plans, engine, _ = await solved(SPLIT)
    assert [one.samples for one in plans] == [2, 4, 8]
    assert outcome.chosen.answer == "3"
    assert outcome.votes == {"1": 1.0, "2": 1.0, "3": 6.0}
    assert len(outcome.candidates) == engine.calls == 8
    assert "nothing gains" in plans[-1].why


async def test_probabilities_of_tokens_are_asked_for_if_the_calibration_reads_them():
    _, _, engine, _ = await solved(AGREED)
    assert {one.logprobs for one in engine.asked} == {None}

    def unsure(likely: float) -> Stage:
        return stage(2).model_copy(
            update={"right": logit(likelihood_of_the_leading_answer=likely, bias=-2.0)}
        )

    small = calibration().model_copy(update={"searches": {}, "stages": (unsure(0.0),)})
    assert not small.reads_likelihood
    small = small.model_copy(update={"stages": (unsure(4.0),)})
    assert small.reads_likelihood
    outcome, _, engine, _ = await solved(AGREED, known=small)
    assert {one.logprobs for one in engine.asked} == {0}
    likely = [one.likelihood or 0.0 for one in outcome.candidates]
    assert min(likely) > 0
    logs = 4 * sum(likely) / len(likely) - 2
    assert outcome.confidence == pytest.approx(1 / (1 + exp(-logs)))


async def test_a_small_budget_makes_tokens_dear():
    dear = calibration().model_copy(
        update={
            "searches": {},
            "stages": more(),
            "fixed": ((20.0, 0.2), (40.0, 0.9), (400.0, 0.91)),
        }
    )
    _, plans, engine, _ = await solved(SPLIT, limits=Limits(samples=2), known=dear)
    assert engine.calls == 2
    assert plans[-1].option is None
    outcome, plans, _, ctx = await solved(SPLIT, limits=Limits(tokens=14), known=dear)
    assert ctx.budget.spent <= 14
    assert outcome.stopped in ("exhausted", "decided", "samples")


async def test_a_search_votes_with_the_samples_and_ends_once():
    outcome, plans, engine, ctx = await solved(
        SPLIT, known=calibration(), verifier=FakeVerifier(lambda text: 0.5)
    )
    assert plans[0].option == "beam"
    assert plans[-1].samples > 2
    assert sum(isinstance(event, Chosen) for event in ctx.events) == 1
    finished = {event.candidate.index for event in ctx.events if isinstance(event, Sampled)}
    assert {one.index for one in outcome.candidates} <= finished
    assert engine.calls > 2


async def test_the_mean_sets_the_price_and_the_budget_bounds():
    fixed = ((20.0, 0.2), (40.0, 0.9), (400.0, 0.91))
    change = {"searches": {}, "stages": more(), "fixed": fixed}
    known = calibration().model_copy(update=change)
    far, near = ComputeOptimal(mean_tokens=300), ComputeOptimal(mean_tokens=30)
    _, _, few, _ = await solved(SPLIT, near, known=known)
    _, _, many, _ = await solved(SPLIT, far, known=known)
    assert few.calls < many.calls
    _, _, bounded, _ = await solved(SPLIT, far, known=known, limits=Limits(tokens=20))
    assert bounded.tokens <= 20


async def test_revisions_are_a_way_to_go_on():
    refine = {"beam": {"kind": "self_refine", "n": 3, "parallel": 1}}
    outcome, plans, engine, _ = await solved(
        SPLIT,
        known=calibration().model_copy(update={"searches": refine}),
        verifier=FakeVerifier(lambda text: 0.5),
    )
    assert plans[0].option == "beam"
    assert any(len(turns) == 3 for turns in engine.rendered)
    assert sum(outcome.votes.values()) == 5


@pytest.mark.parametrize(("tokens", "stopped"), [(2000, "decided"), (110, "exhausted")])
async def test_a_search_that_runs_out_has_decided_nothing(tokens: int, stopped: str):
    wide = {"beam": {"kind": "beam_search", "width": 4, "branch": 4}}
    change = {"fixed": ((20.0, 0.2), (9000.0, 0.99)), "searches": wide}
    outcome, plans, _, ctx = await solved(
        SPLIT[:2] + [f"so {n} a b \n" for n in range(400)],
        known=calibration().model_copy(update=change),
        verifier=FakeVerifier(lambda text: 0.5),
        limits=Limits(tokens=tokens),
    )
    assert plans[0].option == "beam"
    assert outcome.stopped == stopped
    assert ctx.budget.spent <= tokens


async def test_it_abstains_where_it_is_not_sure_enough():
    outcome, *_ = await solved(SPLIT, ComputeOptimal(min_confidence=0.95))
    assert outcome.abstained
    outcome, *_ = await solved(AGREED, ComputeOptimal(min_confidence=0.95))
    assert not outcome.abstained


async def test_a_wanted_confidence_goes_on_whatever_it_costs():
    dear = calibration().model_copy(
        update={"searches": {}, "stages": more(), "fixed": ((20.0, 0.0), (100.0, 0.99))}
    )
    limits = Limits(tokens=100)
    _, plans, engine, _ = await solved(SPLIT, known=dear, limits=limits)
    assert engine.calls == 2
    sure = ComputeOptimal(target_confidence=0.9)
    _, plans, engine, _ = await solved(SPLIT, sure, known=dear, limits=limits)
    assert engine.calls == 8
    assert {one.why for one in plans[:-1]} == {"not sure enough"}


async def test_without_a_calibration_it_votes_and_says_so():
    engine = FakeEngine(AGREED)
    async with context(engine) as ctx:
        outcome = await ComputeOptimal().solve(PROBLEM, ctx)
    assert outcome.stopped == "decided"
    [said] = [event for event in ctx.events if isinstance(event, Planned)]
    assert "no calibration" in said.why


def test_abstaining_above_what_is_aimed_at_is_refused():
    with pytest.raises(ValueError, match="min_confidence"):
        ComputeOptimal(target_confidence=0.6, min_confidence=0.7)


async def test_what_nobody_judged_has_no_vote_and_no_confidence():
    class Broke(FakeVerifier):
        async def judge(self, problem, candidates, ctx):
            raise BudgetSpent("no tokens are left for it")

    outcome, plans, *_ = await solved(
        AGREED, ComputeOptimal(min_confidence=0.1), verifier=Broke(lambda text: 1.0)
    )
    assert outcome.chosen.answer == "3"
    assert outcome.votes == outcome.scores == {}
    assert outcome.confidence is None
    assert outcome.abstained
    assert "before anything was judged" in plans[-1].why
