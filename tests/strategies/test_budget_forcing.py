"""Budget forcing: an end that comes too early is taken back, one that is late is put in."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.budget_forcing import BudgetForcing
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest, NoCandidate
from strategies.core.events import Proposed, Sampled
from strategies.core.testing import END, FakeEngine, RecordingContext, context, encode, pieces
from strategies.core.types import Generation, Outcome, Problem

PROBLEM = Problem(token_ids=(1, 2), max_tokens=40)
TAG = "</t> "


class Told(FakeEngine):
    """Writes one text a call; vLLM would end it by tokens, which may be pieces of words."""

    def __init__(self, *texts: str) -> None:
        super().__init__(list(texts))
        self._left = list(texts)
        self._said: dict[int, str] = {}

    def _text(self, generation: Generation) -> str:
        if generation.index not in self._said:
            self._said[generation.index] = self._left.pop(0)
        return self._said[generation.index]


async def solved(
    engine: FakeEngine,
    limits: Limits | None = None,
    problem: Problem = PROBLEM,
    **fields: object,
) -> tuple[Outcome, RecordingContext]:
    strategy = BudgetForcing.model_validate({"end": "</t>", "wait": "Wait ", **fields})
    async with context(engine, limits=limits) as ctx:
        return await strategy.solve(problem, ctx), ctx


async def test_an_early_end_is_taken_back_and_the_model_thinks_again():
    engine = Told("a b </t> ", "c </t> ", r"\boxed{1}")
    outcome, ctx = await solved(engine)
    assert outcome.chosen.text == r"a b Wait c </t> \boxed{1}"
    assert outcome.chosen.token_ids == encode(outcome.chosen.text)
    assert outcome.chosen.answer == "1"
    assert outcome.chosen.complete
    first, again, answer = engine.asked
    assert (first.until, again.until, answer.until) == ("</t>", "</t>", None)
    assert again.token_ids == PROBLEM.token_ids + encode("a b Wait ")
    assert answer.token_ids == PROBLEM.token_ids + encode("a b Wait c </t> ")
    assert ctx.budget.spent == len(encode("a b </t> c </t> x")), "what is put in costs nothing"
    assert outcome.stopped == "samples"


@pytest.mark.parametrize("extend", [0, 1, 2, 3])
async def test_it_is_taken_back_as_often_as_was_asked(extend: int):
    engine = Told(*["so </t> "] * (extend + 1), "1")
    outcome, _ = await solved(engine, extend=extend)
    assert outcome.chosen.text == "so Wait " * extend + "so </t> 1"


async def test_only_what_is_shorter_than_the_least_is_taken_back():
    outcome, _ = await solved(Told("a b c </t> ", "1"), min_thinking_tokens=3)
    assert outcome.chosen.text == "a b c </t> 1"
    engine = Told("a b c </t> ", "d </t> ", "1")
    outcome, _ = await solved(engine, min_thinking_tokens=4, extend=9)
    assert outcome.chosen.text == "a b c Wait d </t> 1"


async def test_an_end_without_the_tag_is_taken_back_too_and_the_last_one_stands():
    engine = Told(f"a 1 {END}", f"b 2 {END}")
    outcome, _ = await solved(engine)
    assert outcome.chosen.text == "a 1 Wait b 2 "
    assert engine.asked[1].token_ids == PROBLEM.token_ids + encode("a 1 Wait ")
    assert outcome.chosen.complete


async def test_an_end_that_the_client_asked_for_is_not_taken_back():
    outcome, _ = await solved(Told("a stop", "never"))
    assert outcome.chosen.text == "a stop"


async def test_at_the_most_an_end_is_put_in_and_the_answer_follows():
    engine = Told("a b c d e f", r"\boxed{2}")
    outcome, _ = await solved(engine, max_thinking_tokens=3, end=TAG, cue="Final: ")
    assert outcome.chosen.text == r"a b c </t> Final: \boxed{2}"
    assert engine.asked[0].max_tokens == 3
    assert engine.asked[1].max_tokens == PROBLEM.max_tokens - 5
    assert outcome.chosen.answer == "2"


async def test_it_is_not_extended_beyond_the_most():
    engine = Told("a b </t> ", "1")
    outcome, _ = await solved(engine, max_thinking_tokens=3)
    assert outcome.chosen.text == "a b </t> 1", "with `wait`, there would be no token left"
    engine = Told("a </t> ", "b c d e", "1")
    outcome, _ = await solved(engine, max_thinking_tokens=4, extend=5)
    assert outcome.chosen.text == "a Wait b c </t>1"


async def test_thinking_may_be_opened():
    engine = Told("a </t> ", "1")
    outcome, _ = await solved(engine, start="<t> ", extend=0)
    assert engine.asked[0].token_ids == PROBLEM.token_ids + encode("<t> ")
    assert outcome.chosen.text == "<t> a </t> 1"


async def test_of_a_token_that_the_end_begins_within_the_words_before_it_stay():
    outcome, _ = await solved(Told("a b.</t>x ", "c </t> ", "1"))
    assert outcome.chosen.text == "a b.Wait c </t> 1"
    assert outcome.chosen.token_ids == encode("a ") + encode("b.") + encode("Wait c </t> 1")


async def test_a_tag_that_is_not_spelled_is_one_token():
    class Special(Told):
        async def decode(self, token_ids: Sequence[int]) -> str:
            return (await super().decode(token_ids)).replace(TAG, "")

    engine = Special("a </t> ", "b </t> ", "1")
    outcome, _ = await solved(engine)
    assert outcome.chosen.token_ids == encode("a Wait b </t> 1")


async def test_what_is_put_in_is_on_the_way_to_the_answer():
    outcome, ctx = await solved(Told("a b </t> ", "c </t> ", "1"))
    drawn = [event.candidate for event in ctx.events if isinstance(event, Sampled)]
    [put] = [event.candidate for event in ctx.events if isinstance(event, Proposed)]
    assert [one.parent for one in drawn] == [None, put.index, drawn[1].index]
    assert put.parent == drawn[0].index
    assert [one.drawn for one in (drawn[0], put, *drawn[1:])] == [3, 0, 2, 1]
    assert outcome.candidates == (outcome.chosen,)


@pytest.mark.parametrize(("tokens", "text"), [(2, "a b "), (3, "a b </t> "), (4, "a b Wait c ")])
async def test_when_the_budget_ends_it_what_was_written_is_the_answer(tokens: int, text: str):
    outcome, _ = await solved(Told("a b </t> ", "c </t> ", "1"), Limits(tokens=tokens))
    assert outcome.chosen.text == text
    assert outcome.chosen.finish_reason == "length"
    assert outcome.stopped == "exhausted"
    with pytest.raises(NoCandidate):
        await solved(Told("a"), Limits(seconds=1e-9))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    extend=st.integers(0, 4),
    least=st.none() | st.integers(1, 12),
    most=st.none() | st.integers(1, 12),
    room=st.integers(1, 30),
)
async def test_thinking_keeps_to_its_bounds_and_the_answer_to_max_tokens(
    lengths: list[int], extend: int, least: int | None, most: int | None, room: int
):
    if least is not None and (extend == 0 or (most is not None and least > most)):
        return
    texts = ["so " * length + "</t> " for length in lengths] * 6
    outcome, _ = await solved(
        Told(*texts),
        end=TAG,
        problem=Problem(token_ids=(1, 2), max_tokens=room),
        extend=extend,
        min_thinking_tokens=least,
        max_thinking_tokens=most,
    )
    written = pieces(outcome.chosen.text)
    assert len(outcome.chosen.token_ids) == len(written) <= room
    thinking = next((at for at, one in enumerate(written) if "</t>" in one), len(written))
    waits = written[:thinking].count("Wait ")
    assert waits <= extend
    assert most is None or thinking <= most
    if least is not None and waits < extend and thinking < least and thinking < len(written):
        assert thinking + 1 >= min(room, most or room), "`wait` would have left no room"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"min_thinking_tokens": 5, "extend": 0}, "needs 'extend'"),
        ({"min_thinking_tokens": 5, "max_thinking_tokens": 4}, "is more than"),
        ({"cue": "So:"}, "'cue' needs"),
        ({"end": ""}, "at least 1"),
        ({"wait": "x" * 201}, "at most 200"),
        ({"extend": 33}, "less than"),
        ({"max_thinking_tokens": 0}, "greater than"),
    ],
    ids=str,
)
def test_bounds(fields: dict[str, object], complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        BudgetForcing.model_validate(fields)


async def test_a_tag_that_too_many_tokens_hold_is_refused_by_name():
    class Wide(FakeEngine):
        async def tokens_with(self, text: str) -> tuple[int, ...]:
            raise InvalidRequest("too many", field="strategy.delimiter")

    cases: list[tuple[FakeEngine, dict[str, Any], str]] = [
        (Wide(["x"]), {}, "strategy.end"),
        (FakeEngine(["x"]), {"start": "so " * 40}, "strategy.start"),
    ]
    for engine, fields, field in cases:
        with pytest.raises(InvalidRequest) as caught:
            await solved(engine, **fields)
        assert caught.value.field == field
        assert engine.calls == 0
