"""The likelihood verifiers, by hand-computed numbers; no score where there is nothing to score."""

from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.core.errors import VerifierFailed
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Candidate, Problem, Verdict
from strategies.likelihood import Likelihood, SelfCertainty

PROBLEM = Problem(token_ids=(1,))


def candidate(*tokens: tuple[str, float], top: tuple[tuple[float, ...], ...] = ()) -> Candidate:
    return Candidate(
        index=0,
        text="".join(piece for piece, _ in tokens),
        token_ids=tuple(range(len(tokens))),
        finish_reason="stop",
        logprobs=tuple(logprob for _, logprob in tokens),
        pieces=tuple(piece for piece, _ in tokens),
        top_logprobs=top,
    )


async def judged(verifier: Likelihood | SelfCertainty, *candidates: Candidate) -> list[Verdict]:
    async with context(FakeEngine([""])) as ctx:
        return await verifier.judge(PROBLEM, candidates, ctx)


HALF, QUARTER = log(0.5), log(0.25)
TWO_LINES = candidate(("a ", HALF), ("b\n", HALF), ("c ", QUARTER), ("d", HALF))


async def test_mean_is_the_geometric_mean_probability():
    [verdict] = await judged(Likelihood(over="mean"), TWO_LINES)
    assert verdict.score == pytest.approx((0.5 * 0.5 * 0.25 * 0.5) ** 0.25)
    assert verdict.steps == ()


async def test_sum_falls_with_the_surprise_of_the_whole():
    [verdict] = await judged(Likelihood(over="sum"), TWO_LINES)
    assert verdict.score == pytest.approx(1 / (1 + 5 * log(2)))


async def test_min_is_the_least_likely_line():
    [verdict] = await judged(Likelihood(), TWO_LINES)
    assert verdict.steps == pytest.approx((0.25, 0.125))
    assert verdict.score == pytest.approx(0.125)


async def test_a_newline_closes_its_line_and_opens_none_after_the_last():
    [verdict] = await judged(
        Likelihood(), candidate(("a", HALF), ("\n", HALF), ("\n\n", QUARTER), ("b\n", HALF))
    )
    assert verdict.steps == pytest.approx((0.25, 0.25, 0.5))


async def test_a_certain_text_scores_one_and_an_impossible_one_zero():
    certain, impossible = candidate(("a", 0.0)), candidate(("a", float("-inf")))
    for over in ("min", "mean", "sum"):
        verdicts = await judged(Likelihood(over=over), certain, impossible)
        assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b\n"]), st.floats(-30, 0)), min_size=1, max_size=12),
    st.floats(-5, -0.01),
)
async def test_scores_fall_when_a_token_becomes_less_likely(
    tokens: list[tuple[str, float]], worse: float
):
    lesser = [(tokens[0][0], tokens[0][1] + worse), *tokens[1:]]
    for over in ("min", "mean", "sum"):
        better, poorer = await judged(Likelihood(over=over), candidate(*tokens), candidate(*lesser))
        assert 0 <= poorer.score <= better.score <= 1


async def test_self_certainty_is_the_divergence_from_uniform():
    sure = (log(0.9), log(0.1))
    even = (log(0.5), log(0.5))
    [verdict] = await judged(SelfCertainty(), candidate(("a", 0.0), ("b", 0.0), top=(sure, even)))
    divergence = (-(log(0.9) + log(0.1)) / 2 - log(2)) / 2  # the even one adds nothing
    assert verdict.score == pytest.approx(1 - exp(-divergence))


async def test_self_certainty_of_an_even_choice_is_zero():
    [verdict] = await judged(SelfCertainty(), candidate(("a", 0.0), top=((HALF, HALF),)))
    assert verdict.score == pytest.approx(0.0)


NAN = float("nan")
UNJUDGED = Candidate(index=3, text="a b", token_ids=(1, 2), finish_reason="stop")
EMPTY = Candidate(index=3, text="", token_ids=(), finish_reason="stop")
SHORT = Candidate(
    index=3, text="a b", token_ids=(1, 2), finish_reason="stop", logprobs=(-1.0,), pieces=("a ",)
)
PIECELESS = Candidate(
    index=3, text="a b", token_ids=(1, 2), finish_reason="stop", logprobs=(-1.0, -1.0)
)


@pytest.mark.parametrize("over", ["min", "mean", "sum"])
@pytest.mark.parametrize("missing", [UNJUDGED, EMPTY, SHORT], ids=["none", "no tokens", "too few"])
async def test_missing_log_probabilities_are_no_opinion(missing: Candidate, over: str):
    with pytest.raises(VerifierFailed, match="candidate 3"):
        await judged(Likelihood.model_validate({"over": over}), missing)


@pytest.mark.parametrize("over", ["min", "mean", "sum"])
async def test_what_is_not_a_number_is_no_opinion(over: str):
    with pytest.raises(VerifierFailed):
        await judged(Likelihood.model_validate({"over": over}), candidate(("a", NAN), ("b", -1.0)))


async def test_lines_without_words_are_no_opinion():
    with pytest.raises(VerifierFailed):
        await judged(Likelihood(over="min"), PIECELESS)


@pytest.mark.parametrize("top", [(), ((-1.0, -2.0),), ((-1.0,), ()), ((-1.0,), (NAN,))])
async def test_missing_distributions_are_no_opinion(top: tuple[tuple[float, ...], ...]):
    with pytest.raises(VerifierFailed):
        await judged(SelfCertainty(), candidate(("a", -1.0), ("b", -1.0), top=top))


async def test_each_asks_the_engine_for_what_it_needs():
    for verifier, wanted in ((Likelihood(), 0), (SelfCertainty(), 20)):
        engine = FakeEngine(["one two\nthree"])
        async with context(engine, verifier=verifier) as ctx:
            candidates = await ctx.sample_many(PROBLEM, 2)
            verdicts = await ctx.verify(PROBLEM, candidates)
        assert {generation.logprobs for generation in engine.asked} == {wanted}
        assert all(0 < verdict.score < 1 for verdict in verdicts)


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValidationError, match="over"):
        Likelihood.model_validate({"over": "max"})
