"""A verifier adapter over a scripted engine, and what an adapter's folder says of it."""

import asyncio
import json
from collections.abc import AsyncGenerator
from math import log, nan
from pathlib import Path

import pytest

from server.adapters.manifest import MANIFEST, read_manifest
from server.verifiers.adapter_verifier import AdapterVerifier
from strategies.core.budget import Limits
from strategies.core.errors import BudgetSpent, InvalidRequest, VerifierFailed
from strategies.core.events import Read
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Candidate, Chunk, Generation, Labels, Problem

PROBLEM = Problem(token_ids=(100, 101))
STEP = 7
"""The token that ends a step."""


class Judging(FakeEngine):
    """Says that a prefix is good with the probability of its last token over ten."""

    def __init__(self, longest: int = 1000, broken: bool = False) -> None:
        super().__init__([""])
        self.longest = longest
        self.broken = broken

    async def tokens_with(self, text: str) -> set[int]:
        assert text == "\n"
        return {STEP}

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        self.asked.append(generation)
        good = generation.token_ids[-1] / 10
        likely = (nan, nan) if self.broken else (log(good), log(1 - good))
        yield Chunk(token_ids=(1,), label_logprobs=likely, finish_reason="length", prompt_tokens=3)


def candidate(*tokens: int) -> Candidate:
    return Candidate(index=0, text="", token_ids=tokens, finish_reason="stop")


async def test_each_step_and_the_end_are_read_once():
    engine = Judging()
    async with context(engine) as ctx:
        verifier = AdapterVerifier(adapter="judge")
        [verdict] = await verifier.judge(PROBLEM, [candidate(3, STEP, 4, STEP, 9)], ctx)
        assert verdict.steps == pytest.approx((0.7, 0.7, 0.9))
        assert verdict.score == pytest.approx(0.7)
        assert [one.token_ids for one in engine.asked] == [
            (100, 101, 3, STEP),
            (100, 101, 3, STEP, 4, STEP),
            (100, 101, 3, STEP, 4, STEP, 9),
        ]
        assert all(one.adapter == "judge" and one.max_tokens == 1 for one in engine.asked)
        assert ctx.budget.spent == 3
        [longer] = await verifier.judge(PROBLEM, [candidate(3, STEP, 4, STEP, 9, STEP)], ctx)
        assert len(engine.asked) == 4, "only the new step costs anything"
        assert len(longer.steps) == 3
        assert sum(event.tokens for event in ctx.events if isinstance(event, Read)) == 4


@pytest.mark.parametrize(
    ("over", "score"), [("last", 0.9), ("min", 0.7), ("mean", 0.8), ("product", 0.63)]
)
async def test_how_steps_make_a_score(over: str, score: float):
    async with context(Judging()) as ctx:
        verifier = AdapterVerifier.model_validate({"adapter": "judge", "over": over})
        [verdict] = await verifier.judge(PROBLEM, [candidate(STEP, 9)], ctx)
    assert verdict.score == pytest.approx(score)


async def test_what_leaves_the_model_no_room_is_not_asked():
    engine = Judging(longest=4)
    async with context(engine) as ctx:
        verifier = AdapterVerifier(adapter="judge")
        [verdict] = await verifier.judge(PROBLEM, [candidate(1, STEP, 2, STEP)], ctx)
        assert len(verdict.steps) == 1
        with pytest.raises(VerifierFailed, match="no step that could be judged"):
            await verifier.judge(PROBLEM, [candidate(1, 2, 3, STEP)], ctx)


async def test_more_steps_than_it_judges_and_no_tokens_are_no_opinion():
    async with context(Judging()) as ctx:
        verifier = AdapterVerifier(adapter="judge")
        for tokens in ((STEP,) * 600, ()):
            with pytest.raises(VerifierFailed):
                await verifier.judge(PROBLEM, [candidate(*tokens)], ctx)


async def test_weights_that_are_no_numbers_have_no_opinion():
    async with context(Judging(broken=True)) as ctx:
        with pytest.raises(VerifierFailed, match="no opinion"):
            await AdapterVerifier(adapter="judge").judge(PROBLEM, [candidate(STEP)], ctx)


async def test_it_keeps_to_the_budget():
    engine = Judging()
    async with context(engine, limits=Limits(tokens=2)) as ctx:
        with pytest.raises(BudgetSpent):
            await AdapterVerifier(adapter="judge").judge(PROBLEM, [candidate(*[STEP] * 3)], ctx)
        assert ctx.budget.spent <= 2
        assert ctx.budget.reserved == 0


async def test_no_more_than_so_many_questions_at_once():
    running = most = 0

    class Counting(Judging):
        async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            async for chunk in super().generate(generation):
                yield chunk
            running -= 1

    async with context(Counting()) as ctx:
        await AdapterVerifier(adapter="judge").judge(PROBLEM, [candidate(*[STEP] * 300)], ctx)
    assert 1 < most <= 64


class Turning(Judging):
    """Its adapter reads answers in a turn of its own."""

    def labels(self, adapter: str) -> Labels:
        return Labels(good=1, bad=2, opening=((101,), (103, 104)))


async def test_an_adapter_may_read_answers_in_a_turn_of_its_own():
    engine = Turning()
    async with context(engine) as ctx:
        verifier = AdapterVerifier(adapter="judge")
        [verdict] = await verifier.judge(PROBLEM, [candidate(3, STEP, 9)], ctx)
        assert verdict.steps == pytest.approx((0.7, 0.9))
        assert [one.token_ids for one in engine.asked] == [
            (100, 103, 104, 3, STEP),
            (100, 103, 104, 3, STEP, 9),
        ]
        with pytest.raises(VerifierFailed, match="does not end with the opening"):
            await verifier.judge(Problem(token_ids=(100,)), [candidate(3, STEP)], ctx)


def test_a_folder_says_what_its_adapter_is_for(tmp_path: Path):
    assert read_manifest(tmp_path) is None
    labels = {"good": "<|good|>", "bad": "<|bad|>"}
    said = {"schema_version": 1, "kind": "verifier", "judging": {"labels": labels}, "later": 1}
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.judging is not None
    assert (manifest.judging.labels.good, manifest.judging.delimiter) == ("<|good|>", "\n")
    assert manifest.judging.opening is None
    opening = {"answers": "<|im_start|>assistant\n", "verdicts": "<|im_start|>verifier\n"}
    said["judging"] = {"labels": labels, "opening": opening}
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    turned = read_manifest(tmp_path)
    assert turned is not None
    assert turned.judging is not None
    assert turned.judging.opening is not None
    assert turned.judging.opening.model_dump() == opening
    policy = {"schema_version": 1, "kind": "policy"}
    wrong = [
        said | {"kind": "policy"},
        policy | {"kind": "verifier"},
        policy | {"schema_version": 2},
    ]
    for broken in ("{", *map(json.dumps, wrong), " " * 2_000_000):
        (tmp_path / MANIFEST).write_text(broken)
        with pytest.raises(InvalidRequest, match=MANIFEST):
            read_manifest(tmp_path)
