"""A chat model as a judge: it grades answers, or compares them two by two."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.wire import as_list, as_object
from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Problem, Turn, Verdict, filled

if TYPE_CHECKING:
    from strategies.core.context import Context

GRADE = """Here is a problem:

{question}

Here is an answer to it:

{answer}

How good is the answer? Reply with a grade from 0 (wrong) to 10 (right and complete)."""

COMPARE = """Here is a problem:

{question}

Answer A:

{a}

Answer B:

{b}

Which answer is better? Reply with A, B, or tie."""

GRADES = tuple(str(grade) for grade in range(11))
SIDES = ("A", "B", "tie")

MOST_QUESTIONS = 1024
"""Of one judgement of all candidates."""

LONGEST_REPLY = 32
"""Tokens of a verdict: a word, or a small JSON object around it."""


class Judge(BaseModel):
    """A chat model that grades each answer from 0 to 10, or compares answers two by two.

    Its reply is held to one of the verdicts by structured output. A comparison is asked twice with
    the answers in turned order, as judges favour a place (Zheng et al. 2023, arXiv:2306.05685): two
    verdicts that contradict each other are a tie. Each answer meets `rivals` others, and its score
    is the share of meetings that it wins, a tie counting half. Where the judge says something
    else, as in a refusal, that verdict does not count; an answer without any fails the request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["judge"] = "judge"
    mode: Literal["grade", "compare"] = Field(default="grade", description="How it judges.")
    endpoint: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="One of the operator's `chat` endpoints; unset: the model that answers.",
    )
    adapter: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="A served adapter that judges in place of the bare model.",
    )
    times: int = Field(default=1, ge=1, le=16, description="Verdicts on each answer, or pair.")
    rivals: int | None = Field(
        default=None, ge=1, le=16, description="For mode `compare`, where it is 2."
    )
    prompt: str | None = Field(
        default=None,
        max_length=8000,
        description="Asks for the verdict, with {question} and {answer}, or {question}, {a}, {b}.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.endpoint is not None and self.adapter is not None:
            raise ValueError("name an 'endpoint' or an 'adapter', not both")
        if self.rivals is not None and self.mode != "compare":
            raise ValueError("'rivals' needs mode 'compare'")
        places = ("question", "answer") if self.mode == "grade" else ("question", "a", "b")
        for place in places if self.prompt is not None else ():
            if f"{{{place}}}" not in (self.prompt or ""):
                raise ValueError(f"the prompt has no '{{{place}}}'")
        return self

    @property
    def logprobs(self) -> None:
        """None: it reads words."""
        return None

    @property
    def stepwise(self) -> bool:
        """It judges whole answers."""
        return False

    @property
    def relative(self) -> bool:
        """Whether its scores mean something only beside those of other candidates."""
        return self.mode == "compare"

    def aside(self, tokens: int) -> int:
        """The tokens of its verdicts on one answer."""
        asked = self.times * (1 if self.mode == "grade" else 2 * (self.rivals or 2))
        return min(max(0, tokens - 1), asked * LONGEST_REPLY)

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """One verdict per candidate, from one grade or two comparisons and more."""
        if self.mode == "compare":
            return await self._compared(problem, candidates, ctx)
        self._bound(len(candidates) * self.times)
        asked = [
            turns
            for one in candidates
            for turns in [_filled(self.prompt or GRADE, question=problem.text, answer=one.text)]
            for _ in range(self.times)
        ]
        words = await self._said(asked, GRADES, problem.seed, ctx)
        verdicts: list[Verdict] = []
        for at, candidate in enumerate(candidates):
            said = words[at * self.times : (at + 1) * self.times]
            grades = [int(word) / 10 for word in said if word in GRADES]
            verdicts.append(Verdict(score=_mean(grades, candidate, said)))
        return verdicts

    async def _compared(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """Everybody meets the next `rivals` in a ring; whoever is alone has won."""
        count = len(candidates)
        ahead = range(1, (self.rivals or 2) + 1)
        pairs = {tuple(sorted((at, (at + far) % count))) for at in range(count) for far in ahead}
        met = [(a, b) for a, b in sorted(pairs) if a != b]
        self._bound(2 * len(met) * self.times)
        meetings = [pair for pair in met for _ in range(self.times)]
        asked = [
            turns
            for a, b in met
            for both in [[self._compare(problem, candidates, *pair) for pair in ((a, b), (b, a))]]
            for turns in both * self.times
        ]
        words = await self._said(asked, SIDES, problem.seed, ctx)
        points: list[list[float]] = [[] for _ in candidates]
        for (a, b), straight, turned in zip(meetings, words[::2], words[1::2], strict=True):
            if straight in SIDES and turned in SIDES:
                agreed = straight == {"A": "B", "B": "A", "tie": "tie"}[turned]
                won = {"A": 1.0, "B": 0.0, "tie": 0.5}[straight] if agreed else 0.5
                points[a].append(won)
                points[b].append(1 - won)
        if count == 1:
            return [Verdict(score=1.0)]
        return [
            Verdict(score=_mean(of_one, candidate, words))
            for of_one, candidate in zip(points, candidates, strict=True)
        ]

    def _compare(
        self, problem: Problem, candidates: Sequence[Candidate], first: int, second: int
    ) -> tuple[Turn, ...]:
        return _filled(
            self.prompt or COMPARE,
            question=problem.text,
            a=candidates[first].text,
            b=candidates[second].text,
        )

    def _bound(self, questions: int) -> None:
        if questions > MOST_QUESTIONS:
            raise VerifierFailed(
                f"the judge would be asked {questions} times, {MOST_QUESTIONS} at most: lower "
                "'times', 'rivals' or the number of candidates"
            )

    async def _said(
        self,
        asked: Sequence[tuple[Turn, ...]],
        choices: tuple[str, ...],
        seed: int | None,
        ctx: "Context",
    ) -> list[str]:
        """One word for each question; one of the choices, or whatever else was said."""
        if self.endpoint is None:
            words = await ctx.ask(
                asked,
                choices=choices,
                max_tokens=LONGEST_REPLY,
                adapter=self.adapter,
                seed=seed,
            )
            return [word.strip() for word in words]
        bodies: list[dict[str, Any]] = [
            {
                "messages": [asdict(turn) for turn in turns],
                "max_tokens": LONGEST_REPLY,
                "temperature": 0.0 if self.times == 1 else 1.0,
                "response_format": _one_of(choices),
            }
            for turns in asked
        ]
        if seed is not None:
            bodies = [body | {"seed": seed + at} for at, body in enumerate(bodies)]
        replies = await ctx.consult(self.endpoint, bodies, max_tokens=LONGEST_REPLY)
        return [_word(reply) for reply in replies]


def _mean(values: Sequence[float], candidate: Candidate, said: Sequence[str]) -> float:
    if not values:
        raise VerifierFailed(
            f"the judge gave no verdict on candidate {candidate.index}; it said {said[0][:100]!r}"
        )
    return sum(values) / len(values)


def _filled(prompt: str, **places: str) -> tuple[Turn, ...]:
    return (Turn(role="user", content=filled(prompt, **places)),)


def _one_of(choices: tuple[str, ...]) -> dict[str, Any]:
    """The structured output that is held to one verdict, in OpenAI's form."""
    schema = {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": list(choices)}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": schema, "strict": True},
    }


def _word(reply: Mapping[str, Any]) -> str:
    """The verdict in a chat completion; a refusal as it is."""
    choice = as_object((as_list(reply.get("choices")) or [None])[0]) or {}
    message = as_object(choice.get("message")) or {}
    content = str(message.get("content") or message.get("refusal") or "")
    try:
        said = as_object(json.loads(content)) or {}
    except (ValueError, RecursionError):
        return content.strip()
    return str(said.get("verdict", content)).strip()
