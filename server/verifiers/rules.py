"""Verifiers that are rules: exact, free of charge, and silent where they do not apply."""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from jsonschema import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from referencing import Registry

from strategies.core.answers import arithmetic, compiled, json_block, json_value
from strategies.core.errors import InvalidRequest, VerifierFailed
from strategies.core.sandbox import JSON, SandboxError, TimedOut
from strategies.core.types import Candidate, Problem, Verdict

if TYPE_CHECKING:
    from strategies.core.context import Context

LONGEST_TEXT = 1_000_000
"""No rule reads a longer text."""

LONGEST_SCHEMA = 10_000
"""Characters of a schema written as JSON; to check that many takes 0.1 s."""


class Rule(BaseModel):
    """What rules have in common: they read words, judge whole answers, and cost no token."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    logprobs: ClassVar[int | None] = None
    """What it needs of each candidate's log-probabilities."""
    stepwise: ClassVar[bool] = False
    """A step that a rule does not speak of has no score."""

    def aside(self, tokens: int) -> int:
        """Nothing: rules are free."""
        return 0


class Regex(Rule):
    """1 if a regular expression is found in the candidate's text or answer, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(max_length=1000, description="A Python regular expression.")
    on: Literal["text", "answer"] = Field(default="text", description="Where it is looked for.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        compiled(pattern)
        return pattern

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """A missing answer scores 0."""
        verdicts: list[Verdict] = []
        for candidate in candidates:
            text = candidate.text if self.on == "text" else candidate.answer
            found = text is not None and await _run(self.kind, ctx, "contains", text, self.pattern)
            verdicts.append(Verdict(score=float(found is True)))
        return verdicts


class JsonSchema(Rule):
    """1 if the candidate's text, or its last fenced JSON block, satisfies a JSON Schema, else 0."""

    kind: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, JsonValue] = Field(
        alias="schema",
        description=f"At most {LONGEST_SCHEMA} characters; references may point into itself only.",
    )

    @field_validator("json_schema")
    @classmethod
    def _usable(cls, schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            _check(schema)
        except ValueError as error:
            message = f"verifier.schema: {error}"
            raise InvalidRequest(message, field="verifier.schema") from None
        return schema

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """A text that is no JSON and has no JSON block scores 0."""
        verdicts: list[Verdict] = []
        for candidate in candidates:
            valid = await _run(self.kind, ctx, "conforms", candidate.text, self.json_schema)
            verdicts.append(Verdict(score=float(valid is True)))
        return verdicts


class Countdown(Rule):
    """1 if the answer reaches the problem's target with each of its numbers used once, else 0."""

    kind: Literal["countdown"] = "countdown"

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """The answer may go on with `= target`; a missing one scores 0."""
        tasks: list[tuple[str, str]] = _COUNTDOWN.findall(problem.text)
        if not tasks:
            raise VerifierFailed("'countdown' judges only 'Use the numbers … to make …' problems")
        listed, target = tasks[-1]
        numbers = sorted(Fraction(number) for number in re.findall("[0-9]+", listed))
        return [
            Verdict(score=float(_reaches(candidate.answer or "", numbers, Fraction(target))))
            for candidate in candidates
        ]


class Arithmetic(Rule):
    """The share of right lines among those that say `a op b = c`; its steps are these lines."""

    kind: Literal["arithmetic"] = "arithmetic"

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """Exact: `10 / 3 = 3.33` is wrong."""
        verdicts: list[Verdict] = []
        for candidate in candidates:
            lines = await _run(self.kind, ctx, "right_lines", candidate.text)
            if not isinstance(lines, list) or not lines:
                raise VerifierFailed("'arithmetic' found no 'a op b = c' in a candidate")
            steps = tuple(float(right is True) for right in lines)
            verdicts.append(Verdict(score=sum(steps) / len(steps), steps=steps))
        return verdicts


RULES: tuple[type[Rule], ...] = (Regex, JsonSchema, Countdown, Arithmetic)
"""Every rule that a request can name."""


async def _run(kind: str, ctx: "Context", function: str, text: str, *arguments: JSON) -> JSON:
    """Run one of the functions below in the sandbox."""
    if len(text) > LONGEST_TEXT:
        raise VerifierFailed(f"'{kind}' reads no text of more than {LONGEST_TEXT} characters")
    try:
        return await ctx.sandbox.call(f"server.verifiers.rules:{function}", text, *arguments)
    except TimedOut:
        raise VerifierFailed(f"'{kind}' took too long on a candidate") from None
    except SandboxError as error:
        raise VerifierFailed(f"'{kind}' failed on a candidate: {error}") from error


def contains(text: str, pattern: str) -> bool:
    """Whether the pattern is found."""
    return re.search(pattern, text) is not None


def conforms(text: str, schema: dict[str, JsonValue]) -> bool:
    """Whether the JSON in a text is valid; there may be none."""
    for part in (text, json_block(text)):
        try:
            value = json_value(part or "")
        except (ValueError, RecursionError):
            continue
        return _validator(schema)(schema, registry=Registry()).is_valid(value)
    return False


def right_lines(text: str) -> list[bool]:
    """For each line with equations `a op b = c`, whether all of them hold."""
    lines: list[bool] = []
    for line in text.splitlines():
        equations = [match.groups() for match in _EQUATION.finditer(_ORNAMENT.sub("", line))]
        if equations:
            lines.append(all(_holds(left, right) for left, right in equations))
    return lines


_COUNTDOWN = re.compile(
    r"Use the numbers ([0-9]{1,9}(?:(?:, and|,| and) [0-9]{1,9}){0,19})"
    r" with \+ - \* / to make (-?[0-9]{1,9})\. Use each number once\."
)
_ORNAMENT = re.compile(r"^\s{0,20}[-*\u2022]\s{1,9}|(?<![0-9)])(?<![0-9)]\s)\*\*")
"""A bullet or the start of bold type, not an operator."""
_A_NUMBER = r"[-\u2212]?[0-9]{1,30}(?:,[0-9]{3}){0,9}(?:\.[0-9]{1,30})?"
_OPERATOR = r"(?:[-+*/\u00d7\u00f7\u2212]|\\times|\\cdot|\\div)"
_EQUATION = re.compile(
    rf"(?<![-+*/^)}}\w.,\u00d7\u00f7\u2212])(?<![-+*/^\u00d7\u00f7\u2212]\s)"
    rf"({_A_NUMBER}\s?{_OPERATOR}\s?{_A_NUMBER})\s?=\s?({_A_NUMBER})"
    rf"(?!\w|[.,]?[0-9]|\s?{_OPERATOR}\s?[-0-9(\\]|\s?[\^%]|\()"
)
"""Not a part of a longer calculation: `1 + 2 + 3 = 6` does not say that `2 + 3 = 6`."""


_DIALECTS: tuple[type[Validator], ...] = (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)


def _holds(left: str, right: str) -> bool:
    ours, theirs = arithmetic(left), arithmetic(right)
    return ours is not None and theirs is not None and ours.value == theirs.value


def _reaches(answer: str, numbers: list[Fraction], target: Fraction) -> bool:
    expression, equals, result = answer.partition("=")
    reached = arithmetic(expression)
    if reached is None or reached.value != target or sorted(reached.numbers) != numbers:
        return False
    return not equals or _holds(result, str(target))


def _validator(schema: dict[str, JsonValue]) -> type[Validator]:
    """The dialect that the schema names.

    Raises:
        ValueError: It names one that is not known.
    """
    dialect = schema.get("$schema", _DIALECTS[-1].META_SCHEMA["$schema"])
    for known in _DIALECTS:
        if isinstance(dialect, str) and known.META_SCHEMA["$schema"].rstrip("#") == dialect.rstrip(
            "#"
        ):
            return known
    raise ValueError(f"unknown dialect {dialect!r}")


def _check(schema: dict[str, JsonValue]) -> None:
    """Refuse what is no schema, what is too large to check at once, and what is not all there.

    Raises:
        ValueError: The schema cannot be used.
    """
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise ValueError(f"longer than {LONGEST_SCHEMA} characters")
    left: list[JsonValue] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += part.values()
            for name in ("$ref", "$dynamicRef", "$recursiveRef"):
                target = part.get(name)
                if isinstance(target, str) and not target.startswith("#"):
                    raise ValueError(f"a reference to {target!r}, which lies outside")
        elif isinstance(part, list):
            left += part
    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.message[:500]}") from None
    except RecursionError:
        raise ValueError("too deeply nested") from None
