"""Best-of-N: who wins, and what is never allowed to win."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import exp, sqrt

import pytest
from pydantic import ValidationError

from strategies.best_of_n import BestOfN, softened
from strategies.core.budget import Limits
from strategies.core.errors import VerifierFailed
from strategies.core.events import Scored, Voted
from strategies.core.testing import FakeEngine, FakeVerifier, RecordingContext, context
from strategies.core.types import Candidate, Chunk, Generation, Outcome, Problem, Verdict
from strategies.likelihood import Likelihood

PROBLEM = Problem(token_ids=(1, 2), max_tokens=4)


def scored(*scores: float) -> FakeVerifier:
    return FakeVerifier(lambda candidate: scores[candidate.index])


def at_work(
    texts: Sequence[str], verifier: FakeVerifier, limits: Limits | None = None
) -> RecordingContext:
    return context(FakeEngine(texts), verifier=verifier, limits=limits)


async def test_the_highest_score_wins():
    async with at_work(["1", "2", "3"], scored(0.2, 0.9, 0.5)) as ctx:
        outcome = await BestOfN(n=3).solve(PROBLEM, ctx)
    assert outcome.chosen.text == "2"
    assert outcome.stopped == "samples"
    assert outcome.scores == {0: 0.2, 1: 0.9, 2: 0.5}
    assert outcome.votes == {}
    assert [candidate.index for candidate in outcome.candidates] == [0, 1, 2]
    assert [event.index for event in ctx.events if isinstance(event, Scored)] == [0, 1, 2]


async def test_ties_go_to_the_earliest_sample_not_to_the_fastest():
    engine = FakeEngine(["1", "2", "3"], delay=lambda index: 0.02 - index / 100)
    async with context(engine, verifier=scored(0.5, 0.5, 0.5)) as ctx:
        outcome = await BestOfN(n=3).solve(PROBLEM, ctx)
    assert outcome.chosen.index == 0


async def test_all_samples_are_judged_in_one_batch():
    batches: list[int] = []

    class Batched(FakeVerifier):
        async def judge(
            self, problem: Problem, candidates: Sequence[Candidate], ctx: object
        ) -> list[Verdict]:
            batches.append(len(candidates))
            return [Verdict(score=1.0) for _ in candidates]

    async with at_work(["1"], Batched(lambda candidate: 0.0)) as ctx:
        await BestOfN(n=5).solve(PROBLEM, ctx)
    assert batches == [5]


@pytest.mark.parametrize("select", ["max", "weighted", "soft"])
async def test_a_sample_cut_short_loses_to_any_that_ended_by_itself(select: str):
    texts = ["9 and so on and on", "1", "9 and so on and on"]
    async with at_work(texts, scored(1.0, 0.1, 1.0)) as ctx:
        outcome = await BestOfN.model_validate({"n": 3, "select": select}).solve(PROBLEM, ctx)
    assert [candidate.complete for candidate in outcome.candidates] == [False, True, False]
    assert outcome.chosen.index == 1


@pytest.mark.parametrize("select", ["max", "weighted"])
async def test_among_nothing_but_samples_cut_short_the_best_wins(select: str):
    async with at_work(["7 a b c d", "8 a b c d"], scored(0.3, 0.4)) as ctx:
        outcome = await BestOfN.model_validate({"n": 2, "select": select}).solve(PROBLEM, ctx)
    assert outcome.chosen.index == 1
    assert not outcome.chosen.complete


async def test_a_weighted_vote_adds_up_the_scores_of_equivalent_answers():
    texts = ["5", "0.5", "1/2", r"\boxed{\frac{1}{2}}"]
    async with at_work(texts, scored(0.7, 0.25, 0.375, 0.25)) as ctx:
        outcome = await BestOfN(n=4, select="weighted").solve(PROBLEM, ctx)
    assert outcome.chosen.text == "1/2"  # the best of the heaviest answer
    assert outcome.votes == {"5": 0.7, "0.5": 0.875}
    votes = [(event.answer, event.weight) for event in ctx.events if isinstance(event, Voted)]
    assert votes == [("5", 0.7), ("0.5", 0.25), ("0.5", 0.375), ("0.5", 0.25)]


async def test_max_does_not_vote():
    async with at_work(["5", "0.5", "1/2"], scored(0.7, 0.5, 0.6)) as ctx:
        outcome = await BestOfN(n=3).solve(PROBLEM, ctx)
    assert outcome.chosen.text == "5"
    assert not [event for event in ctx.events if isinstance(event, Voted)]


async def test_a_weighted_tie_goes_to_the_answer_with_the_earliest_sample():
    async with at_work(["1", "2", "2"], scored(0.5, 0.25, 0.25)) as ctx:
        outcome = await BestOfN(n=3, select="weighted").solve(PROBLEM, ctx)
    assert outcome.chosen.index == 0


async def test_a_weighted_vote_without_any_answer_falls_back_on_the_best_score():
    strategy = BestOfN.model_validate(
        {"n": 3, "select": "weighted", "answer": {"kind": "number"}},
    )
    engine = FakeEngine(["who", "knows", "that"])
    async with context(
        engine, verifier=scored(0.1, 0.3, 0.2), answer_format=strategy.answer
    ) as ctx:
        outcome = await strategy.solve(PROBLEM, ctx)
    assert outcome.chosen.text == "knows"
    assert outcome.votes == {}


async def test_a_short_budget_gives_fewer_samples_and_the_best_of_them():
    async with at_work(["1", "2", "3"], scored(0.1, 0.8, 1.0), Limits(samples=2)) as ctx:
        outcome = await BestOfN(n=3).solve(PROBLEM, ctx)
    assert outcome.chosen.text == "2"
    assert outcome.stopped == "samples"


async def test_tokens_are_shared_among_the_samples():
    engine = FakeEngine(["1 2 3 4"])
    async with context(engine, verifier=scored(0.1, 0.8), limits=Limits(tokens=7)) as ctx:
        outcome = await BestOfN(n=2).solve(PROBLEM, ctx)
    assert [generation.max_tokens for generation in engine.asked] == [3, 3]
    assert [candidate.text for candidate in outcome.candidates] == ["1 2 3 ", "1 2 3 "]
    assert outcome.stopped == "exhausted"


async def test_the_engine_gives_the_log_probabilities_that_the_verifier_needs():
    likely = {"sure": -0.01, "maybe": -2.0}
    engine = FakeEngine(["maybe", "sure"], logprob=likely.__getitem__)
    async with context(engine, verifier=Likelihood(over="mean")) as ctx:
        outcome = await BestOfN(n=2).solve(PROBLEM, ctx)
    assert outcome.chosen.text == "sure"
    assert {generation.logprobs for generation in engine.asked} == {0}


async def test_without_a_verifier_there_is_no_answer():
    async with context(FakeEngine(["1"])) as ctx:
        with pytest.raises(VerifierFailed, match="none was chosen"):
            await BestOfN(n=2).solve(PROBLEM, ctx)


async def test_a_verdict_short_is_no_verdict_at_all():
    class Lazy(FakeVerifier):
        async def judge(
            self, problem: Problem, candidates: Sequence[Candidate], ctx: object
        ) -> list[Verdict]:
            return [Verdict(score=1.0)]

    async with at_work(["1"], Lazy(lambda candidate: 0.0)) as ctx:
        with pytest.raises(VerifierFailed, match="1 verdicts on 2 candidates"):
            await BestOfN(n=2).solve(PROBLEM, ctx)


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("n", 257), ("select", "min"), ("samples", 4)]
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: object):
    with pytest.raises(ValidationError) as caught:
        BestOfN.model_validate({field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_a_verifier_is_named_alone_or_with_its_parameters():
    assert BestOfN().judged_by().kind == "likelihood"
    by_name = BestOfN.model_validate({"verifier": "judge"})
    assert by_name.verifier.kind == "judge"
    with_more = BestOfN.model_validate({"verifier": {"kind": "likelihood", "over": "sum"}})
    assert with_more.verifier.model_extra == {"over": "sum"}


def test_soft_selection_draws_by_the_exponential_of_the_score():
    scores = {0: 0.2, 1: 0.8, 2: 0.5}
    draws = [softened(scores, 0.3, seed) for seed in range(4000)]
    first = [max(draw, key=lambda index: draw[index]) for draw in draws]
    total = sum(exp(score / 0.3) for score in scores.values())
    for index, score in scores.items():
        share = exp(score / 0.3) / total
        assert abs(first.count(index) / len(first) - share) < 4 * sqrt(share / len(first))


async def test_soft_selection_is_seeded_and_reports_the_scores_themselves():
    async def solved(softness: float, seed: int) -> Outcome:
        async with at_work(["1", "2", "3"], scored(0.2, 0.9, 0.5)) as ctx:
            strategy = BestOfN(n=3, select="soft", softness=softness)
            return await strategy.solve(replace(PROBLEM, seed=seed), ctx)

    chosen = [(await solved(100, seed)).chosen.index for seed in range(20)]
    assert chosen == [(await solved(100, seed)).chosen.index for seed in range(20)]
    assert set(chosen) == {0, 1, 2}
    hard = [await solved(0.001, seed) for seed in range(20)]
    assert {outcome.chosen.index for outcome in hard} == {1}
    assert hard[0].scores == {0: 0.2, 1: 0.9, 2: 0.5}


def test_softness_is_for_soft_selection_only():
    with pytest.raises(ValidationError, match="'softness' needs select 'soft'"):
        BestOfN(softness=0.1)


def by_model(generation: Generation) -> str:
    return r"\boxed{right}" if generation.adapter == "good" else r"\boxed{wrong}"


async def test_samples_shift_to_the_model_that_scores_higher():
    engine = FakeEngine(by_model)
    strategy = BestOfN(n=40, models=("bad", "good", "worse"))
    likes = FakeVerifier(lambda one: 0.9 if one.answer == "right" else 0.2)
    async with context(engine, verifier=likes) as ctx:
        outcome = await strategy.solve(replace(PROBLEM, seed=3), ctx)
    assert outcome.chosen.model == "good"
    drawn = Counter(one.adapter for one in engine.asked)
    assert sum(drawn.values()) == 40
    assert [one.adapter for one in engine.asked][:6] == ["bad", "good", "worse"] * 2
    assert drawn["good"] > 20
    assert {one.model for one in outcome.candidates} == {"bad", "good", "worse"}


async def test_several_models_keep_to_the_budget_and_answer_with_what_there_is():
    for limits in (Limits(samples=4), Limits(tokens=9), Limits(samples=7)):
        engine = FakeEngine(by_model)
        strategy = BestOfN(n=40, models=("bad", "good"))
        likes = FakeVerifier(lambda one: 0.9 if one.answer == "right" else 0.2)
        async with context(engine, verifier=likes, limits=limits) as ctx:
            outcome = await strategy.solve(replace(PROBLEM, seed=3), ctx)
        assert outcome.chosen.answer == "right"
        assert engine.calls <= (limits.samples or 40)
        assert ctx.budget.spent <= (limits.tokens or 1000)


def test_a_model_is_named_once():
    with pytest.raises(ValidationError, match="names one twice"):
        BestOfN(models=("a", "a"))
    assert BestOfN(models=("a",)).drawn_from() == ("a",)
    assert BestOfN(models=("a",)).judges_together()
    assert not BestOfN(models=("a", "b")).judges_together()
    with pytest.raises(ValidationError, match="twice the number"):
        BestOfN(n=3, models=("a", "b"))


async def test_one_model_draws_all_at_once():
    engine = FakeEngine(by_model)
    async with context(engine, verifier=FakeVerifier(lambda one: 0.5)) as ctx:
        outcome = await BestOfN(n=5, models=("good",)).solve(PROBLEM, ctx)
    assert [one.adapter for one in engine.asked] == ["good"] * 5
    assert outcome.chosen.answer == "right"


async def test_a_lost_sequence_does_not_end_the_rounds():
    class Losing(FakeEngine):
        async def generate(self, generation: Generation):
            if generation.index == 1:
                yield Chunk(finish_reason="abort")
                return
            async for chunk in super().generate(generation):
                yield chunk

    engine = Losing(by_model)
    async with context(engine, verifier=FakeVerifier(lambda one: 0.5)) as ctx:
        outcome = await BestOfN(n=12, models=("good", "bad")).solve(PROBLEM, ctx)
    assert len(outcome.candidates) == 11
