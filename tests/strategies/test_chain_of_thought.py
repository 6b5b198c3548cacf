"""Chain of thought: one sample, let through as it is written."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from pydantic import ValidationError

from strategies.chain_of_thought import ChainOfThought
from strategies.core.budget import Limits
from strategies.core.events import Chosen, Committed, Grown, Sampled, Started
from strategies.core.strategy import Example
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Chunk, Generation, Problem

PROBLEM = Problem(token_ids=(1, 2), max_tokens=8, seed=40)


async def test_one_sample_is_the_answer():
    engine = FakeEngine(["two and two is 4"])
    async with context(engine) as ctx:
        outcome = await ChainOfThought().solve(PROBLEM, ctx)
    assert outcome.chosen.text == "two and two is 4"
    assert outcome.chosen.answer == "4"
    assert outcome.candidates == (outcome.chosen,)
    assert outcome.stopped == "samples"
    assert engine.calls == 1
    [generation] = engine.asked
    assert (generation.token_ids, generation.seed, generation.logprobs) == ((1, 2), 40, None)


async def test_it_commits_before_the_first_token_so_that_every_token_streams():
    async with context(FakeEngine(["1 2 3"])) as ctx:
        await ChainOfThought().solve(PROBLEM, ctx)
    kinds = [type(event) for event in ctx.events]
    assert kinds == [Started, Committed, Grown, Grown, Grown, Sampled, Chosen]
    assert Committed(index=0) in ctx.events


async def test_what_the_budget_cuts_is_still_the_answer():
    async with context(FakeEngine(["1 2 3"]), limits=Limits(tokens=2)) as ctx:
        outcome = await ChainOfThought().solve(PROBLEM, ctx)
    assert outcome.chosen.text == "1 2 "
    assert outcome.stopped == "exhausted"
    assert ctx.budget.spent == 2


async def test_what_the_sample_s_own_limit_cuts_is_not_the_budget_s_doing():
    async with context(FakeEngine(["so " * 20])) as ctx:
        outcome = await ChainOfThought().solve(PROBLEM, ctx)
    assert outcome.chosen.finish_reason == "length"
    assert len(outcome.chosen.token_ids) == PROBLEM.max_tokens
    assert outcome.stopped == "samples"


async def test_a_sample_that_ended_just_before_the_deadline_stays_complete():
    class Lingering(FakeEngine):
        """An engine that is slow to say that there is no more."""

        async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().generate(generation):
                yield chunk
            await asyncio.sleep(5)

    async with context(Lingering(["4"]), limits=Limits(seconds=0.5)) as ctx:
        outcome = await ChainOfThought().solve(PROBLEM, ctx)
    assert outcome.chosen.complete


def test_examples_and_trigger_are_for_whoever_writes_the_prompt():
    strategy = ChainOfThought(
        trigger="Think!", examples=(Example(question="1+1?", answer="One and one is 2."),)
    )
    assert strategy.trigger_shown() == "Think!"
    assert [example.question for example in strategy.examples_shown()] == ["1+1?"]
    assert strategy.judged_by() is None


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"trigger": ""}, ("trigger",)),
        ({"n": 2}, ("n",)),
        ({"examples": [{"question": "?"}]}, ("examples", 0, "answer")),
        ({"examples": [{"question": "?", "answer": "!"}] * 33}, ("examples",)),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(value: dict[str, object], place: tuple[object]):
    with pytest.raises(ValidationError) as caught:
        ChainOfThought.model_validate(value)
    assert [error["loc"] for error in caught.value.errors()] == [place]
