"""Self-refine: what a revision reads, which of them is taken, and what wins in the end."""

from collections.abc import Callable, Sequence

import pytest
from pydantic import ValidationError

from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest, NoCandidate
from strategies.core.events import Started
from strategies.core.testing import FakeEngine, FakeVerifier, RecordingContext, context, encode
from strategies.core.types import Candidate, Generation, Outcome, Problem, Turn
from strategies.self_refine import REVISE, SelfRefine

QUESTION = encode("How many? ")
PROBLEM = Problem(token_ids=QUESTION, max_tokens=8, seed=0)
PROMPT = "again "


def by_place(texts: Sequence[str]) -> Callable[[Generation], str]:
    """Texts by the number of the draw, which its seed tells."""
    return lambda one: texts[(one.seed or 0) % len(texts)]


async def solved(
    texts: Sequence[str],
    *,
    score: Callable[[Candidate], float] | None = None,
    limits: Limits | None = None,
    engine: FakeEngine | None = None,
    problem: Problem = PROBLEM,
    **fields: object,
) -> tuple[Outcome, FakeEngine, RecordingContext]:
    if score is not None:
        fields["verifier"] = "fake"
    strategy = SelfRefine.model_validate({"revise_prompt": PROMPT, **fields})
    engine = engine or FakeEngine(by_place(texts))
    ctx = context(
        engine,
        limits=limits,
        verifier=None if score is None else FakeVerifier(score),
        answer_format=strategy.answer,
    )
    async with ctx:
        return await strategy.solve(problem, ctx), engine, ctx


def revised(engine: FakeEngine) -> list[str]:
    """The answers that the engine was shown, in order."""
    return [turns[1].content for turns in engine.rendered[3:] if len(turns) == 3]


def number(one: Candidate) -> float:
    """A verifier that likes large answers."""
    return int(one.answer or 0) / 10


async def test_a_revision_reads_the_conversation_with_its_answer_and_the_prompt_after_it():
    _, engine, _ = await solved(["first 1", "second 2", "third 3"], n=3, parallel=1)
    first, second, third = engine.asked
    assert first.token_ids == QUESTION
    assert second.token_ids == QUESTION + encode(f"first 1\n{PROMPT}\n")
    assert third.token_ids == QUESTION + encode(f"second 2\n{PROMPT}\n")
    assert {one.continues for one in engine.asked} == {None}, "it is an answer of its own"


async def test_chains_run_side_by_side_and_the_first_are_longer():
    texts = [str(number) for number in range(7)]
    _, engine, ctx = await solved(texts, n=7, parallel=3, score=number)
    assert [one.seed for one in engine.asked] == list(range(7))
    assert revised(engine) == ["0", "1", "2", "3"]
    starts = [event.index for event in ctx.events if isinstance(event, Started)]
    assert starts == list(range(7))
    assert engine.asked[6].token_ids == QUESTION + encode(f"3\n{PROMPT}\n")


async def test_only_a_revision_that_scores_higher_is_revised_further():
    outcome, engine, _ = await solved(["5", "3", "5", "7", "6"], n=5, parallel=1, score=number)
    assert revised(engine) == ["5", "5", "5", "7"]
    assert outcome.chosen.answer == "7"
    assert outcome.scores == {0: 0.5, 1: 0.3, 2: 0.5, 3: 0.7, 4: 0.6}
    assert outcome.stopped == "samples"


async def test_an_answer_that_ended_by_itself_is_taken_for_one_that_was_cut():
    cut = "9 and so on and on and on and on"
    outcome, engine, _ = await solved([cut, "1", "2"], n=3, parallel=1, score=number)
    assert engine.asked[2].token_ids == QUESTION + encode(f"1\n{PROMPT}\n")
    assert outcome.chosen.answer == "2"


async def test_it_ends_at_a_score_that_is_good_enough():
    texts = ["1", "2", "8", "1", "9", "1"]
    outcome, engine, _ = await solved(texts, n=6, parallel=2, score=number, accept_at=0.8)
    assert engine.calls == 4
    assert outcome.chosen.answer == "8"
    assert outcome.stopped == "decided"


async def test_all_judged_answers_may_vote():
    texts = ["4", "5", "4", "1"]
    outcome, *_ = await solved(texts, n=4, parallel=2, score=number, select="weighted")
    assert outcome.votes == pytest.approx({"4": 0.8, "5": 0.5, "1": 0.1})
    assert outcome.chosen.index == 0


async def test_without_a_verifier_each_revision_is_taken_and_most_answers_win():
    outcome, engine, _ = await solved(["1", "2", "2", "3"], n=4, parallel=1)
    assert revised(engine) == ["1", "2", "2"]
    assert outcome.votes == {"1": 1.0, "2": 2.0, "3": 1.0}
    assert outcome.chosen.text == "2"


async def test_a_vote_that_cannot_turn_ends_it():
    outcome, engine, _ = await solved(["1"], n=8, parallel=2)
    assert engine.calls == 6
    assert outcome.stopped == "decided"


async def test_a_tie_goes_to_the_last_word():
    outcome, *_ = await solved(["1", "2", "1", "2"], n=4, parallel=2)
    assert outcome.chosen.index == 3
    outcome, *_ = await solved(["x", "y"], n=2, parallel=1, answer={"kind": "number"})
    assert outcome.chosen.text == "y", "nothing to vote on: the last revision"


async def test_of_a_long_answer_the_end_is_shown():
    _, engine, _ = await solved(["a b c d", "1"], n=2, parallel=1, shown_tokens=2)
    assert revised(engine) == ["c d"]


async def test_a_chain_ends_where_the_model_cannot_read_on():
    class Small(FakeEngine):
        longest = 6

    engine = Small(by_place(["1", "2 " * 7, "3", "4"]))
    outcome, *_ = await solved([], engine=engine, n=4, parallel=2)
    assert [one.seed for one in engine.asked] == [0, 1, 2]
    assert outcome.stopped == "exhausted"


async def test_what_no_turn_can_follow_is_refused_before_a_token_is_spent():
    class Headed(FakeEngine):
        async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
            return (*await super().render(turns), 77)

    engine = Headed(["1"])
    with pytest.raises(InvalidRequest, match="lets it answer") as caught:
        await solved([], engine=engine)
    assert caught.value.field == "messages"
    assert engine.calls == 0
    headed = Problem(token_ids=(*QUESTION, 77), max_tokens=8)
    _, engine, _ = await solved([], engine=Headed(["1"]), problem=headed, n=2, parallel=1)
    assert engine.asked[1].token_ids == (*QUESTION, *encode(f"1\n{PROMPT}\n"), 77)

    class Short(FakeEngine):
        longest = 2

    short = Short(["1"])
    with pytest.raises(InvalidRequest, match="too long"):
        await solved([], engine=short)
    assert short.calls == 0


async def test_a_template_that_tells_earlier_turns_otherwise_is_refused():
    class Counting(FakeEngine):
        async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
            return (len(turns), *await super().render(turns))

    with pytest.raises(InvalidRequest, match="otherwise"):
        await solved([], engine=Counting(["1"]))


async def test_without_revisions_no_template_is_needed():
    class Bare(FakeEngine):
        async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
            raise InvalidRequest("there is no template")

    outcome, *_ = await solved([], engine=Bare(["1"]), n=2, parallel=2)
    assert outcome.chosen.answer == "1"
    with pytest.raises(InvalidRequest, match="no template"):
        await solved([], engine=Bare(["1"]), n=3, parallel=2)


async def test_a_budget_ends_it_with_what_there_is():
    outcome, engine, _ = await solved(["1", "2"], n=8, parallel=2, limits=Limits(samples=3))
    assert engine.calls == 3
    assert outcome.stopped == "samples"
    with pytest.raises(NoCandidate):
        await solved(["1"], limits=Limits(seconds=1e-9))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"select": "max"}, "'select' needs a 'verifier'"),
        ({"accept_at": 0.5}, "'accept_at' needs a 'verifier'"),
        ({"verifier": "x", "accept_at": 1.5}, "less than"),
        ({"n": 257}, "less than"),
        ({"parallel": 0}, "greater than"),
        ({"revise_prompt": ""}, "at least 1"),
        ({"revise_prompt": "x" * 8001}, "at most 8000"),
        ({"shown_tokens": 0}, "greater than"),
    ],
    ids=str,
)
def test_bounds(fields: dict[str, object], complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        SelfRefine.model_validate(fields)
    assert SelfRefine().revise_prompt == REVISE
