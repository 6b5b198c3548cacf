"""Deep confidence: the bar, who is given up and when, whose votes count, and when it is over."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.core.budget import Limits
from strategies.core.errors import NoCandidate, VerifierFailed
from strategies.core.events import Aborted, Started, Voted
from strategies.core.testing import FakeEngine, RecordingContext, context
from strategies.core.types import Chunk, Generation, Outcome, Problem
from strategies.deep_confidence import DeepConfidence

PROBLEM = Problem(token_ids=(1, 2), max_tokens=12, seed=0)
SURE, FAIR, UNSURE = "sure ", "fair ", "hm "
LIKELY = {SURE: -0.001, FAIR: -0.2, UNSURE: -1.5}


def likely(piece: str) -> float:
    return LIKELY.get(piece, -0.001)


def mean_of(piece: str, k: int) -> float:
    """The confidence of the fake engine's distribution at this piece."""
    left = 1 - exp(likely(piece))
    return -(likely(piece) + sum(log(left / 2**number) for number in range(1, k))) / k


async def solved(
    texts: list[str] | Callable[[Generation], str], limits: Limits | None = None, **fields: object
) -> tuple[Outcome, FakeEngine, RecordingContext]:
    strategy = DeepConfidence.model_validate({"group": 2, "likeliest": 4, **fields})
    engine = FakeEngine(texts, logprob=likely)
    async with context(engine, limits=limits, answer_format=strategy.answer) as ctx:
        return await strategy.solve(PROBLEM, ctx), engine, ctx


async def test_confidence_is_that_of_the_least_sure_group():
    texts = [SURE * 3 + r"\boxed{1}", SURE + FAIR * 2 + SURE + r"\boxed{1}", FAIR + r"\boxed{2}"]
    outcome, *_ = await solved(texts, n=3, warmup=3, eta=1.0)
    sure, fair = mean_of(SURE, 4), mean_of(FAIR, 4)
    assert outcome.scores == pytest.approx({0: sure, 1: fair, 2: (sure + fair) / 2})
    assert outcome.votes == pytest.approx({"1": sure + fair, "2": (sure + fair) / 2})
    assert outcome.stopped == "samples"


async def test_a_trace_shorter_than_a_group_has_the_confidence_of_all_of_it():
    outcome, *_ = await solved([FAIR + r"\boxed{1}"], n=1, group=50)
    assert outcome.scores[0] == pytest.approx((mean_of(FAIR, 4) + mean_of(SURE, 4)) / 2)


async def test_later_traces_are_aborted_where_they_fall_below_the_bar():
    texts = [SURE * 4 + r"\boxed{1}", SURE * 4 + r"\boxed{2}", SURE + UNSURE * 6 + r"\boxed{3}"]
    outcome, engine, ctx = await solved(texts, n=6, warmup=2, eta=1.0)
    aborted = [event for event in ctx.events if isinstance(event, Aborted)]
    assert [event.index for event in aborted] == [2, 5]
    assert {event.tokens for event in aborted} == {2}, "the second token fills the first group"
    assert engine.tokens == 4 * 5 + 2 * 2
    assert set(outcome.votes) == {"1", "2"}
    assert [one.piecewise for one in engine.asked] == [False] * 2 + [True] * 4
    assert {one.logprobs for one in engine.asked} == {4}


async def test_a_trace_that_is_unsure_at_its_very_end_is_given_up_all_the_same():
    texts = [SURE * 2 + r"\boxed{1}", SURE * 2 + r"\boxed{2}", SURE + UNSURE]
    outcome, _, ctx = await solved(texts, n=3, warmup=2, eta=1.0)
    assert [event.tokens for event in ctx.events if isinstance(event, Aborted)] == [2]
    assert len(outcome.candidates) == 2


@pytest.mark.parametrize(
    ("eta", "voters"), [(0.1, {0}), (0.5, {0, 3}), (0.75, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
async def test_only_the_most_confident_share_of_the_warm_up_votes(eta: float, voters: set[int]):
    words = [SURE * 2, FAIR * 2, UNSURE * 2, SURE + FAIR]
    texts = [of_one + rf"\boxed{{{at}}}" for at, of_one in enumerate(words)]
    outcome, _, ctx = await solved(texts, n=4, warmup=4, eta=eta)
    assert {event.index for event in ctx.events if isinstance(event, Voted)} == voters
    assert outcome.chosen.index == 0
    assert len(outcome.candidates) == 4


async def test_confidence_outweighs_number():
    texts = [SURE * 2 + r"\boxed{1}", UNSURE * 2 + r"\boxed{2}", UNSURE * 2 + r"\boxed{2}"]
    outcome, *_ = await solved(texts, n=3, warmup=3, eta=1.0)
    assert mean_of(SURE, 4) > 2 * mean_of(UNSURE, 4)
    assert outcome.chosen.answer == "1"


async def test_a_warm_up_that_agrees_is_enough():
    outcome, engine, _ = await solved([r"\boxed{1}", r"\boxed{1.0}"], n=64, warmup=4)
    assert outcome.stopped == "decided"
    assert engine.calls == 4


async def test_it_draws_at_once_what_would_make_the_consensus():
    def write(one: Generation) -> str:
        return SURE * 2 + rf"\boxed{{{2 if one.index == 1 else 1}}}"

    outcome, engine, ctx = await solved(write, n=64, warmup=2, consensus=0.9)
    # 1 of 2 agree; 8 more make 9 of 10.
    assert outcome.stopped == "decided"
    assert engine.calls == 10
    assert outcome.votes["1"] / sum(outcome.votes.values()) == pytest.approx(0.9)
    starts = [at for at, one in enumerate(ctx.events) if isinstance(one, Started)]
    assert starts[2:] == list(range(starts[2], starts[2] + 8))


async def test_one_vote_is_no_consensus():
    texts = [SURE * 2 + r"\boxed{1}", UNSURE * 2 + r"\boxed{2}", UNSURE * 2 + r"\boxed{2}"]
    outcome, *_ = await solved(texts, n=12, warmup=3, eta=0.1)
    assert [one.index for one in outcome.candidates] == [0, 1, 2, 3, 6]
    assert outcome.stopped == "decided"


async def test_unanimity_may_be_asked_for():
    outcome, engine, _ = await solved([r"\boxed{1}", r"\boxed{2}"], n=6, warmup=2, consensus=1)
    assert engine.calls == 6
    assert outcome.stopped == "samples"
    assert outcome.chosen.index == 0, "the earliest, in a tie"


async def test_without_answers_the_earliest_sure_complete_trace_is_returned():
    format_ = {"kind": "number"}
    outcome, *_ = await solved([UNSURE * 3, SURE * 3], n=2, warmup=2, eta=0.5, answer=format_)
    assert outcome.votes == {}
    assert outcome.chosen.index == 1


async def test_what_the_budget_ends_is_no_consensus():
    number = {"kind": "number"}
    outcome, *_ = await solved([SURE * 9], Limits(tokens=7), n=8, warmup=2, answer=number)
    assert outcome.stopped == "exhausted"
    with pytest.raises(NoCandidate):
        await solved([SURE], Limits(seconds=1e-9), n=8)


async def test_an_engine_without_log_probabilities_is_told():
    class Silent(FakeEngine):
        def _chunk(self, *args: object) -> Chunk:
            return replace(super()._chunk(*args), top_logprobs=())  # type: ignore[arg-type]

    async with context(Silent([SURE])) as ctx:
        with pytest.raises(VerifierFailed, match="'deep_confidence' needs"):
            await DeepConfidence().solve(PROBLEM, ctx)


@given(
    words=st.lists(st.lists(st.sampled_from([SURE, FAIR, UNSURE]), max_size=8), min_size=1),
    eta=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    group=st.integers(1, 6),
)
def test_a_trace_is_given_up_if_and_only_if_one_of_its_groups_is_below_the_bar(
    words: list[list[str]], eta: float, group: int
):
    texts = ["".join(one) + rf"\boxed{{{at}}}" for at, one in enumerate(words)]

    async def main() -> None:
        outcome, _, ctx = await solved(texts, n=12, warmup=4, eta=eta, group=group, consensus=1)
        given_up = {event.index for event in ctx.events if isinstance(event, Aborted)}
        lowest: dict[int, float] = {}
        for index in range(12 if outcome.stopped == "samples" else 4):
            pieces = [*words[index % len(words)], "end"]
            of_each = [mean_of(piece, 4) for piece in pieces]
            size = min(group, len(of_each))
            groups = [sum(of_each[at : at + size]) / size for at in range(len(of_each) - size + 1)]
            lowest[index] = min(groups)
        bar = sorted(list(lowest.values())[:4], reverse=True)[max(1, round(eta * 4 + 0.49)) - 1]
        for index, confidence in lowest.items():
            below = confidence < bar - 1e-9
            whole_group = len(words[index % len(words)]) + 1 >= group
            assert (index in given_up) == (index >= 4 and below and whole_group), index

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 257},
        {"warmup": 0},
        {"eta": 0},
        {"eta": 1.1},
        {"likeliest": 1},
        {"likeliest": 21},
        {"group": 0},
        {"consensus": 0.5},
    ],
    ids=str,
)
def test_bounds(fields: dict[str, object]):
    with pytest.raises(ValueError, match="than"):
        DeepConfidence.model_validate(fields)
