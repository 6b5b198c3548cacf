"""Self-consistency: what wins the vote, when it ends, and how few samples it takes."""

from collections.abc import Callable, Mapping, Sequence
from math import log
from random import Random

import pytest
from pydantic import ValidationError

from strategies.core.budget import Limits
from strategies.core.errors import EngineUnavailable, NoCandidate
from strategies.core.events import Aborted, Sampled, Started, Voted
from strategies.core.testing import FakeEngine, FakeVerifier, RecordingContext, context
from strategies.core.types import Outcome, Problem
from strategies.likelihood import Likelihood
from strategies.self_consistency import SelfConsistency

PROBLEM = Problem(token_ids=(1, 2), max_tokens=4)


def at_once(index: int) -> float:
    return 0.0


class Vote:
    """One run to its end, with all that can be asked about it."""

    def __init__(
        self,
        texts: Sequence[str],
        limits: Limits | None = None,
        *,
        delay: Callable[[int], float] = at_once,
        scores: Sequence[float] = (),
        failures: Mapping[tuple[int, int], Exception] | None = None,
        **fields: object,
    ) -> None:
        self.strategy = SelfConsistency.model_validate(fields)
        self.engine = FakeEngine(texts, delay=delay, failures=failures)
        self.limits = limits
        self.verifier = FakeVerifier(lambda one: scores[one.index]) if scores else None
        self.ctx: RecordingContext

    async def outcome(self) -> Outcome:
        self.ctx = context(
            self.engine,
            limits=self.limits,
            verifier=self.verifier,
            answer_format=self.strategy.answer,
        )
        async with self.ctx:
            return await self.strategy.solve(PROBLEM, self.ctx)


async def test_the_answer_of_most_samples_wins_in_its_earliest_words():
    vote = Vote(["1", "so 2", "2", "3", "2"], n=5, early_stop="never")
    outcome = await vote.outcome()
    assert outcome.chosen.text == "so 2"
    assert outcome.votes == {"1": 1.0, "2": 3.0, "3": 1.0}
    assert outcome.stopped == "samples"
    assert len(outcome.candidates) == 5
    assert len([event for event in vote.ctx.events if isinstance(event, Voted)]) == 5


async def test_equivalent_answers_vote_together():
    vote = Vote(["3", "0.5", "3", "1/2", r"\boxed{\frac{1}{2}}"], n=5, early_stop="never")
    outcome = await vote.outcome()
    assert outcome.votes == {"3": 2.0, "0.5": 3.0}
    assert outcome.chosen.text == "0.5"


async def test_a_tie_goes_to_the_answer_with_the_earliest_sample_however_late_it_comes():
    vote = Vote(
        ["1", "2", "2", "1"], n=4, early_stop="never", delay=lambda index: 0.02 * (index == 0)
    )
    outcome = await vote.outcome()
    assert outcome.chosen.index == 0
    assert next(iter(outcome.votes)) == "2"


async def test_the_earliest_complete_sample_of_the_winning_answer_is_returned():
    outcome = await Vote(["2 and so on and on", "2", "2"], n=3, early_stop="never").outcome()
    assert not outcome.candidates[0].complete
    assert outcome.chosen.index == 1


async def test_without_any_answer_the_earliest_complete_sample_is_returned_and_nobody_voted():
    texts = ["it is not for me to say", "who knows", "maybe"]
    vote = Vote(texts, n=3, answer={"kind": "number"})
    outcome = await vote.outcome()
    assert outcome.chosen.text == "who knows"
    assert outcome.votes == {}
    assert outcome.confidence is None
    assert not [event for event in vote.ctx.events if isinstance(event, Voted)]


async def test_samples_without_an_answer_do_not_vote_but_count():
    outcome = await Vote(
        ["who", "knows", "that", "4"], n=4, answer={"kind": "number"}, early_stop="window", window=3
    ).outcome()
    assert outcome.votes == {"4": 1.0}
    assert outcome.chosen.text == "4"
    assert outcome.stopped == "samples"


@pytest.mark.parametrize(
    ("rule", "calls"), [("never", 16), ("unassailable", 9), ("confidence", 4), ("window", 4)]
)
async def test_unanimous_samples_end_the_vote_as_early_as_the_rule_allows(rule: str, calls: int):
    vote = Vote(["42"], n=16, early_stop=rule)
    outcome = await vote.outcome()
    assert vote.engine.calls == calls
    assert len(outcome.candidates) == calls
    assert outcome.stopped == ("samples" if rule == "never" else "decided")
    assert outcome.votes == {"42": calls}


async def test_the_confidence_of_the_vote_is_the_posterior_of_its_leaders():
    outcome = await Vote(["42"], n=16, early_stop="confidence").outcome()
    assert outcome.confidence == 0.96875


async def test_more_samples_are_started_only_when_the_first_did_not_decide():
    vote = Vote(["1", "1", "1", "2", "1", "1", "1"], n=7)
    outcome = await vote.outcome()
    assert vote.engine.calls == 5  # four would have done, had they agreed
    assert outcome.stopped == "decided"
    assert outcome.chosen.answer == "1"


async def test_all_samples_are_drawn_when_the_vote_stays_open():
    vote = Vote(["1", "2"], n=6)
    outcome = await vote.outcome()
    assert vote.engine.calls == 6
    assert outcome.stopped == "samples"
    assert outcome.votes == {"1": 3.0, "2": 3.0}


async def test_a_window_that_disagrees_costs_the_next_one():
    vote = Vote(["1", "2", "1", "1", "3", "3", "3", "3"], n=16, early_stop="window")
    outcome = await vote.outcome()
    assert vote.engine.calls == 8
    assert outcome.stopped == "decided"
    assert outcome.votes == {"1": 3.0, "2": 1.0, "3": 4.0}


@pytest.mark.parametrize("rule", ["unassailable", "confidence", "window"])
async def test_started_all_at_once_the_rest_is_aborted_in_the_engine(rule: str):
    needed = {"unassailable": 9, "confidence": 4, "window": 4}[rule]
    vote = Vote(
        ["42"],
        n=16,
        early_stop=rule,
        start="all",
        delay=lambda index: 0.0 if index < needed else 30.0,
    )
    outcome = await vote.outcome()
    rest = set(range(needed, 16))
    assert vote.engine.calls == 16
    assert set(vote.engine.aborted) == rest
    assert {event.index for event in vote.ctx.events if isinstance(event, Aborted)} == rest
    assert outcome.stopped == "decided"
    assert vote.engine.running == 0


@pytest.mark.parametrize("shuffle", range(3))
@pytest.mark.parametrize("start", ["all", "as_needed"])
@pytest.mark.parametrize("rule", ["confidence", "window"])
async def test_rules_that_count_in_order_stop_at_the_same_place_whatever_arrives_first(
    rule: str, start: str, shuffle: int
):
    texts = ["2", "1", "1", "2", "1", "1", "1", "1", "1", "1", "2", "2"]
    delays = [index / 500 for index in range(12)]
    Random(shuffle).shuffle(delays)
    vote = Vote(texts, n=12, early_stop=rule, start=start, delay=delays.__getitem__)
    outcome = await vote.outcome()
    counted = {"confidence": {"2": 2.0, "1": 8.0}, "window": {"2": 2.0, "1": 6.0}}[rule]
    assert outcome.votes == counted
    assert outcome.chosen.index == 1
    assert outcome.stopped == "decided"


@pytest.mark.parametrize("start", ["all", "as_needed"])
@pytest.mark.parametrize("seed", range(4))
async def test_an_unassailable_vote_has_the_winner_of_the_full_vote(seed: int, start: str):
    dice = Random(seed)
    texts = [dice.choice("1112") for _ in range(9)]
    delays = [dice.random() / 100 for _ in range(9)]
    full = await Vote(texts, n=9, early_stop="never").outcome()
    early = await Vote(texts, n=9, start=start, delay=delays.__getitem__).outcome()
    assert early.chosen.answer == full.chosen.answer


async def test_a_weighted_vote_counts_scores_instead_of_heads():
    vote = Vote(
        ["1", "2", "1"],
        scores=[0.25, 0.875, 0.5],
        n=3,
        early_stop="never",
        weight="verifier",
        verifier="fake",
    )
    outcome = await vote.outcome()
    assert outcome.chosen.text == "2"
    assert outcome.votes == {"1": 0.75, "2": 0.875}
    assert outcome.scores == {0: 0.25, 1: 0.875, 2: 0.5}
    assert outcome.confidence is None  # it counts heads


async def test_votes_weighted_by_confidence_count_the_mean_token_probability():
    likely = {"1": 0.3, "2": 0.9, "well ": 0.9, "so ": 0.1}
    engine = FakeEngine(["1", "well 2", "so 1"], logprob=lambda piece: log(likely[piece]))
    strategy = SelfConsistency(n=3, weight="confidence", early_stop="never")
    judge = strategy.judged_by()
    assert judge is not None
    assert judge.model_dump() == {"kind": "likelihood", "over": "mean"}
    async with context(engine, verifier=Likelihood.model_validate(judge.model_dump())) as ctx:
        outcome = await strategy.solve(PROBLEM, ctx)
    assert outcome.chosen.text == "well 2"
    assert outcome.votes == pytest.approx({"1": 0.3 + 0.03**0.5, "2": 0.9})


async def test_a_weighted_vote_is_not_over_while_heavier_votes_may_come():
    vote = Vote(["1", "1", "2"], scores=[0.25, 0.25, 1.0], n=3, weight="verifier", verifier="fake")
    outcome = await vote.outcome()
    assert vote.engine.calls == 3
    assert outcome.chosen.text == "2"


async def test_samples_are_judged_only_while_the_vote_is_open():
    vote = Vote(["1"], scores=[1.0] * 16, n=16, start="all", weight="verifier", verifier="fake")
    outcome = await vote.outcome()
    assert vote.verifier is not None
    assert len(vote.verifier.judged) == 9
    assert outcome.votes == {"1": 9.0}


async def test_votes_held_back_for_an_earlier_sample_are_counted_when_it_never_comes():
    vote = Vote(
        ["1", "3", "2", "2"],
        Limits(seconds=0.5),
        n=4,
        early_stop="confidence",
        delay=lambda index: 30.0 if index == 0 else 0.0,
    )
    outcome = await vote.outcome()
    assert outcome.votes == {"3": 1.0, "2": 2.0}
    assert outcome.chosen.text == "2"
    assert outcome.stopped == "deadline"


async def test_nothing_is_started_after_the_deadline():
    seen: set[int] = set()

    def after_one_token(index: int) -> float:
        if index in seen:
            return 30.0
        seen.add(index)
        return 0.0

    vote = Vote(["1 or so", "2 or so"], Limits(seconds=0.5), n=8, delay=after_one_token)
    outcome = await vote.outcome()
    assert outcome.stopped == "deadline"
    assert outcome.votes == {"1": 3.0, "2": 2.0}
    assert vote.engine.calls == 5  # undecided, so it would have started the other three


async def test_the_deadline_before_the_first_token_leaves_no_candidate():
    vote = Vote(["1"], Limits(seconds=0.02), delay=lambda index: 30.0)
    with pytest.raises(NoCandidate):
        await vote.outcome()
    assert vote.engine.running == 0


async def test_the_budget_in_samples_ends_the_vote():
    vote = Vote(["1", "2", "2"], Limits(samples=3), n=16)
    outcome = await vote.outcome()
    assert vote.engine.calls == 3
    assert outcome.chosen.answer == "2"
    assert outcome.stopped == "samples"


async def test_the_budget_in_tokens_ends_the_vote():
    vote = Vote(["1", "2"], Limits(tokens=10), n=16)
    outcome = await vote.outcome()
    assert vote.ctx.budget.spent == 10
    assert outcome.stopped == "exhausted"


async def test_out_of_samples_and_out_of_tokens_the_tokens_are_named():
    vote = Vote(["1 2 3 4"], Limits(samples=2, tokens=6), n=16)
    outcome = await vote.outcome()
    assert [candidate.finish_reason for candidate in outcome.candidates] == ["length"] * 2
    assert outcome.stopped == "exhausted"


async def test_samples_that_never_began_are_settled_when_a_failure_ends_the_run():
    error = EngineUnavailable("dead")
    vote = Vote(["1", "2", "3"], Limits(tokens=100), n=6, failures={(2, 0): error})
    with pytest.raises(EngineUnavailable) as caught:
        await vote.outcome()
    assert caught.value is error
    started = [event.index for event in vote.ctx.events if isinstance(event, Started)]
    sampled = [e.candidate.index for e in vote.ctx.events if isinstance(e, Sampled)]
    aborted = [event.index for event in vote.ctx.events if isinstance(event, Aborted)]
    assert set(vote.engine.aborted) <= set(aborted) != set()  # else this test shows nothing
    assert sorted(sampled + aborted) == started
    assert vote.ctx.budget.reserved == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "verifier"}, "'verifier' and weight 'verifier' go together"),
        ({"verifier": "likelihood"}, "'verifier' and weight 'verifier' go together"),
        (
            {"weight": "verifier", "verifier": "likelihood", "early_stop": "confidence"},
            "early_stop 'confidence' counts whole votes",
        ),
        (
            {"weight": "confidence", "early_stop": "confidence"},
            "early_stop 'confidence' counts whole votes",
        ),
        (
            {"weight": "confidence", "verifier": "likelihood"},
            "'verifier' and weight 'verifier' go together",
        ),
        ({"n": 0}, "n\n"),
        ({"confidence": 0.5}, "confidence\n"),
        ({"confidence": 1.0}, "confidence\n"),
        ({"window": 1}, "window\n"),
        ({"stop": "never"}, "stop\n"),
    ],
)
def test_contradictions_and_senseless_values_are_refused_by_name(
    fields: dict[str, object], words: str
):
    with pytest.raises(ValidationError, match=words):
        SelfConsistency.model_validate(fields)


def test_only_a_weighted_vote_has_a_judge():
    assert SelfConsistency().judged_by() is None
    weighted = SelfConsistency.model_validate({"weight": "verifier", "verifier": "likelihood"})
    judge = weighted.judged_by()
    assert judge is not None
    assert judge.kind == "likelihood"


@pytest.mark.parametrize(
    "fields",
    [{"window": 3}, {"confidence": 0.9}, {"early_stop": "window", "confidence": 0.9}],
)
def test_a_bound_of_another_rule_is_refused_not_ignored(fields):
    with pytest.raises(ValidationError, match="needs early_stop"):
        SelfConsistency.model_validate(fields)
