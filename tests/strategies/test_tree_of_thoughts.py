"""Tree of thoughts over a scripted model: what it is asked, and what comes of its answers."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from strategies.core.errors import InvalidRequest, VerifierFailed
from strategies.core.testing import FakeEngine, FakeVerifier, context
from strategies.core.types import Generation, Outcome, Problem
from strategies.tree_of_thoughts import TreeOfThoughts

PROBLEM = Problem(token_ids=(1, 2, 3), text="What is {steps}?", max_tokens=60, seed=0)


def proposing(text: str) -> FakeEngine:
    """A model that replies with `text`, and continues any answer with its end."""
    return FakeEngine(lambda one: text if one.apart else r"so \boxed{1}")


async def solved(engine: FakeEngine, **fields: Any) -> Outcome:
    strategy = TreeOfThoughts.model_validate(fields)
    verifier = FakeVerifier(lambda one: 0.5) if strategy.judged_by() else None
    async with context(engine, verifier=verifier) as ctx:
        return await strategy.solve(PROBLEM, ctx)


async def test_proposed_thoughts_are_lines_without_their_marks():
    engine = proposing("1. add them\n- take one away\n\n(2) add them\n* halve it")
    outcome = await solved(
        engine, thoughts="propose", verifier="fake", width=5, branch=3, max_depth=1
    )
    begun = {one.text.split("\n")[0] for one in outcome.candidates}
    assert begun == {"add them", "take one away", "halve it"}
    assert outcome.chosen.text.endswith(r"so \boxed{1}"), "and the model goes on from there"
    assert "What is {steps}?" in engine.rendered[0][0].content, "nothing in it is filled in"
    assert "(none yet)" in engine.rendered[0][0].content


async def test_values_are_the_mean_of_what_the_model_says():
    engine = FakeEngine(lambda one: "step\n" if len(one.token_ids) < 5 else r"\boxed{1}")
    outcome = await solved(
        engine, evaluate="value", width=1, branch=1, evaluations=4, max_nodes=3, solutions=1
    )
    asked = [one for one in engine.asked if one.apart]
    assert asked
    assert all(one.choices == ("sure", "likely", "impossible") for one in asked)
    # The fake engine takes turns by seed: sure, likely, impossible, sure.
    assert list(outcome.scores.values()) == [pytest.approx((1 + 0.5 + 0 + 1) / 4)]


async def test_votes_are_shares_among_all_that_were_drawn():
    engine = FakeEngine(lambda one: f"step {one.seed}\n")
    outcome = await solved(
        engine, evaluate="vote", width=1, branch=2, evaluations=3, max_nodes=2, solutions=1
    )
    asked = [one for one in engine.asked if one.apart]
    assert [one.choices for one in asked] == [("1", "2")] * 3
    assert outcome.chosen.text.startswith("step 0"), "seeds 0, 1 and 2 vote for 1, 2 and 1"


async def test_a_reply_that_is_none_of_the_words_is_no_opinion():
    class Rambling(FakeEngine):
        def _script(self, generation: Generation) -> Any:
            return super()._script(replace(generation, choices=()))

    for evaluate in ("value", "vote"):
        with pytest.raises(VerifierFailed, match="the model said"):
            await solved(Rambling(["it depends\n"]), evaluate=evaluate, width=1, branch=2)


async def test_without_a_thought_there_is_a_plain_sample():
    outcome = await solved(proposing("\n\n"), thoughts="propose", verifier="fake")
    assert outcome.chosen.answer == "1"
    assert outcome.chosen.parent is None


async def test_the_best_unfinished_thoughts_are_completed():
    engine = FakeEngine(lambda one: "step\n" if one.until else r"done \boxed{2}")
    outcome = await solved(engine, max_depth=2, width=2, branch=1)
    assert outcome.chosen.text == "step\nstep\ndone \\boxed{2}"
    assert outcome.chosen.complete


async def test_a_question_without_words_cannot_be_asked_about():
    strategy = TreeOfThoughts(evaluate="value")
    async with context(FakeEngine(["x"])) as ctx:
        with pytest.raises(InvalidRequest):
            await strategy.solve(Problem(token_ids=(1,), text=""), ctx)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"threshold": 0.5}, "'threshold' needs search 'dfs'"),
        ({"exploration": 0.5}, "'exploration' needs search 'mcts'"),
        ({"evaluate": "vote", "verifier": "x"}, "'verifier' needs evaluate"),
        ({"evaluations": 2}, "'evaluations' needs evaluate"),
        ({"vote_prompt": "{question} {candidates}"}, "'vote_prompt' needs evaluate"),
        ({"evaluate": "value", "value_prompt": "{question}"}, "no '{steps}'"),
        ({"width": 64, "branch": 64}, "256 at most"),
        ({"max_nodes": 0}, "greater than or equal"),
    ],
)
def test_bounds(fields: dict[str, Any], complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        TreeOfThoughts.model_validate(fields)
