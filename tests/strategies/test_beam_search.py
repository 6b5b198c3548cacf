"""Beam search over scripted steps: who is gone on with, what it costs, and who wins."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from strategies.beam_search import BeamSearch
from strategies.core.budget import Limits
from strategies.core.events import Sampled, Scored
from strategies.core.testing import FakeEngine, FakeVerifier, context, encode, pieces
from strategies.core.types import Candidate, Chunk, Generation, Outcome, Problem

PROBLEM = Problem(token_ids=(1, 2, 3), max_tokens=40, seed=0)
WORDS = {encode(word)[0]: word for word in ("a\n", "b\n", "c\n", "d\n", "long ", "step ")}


class Tree:
    """An engine that writes step `rule(path, place)`; the path is the steps so far."""

    def __init__(self, rule: Any, **options: Any) -> None:
        self.rule = rule
        self.engine = FakeEngine(self.text, **options)

    def text(self, generation: Generation) -> str:
        path = "".join(WORDS.get(token, "?") for token in generation.token_ids[3:])
        assert generation.seed is not None
        return self.rule(path, generation.seed)


async def solved(
    tree: Tree, likes: Any, limits: Limits | None = None, **fields: Any
) -> tuple[Outcome, list[Any], FakeVerifier]:
    strategy = BeamSearch.model_validate({"verifier": "fake", **fields})
    verifier = FakeVerifier(likes)
    async with context(tree.engine, verifier=verifier, limits=limits) as ctx:
        outcome = await strategy.solve(PROBLEM, ctx)
        return outcome, ctx.events, verifier


def spelled(path: str, place: int) -> str:
    """Every step is a letter; three of them, and then the answer."""
    if path.count("\n") == 3:
        return rf"\boxed{{{path.replace(chr(10), '')}}}"
    return "abcd"[place % 4] + "\n"


def likes(letters: str) -> Any:
    """The share of steps that are one of these letters."""

    def score(candidate: Candidate) -> float:
        steps = candidate.text.split("\n")
        return sum(step in letters for step in steps if step) / max(1, len(steps))

    return score


async def test_it_goes_on_with_what_the_verifier_likes():
    outcome, events, _ = await solved(Tree(spelled), likes("d"), width=1, branch=4, score="last")
    assert outcome.chosen.answer == "ddd"
    assert outcome.chosen.text == "d\nd\nd\n\\boxed{ddd}"
    path = {
        event.candidate.index: event.candidate for event in events if isinstance(event, Sampled)
    }
    at, drawn = outcome.chosen, 0
    while at.parent is not None:
        drawn += at.drawn
        at = path[at.parent]
    assert drawn + at.drawn == len(outcome.chosen.token_ids) == 4


async def test_identical_siblings_are_judged_once_and_count_once():
    tree = Tree(lambda path, place: "a\n" if path.count("\n") < 2 else r"\boxed{1}")
    outcome, events, verifier = await solved(tree, likes("a"), width=2, branch=3)
    judged = Counter(event.index for event in events if isinstance(event, Scored))
    assert len(judged) == len(verifier.judged) == 3  # one of each round
    assert tree.engine.calls == 6 + 3 + 3
    assert len(outcome.candidates) == 1


async def test_each_step_ends_at_its_delimiter_or_at_its_length():
    tree = Tree(lambda path, place: "long step " * 3 + r"\boxed{1}")
    outcome, _, _ = await solved(tree, likes("a"), width=1, branch=1, max_step_tokens=2)
    lengths = [generation.max_tokens for generation in tree.engine.asked]
    assert set(lengths) == {2}
    assert outcome.chosen.finish_reason == "length"
    assert len(outcome.chosen.token_ids) == PROBLEM.max_tokens
    assert all(generation.until == "\n" for generation in tree.engine.asked)


async def test_a_step_goes_on_with_the_token_ids_of_the_steps_before():
    tree = Tree(spelled)
    await solved(tree, likes("d"), width=1, branch=4, score="last")
    last = tree.engine.asked[-1]
    assert last.token_ids == (*PROBLEM.token_ids, *encode("d\nd\nd\n"))
    assert last.continues is not None
    assert last.priority <= 1, "before any new sample"


async def test_subtrees_do_not_wait_for_each_other():
    tree = Tree(spelled, delay=lambda index: 0.05 if index == 0 else 0.0)
    await solved(tree, likes("abcd"), width=2, branch=1, allocate="diverse")
    order = [generation.seed for generation in tree.engine.asked]
    slow, fast = (
        [at for at, place in enumerate(order) if place is not None and place % 2 == parity]
        for parity in (0, 1)
    )
    assert max(fast) < slow[1], "the other subtree was done before the slow one's second step"


async def test_diverse_keeps_the_best_of_each_subtree():
    outcome, _, _ = await solved(
        Tree(spelled), likes("bd"), width=2, branch=2, allocate="diverse", score="last"
    )
    assert sorted(one.answer or "" for one in outcome.candidates) == ["bbb", "ddd"]


async def test_a_step_is_judged_by_where_it_leads():
    def trap(path: str, place: int) -> str:
        if not path:
            return "ab"[place % 2] + "\n"
        return {"a\n": "c\n", "b\n": "d\n"}.get(path, rf"\boxed{{{path[0]}}}")

    def score(candidate: Candidate) -> float:  # `a` looks better, `d` comes after `b`
        return {"a\n": 0.6, "b\n": 0.5, "a\nc\n": 0.1, "b\nd\n": 0.9}.get(candidate.text, 0.5)

    plain, _, _ = await solved(Tree(trap), score, width=1, branch=2, score="last")
    ahead, _, _ = await solved(Tree(trap), score, width=1, branch=2, score="last", lookahead=1)
    assert (plain.chosen.answer, ahead.chosen.answer) == ("a", "b")
    assert ahead.chosen.text == "b\nd\n\\boxed{b}"


async def test_looking_ahead_is_greedy():
    tree = Tree(spelled)
    await solved(tree, likes("d"), width=1, branch=2, lookahead=2)
    assert {generation.greedy for generation in tree.engine.asked} == {True, False}


@pytest.mark.parametrize("score", ["last", "min", "mean", "product"])
async def test_scores_of_steps_make_the_score_of_a_solution(score: str):
    from strategies.core.types import Verdict

    class Steps(FakeVerifier):
        async def judge(self, problem: Any, candidates: Any, ctx: Any) -> list[Verdict]:
            return [Verdict(score=0.0, steps=(0.5, 0.8, 0.25)) for _ in candidates]

    strategy = BeamSearch.model_validate({"width": 1, "branch": 1, "score": score})
    engine = FakeEngine([r"\boxed{1}"])
    async with context(engine, verifier=Steps(lambda one: 0.0)) as ctx:
        outcome = await strategy.solve(PROBLEM, ctx)
    expected = {"last": 0.25, "min": 0.25, "mean": 1.55 / 3, "product": 0.1}
    assert outcome.scores[outcome.chosen.index] == pytest.approx(expected[score])


async def test_a_weighted_vote_over_what_has_ended():
    tree = Tree(lambda path, place: rf"\boxed{{{place % 2}}}" + " so" * place)
    scores = {0: 0.4, 1: 0.5, 2: 0.3, 3: 0.1}
    outcome, _, _ = await solved(
        tree, lambda one: scores[len(pieces(one.text)) - 1], width=2, branch=2, select="weighted"
    )
    assert outcome.votes == {"0": pytest.approx(0.7), "1": pytest.approx(0.6)}
    assert outcome.chosen.answer == "0"


async def test_steps_end_at_max_steps_and_what_is_there_is_the_answer():
    tree = Tree(lambda path, place: "abcd"[place % 4] + "\n")
    outcome, _, _ = await solved(tree, likes("c"), width=1, branch=4, max_steps=3, score="last")
    assert outcome.chosen.text == "c\nc\nc\n"
    assert not outcome.chosen.complete
    assert tree.engine.calls == 12


async def test_a_budget_that_runs_out_gives_what_there_is():
    outcome, _, _ = await solved(
        Tree(spelled), likes("d"), limits=Limits(tokens=9), width=2, branch=2
    )
    assert outcome.stopped == "exhausted"
    assert outcome.chosen.token_ids


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"width": 64, "branch": 64}, "256 at most"),
        ({"spread": 1.0}, "'spread' needs"),
        ({"width": 0}, "greater than or equal"),
        ({"delimiter": ""}, "at least 1 character"),
        ({"lookahead": 17}, "less than or equal"),
    ],
)
def test_bounds(fields: dict[str, Any], complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        BeamSearch.model_validate(fields)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("allocate", ["top_k", "diverse"])
async def test_a_sequence_that_the_engine_lost_holds_nothing_up(allocate: str, lookahead: int):
    class Losing(FakeEngine):
        async def generate(self, generation: Generation):
            if generation.index == 1:
                yield Chunk(finish_reason="abort")
                return
            async for chunk in super().generate(generation):
                yield chunk

    tree = Tree(spelled)
    tree.engine = Losing(tree.text)
    fields = {"allocate": allocate, "lookahead": lookahead, "score": "last"}
    outcome, *_ = await solved(tree, likes("abcd"), width=2, branch=2, **fields)
    assert outcome.stopped == "samples"
    assert len(outcome.candidates) > 1
    assert all(one.complete and len(one.text) > 6 for one in outcome.candidates)
