"""Rule verifiers: exact, bounded, and loud where they do not apply."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ValidationError

from server.verifiers.rules import RULES, Arithmetic, Countdown, JsonSchema, Regex
from strategies.core.errors import InvalidRequest, VerifierFailed
from strategies.core.sandbox import Sandbox
from strategies.core.types import Candidate, Problem, Verdict

PROBLEM = Problem(
    token_ids=(1,),
    text="Use the numbers 1, 2 with + - * / to make 3. Use each number once.\n"
    "Use the numbers 10, 2, 7 with + - * / to make 15. Use each number once. Think.",
)
shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ctx() -> AsyncIterator[Any]:
    sandbox = Sandbox()
    yield SimpleNamespace(sandbox=sandbox)
    await sandbox.close()


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(index=index, text=text, token_ids=(1,), finish_reason="stop")
        for index, text in enumerate(texts)
    ]


def answering(*answers: str | None) -> list[Candidate]:
    return [
        Candidate(index=index, text="", token_ids=(1,), finish_reason="stop", answer=answer)
        for index, answer in enumerate(answers)
    ]


def scores(verdicts: list[Verdict]) -> list[float]:
    return [verdict.score for verdict in verdicts]


def schema(**keywords: Any) -> JsonSchema:
    return JsonSchema.model_validate({"schema": keywords})


def test_rules_are_values_with_a_kind():
    kinds = [model.model_fields["kind"].default for model in RULES]
    assert kinds == ["regex", "json_schema", "countdown", "arithmetic"]
    for rule in (Regex(pattern="a"), schema(type="object"), Countdown(), Arithmetic()):
        assert rule.logprobs is None
        assert rule.__doc__
        assert type(rule).model_validate_json(rule.model_dump_json()) == rule
        with pytest.raises(ValidationError):
            type(rule).model_validate({"unknown": 1})


@shared
async def test_regex_on_text_or_answer(ctx: Any):
    rule = Regex(pattern=r"^\s*yes\b")
    assert scores(await rule.judge(PROBLEM, candidates(" yes!", "no", "yes"), ctx)) == [1, 0, 1]
    rule = Regex(pattern=r"^\d+$", on="answer")
    assert scores(await rule.judge(PROBLEM, answering("15", "x", None), ctx)) == [1, 0, 0]
    assert await rule.judge(PROBLEM, [], ctx) == []


@shared
async def test_backtracking_regex_has_no_opinion_and_blocks_nobody(ctx: Any):
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            since = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - since)

    ticking = asyncio.create_task(tick())
    with pytest.raises(VerifierFailed, match="'regex' took too long"):
        await Regex(pattern="(a+)+$").judge(PROBLEM, candidates("a" * 100 + "!"), ctx)
    ticking.cancel()
    assert longest < 1.5
    with pytest.raises(VerifierFailed, match="no text of more than"):
        await Regex(pattern="a").judge(PROBLEM, candidates("a" * 1_000_001), ctx)
    assert scores(
        await Regex(pattern="a").judge(PROBLEM, candidates("b" * 999_999 + "a"), ctx)
    ) == [1]


def test_regex_must_compile():
    for pattern in ("(", "a" * 1001, "(?i)" + "[\x00-\U0010ffff]" * 20):
        with pytest.raises(ValidationError):
            Regex(pattern=pattern)


@shared
async def test_json_schema(ctx: Any):
    rule = schema(
        type="object",
        properties={"x": {"$ref": "#/$defs/positive"}},
        required=["x"],
        **{"$defs": {"positive": {"type": "integer", "minimum": 1}}},
    )
    texts = (
        '{"x": 1}',
        '{"x": 0}',
        "{}",
        "no JSON",
        'so\n```json\n{"x": 0}\n```\nor\n```json\n{"x": 2}\n```',
        '{"x": NaN}',
        "[" * 100_000,
        "",
    )
    assert scores(await rule.judge(PROBLEM, candidates(*texts), ctx)) == [1, 0, 0, 0, 1, 0, 0, 0]


@shared
async def test_json_schema_speaks_its_dialect(ctx: Any):
    draft4 = schema(
        **{"$schema": "http://json-schema.org/draft-04/schema#"}, maximum=1, exclusiveMaximum=True
    )
    assert scores(await draft4.judge(PROBLEM, candidates("1", "0.5"), ctx)) == [0, 1]


@shared
async def test_json_schema_that_cannot_end_has_no_opinion(ctx: Any):
    with pytest.raises(VerifierFailed, match="'json_schema' took too long"):
        await schema(pattern="^(a+)+$").judge(PROBLEM, candidates('"' + "a" * 100 + '!"'), ctx)
    with pytest.raises(VerifierFailed, match="'json_schema' failed"):
        await schema(**{"$ref": "#"}).judge(PROBLEM, candidates("{}"), ctx)
    with pytest.raises(VerifierFailed, match="'json_schema' failed"):
        await schema(**{"$ref": "#/$defs/none"}).judge(PROBLEM, candidates("{}"), ctx)


def deep(levels: int) -> dict[str, Any]:
    return {"not": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "refused",
    [
        {"type": "nonsense"},
        {"pattern": "("},
        {"$ref": "https://example.com/schema"},
        {"properties": {"x": {"items": [{"$dynamicRef": "other.json"}]}}},
        {"$schema": "https://example.com/dialect"},
        {"$schema": 5},
        {"description": "x" * 10_000},
        deep(150),
    ],
)
def test_json_schema_is_checked_on_construction(refused: dict[str, Any]):
    with pytest.raises(InvalidRequest) as caught:
        schema(**refused)
    assert caught.value.field == "verifier.schema"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("(10 + 7) - 2", 1),
        ("10 + 7 - 2 = 15", 1),
        (r"(10 + 7) - 2 = 16", 0),
        ("7 - 2 + 10", 1),
        ("-2 + (10 + 7)", 1),
        ("15", 0),
        ("10 + 7 - 2 + 0", 0),
        ("10 + 7 - 2 * 1", 0),
        ("10 + 5", 0),
        ("10 + 7 + 2", 0),
        ("10 + 7 - 2 + 10 - 10", 0),
        ("107 - 2", 0),
        ("10 + 7 - two", 0),
        ("10 ** 7 ** 2", 0),
        ("(" * 100_000, 0),
        ("9**9**9**9", 0),
        ("10 / (7 - 7)", 0),
        (None, 0),
    ],
)
async def test_countdown(answer: str | None, score: float):
    verdicts = await Countdown().judge(PROBLEM, answering(answer), SimpleNamespace())  # type: ignore[arg-type]
    assert scores(verdicts) == [score]


async def test_countdown_reads_latex_and_fractions():
    problem = Problem(
        token_ids=(1,),
        text="Use the numbers 3, 3, 8, and 8 with + - * / to make 24. Use each number once.",
    )
    judged = await Countdown().judge(
        problem,
        answering("8 / (3 - 8 / 3)", r"8 \div \left(3 - \frac{8}{3}\right)", "8 * 3"),
        SimpleNamespace(),  # type: ignore[arg-type]
    )
    assert scores(judged) == [1, 1, 0]


async def test_countdown_judges_nothing_else():
    with pytest.raises(VerifierFailed, match="countdown"):
        await Countdown().judge(
            Problem(token_ids=(1,), text="How many apples?"),
            answering("5"),
            SimpleNamespace(),  # type: ignore[arg-type]
        )


@shared
@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: 10 - 7 = 3 (left: 2, 3)\nStep 2: 3 * 2 = 7\nAnswer: \\boxed{3 * 2}", (1, 0)),
        ("5 + 6 = 11", (1,)),
        ("1 + 1 = 2, then 2 + 2 = 5", (0,)),
        ("- 3 + 4 = 7\n* -3 + 4 = 1", (1, 1)),
        ("10 / 4 = 2.5\n10 / 3 = 3.33\n5 / 0 = 0", (1, 0, 0)),
        ("1,000 * 2 = 2,000 apples.", (1,)),
        (r"$3 \times 4 = 12$ and 6 ÷ 4 = 1.5", (1,)),
        ("1 + 2 + 3 = 6\n2 + 3 = 5", (1,)),
        ("2 * (3 + 4) = 14\n2 + 3 = 5 * 1\n(3 + 4) = 7\n2 + 3 = 5", (1,)),
        ("so x = 2 + 3 = 5", (1,)),
        ("2+3=5", (1,)),
        ("that is **2 + 3 = 6** - no, **2 + 3 = 5**!\n**Step 1**: 4 - 1 = 3", (0, 1)),
        ("2 ** 3 * 4 = 32\n2**3 * 4 = 32\n9 - 2 = 7 - now stop", (1,)),
    ],
)
async def test_arithmetic(ctx: Any, text: str, steps: tuple[float, ...]):
    [verdict] = await Arithmetic().judge(PROBLEM, candidates(text), ctx)
    assert verdict.steps == steps
    assert verdict.score == pytest.approx(sum(steps) / len(steps))


@shared
async def test_arithmetic_needs_a_line(ctx: Any):
    for text in ("", "no sums here", "1 + 2 + 3 = 6", "1" * 900_000 + " + 1 = 2", "- " * 400_000):
        with pytest.raises(VerifierFailed, match="arithmetic"):
            await Arithmetic().judge(PROBLEM, candidates(text), ctx)


@shared
async def test_verdicts_keep_the_order(ctx: Any):
    verdicts = await Arithmetic().judge(
        PROBLEM, candidates("1 + 1 = 2", "1 + 1 = 3", "2 - 1 = 1"), ctx
    )
    assert scores(verdicts) == [1, 0, 1]
