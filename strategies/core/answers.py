"""Answers: how they are read from a text, and when two of them are the same.

An answer keeps the words of the model, tidied: `(10 + 7) - 2` stays an expression. That it equals
`15` is for `same` to say. Ordinary answers are handled here, at once; what needs computer algebra
or a client's pattern goes to the sandbox.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from strategies.core.sandbox import Crashed, Sandbox, TimedOut

SEARCHED = 20_000
"""Only this many characters at the end of a text are searched for an answer."""

COMPARED = 1_000
"""Longer answers are compared as text only."""

SECONDS = 3.0
"""For one comparison in the sandbox, or one search for a pattern."""

SHORT = 200
"""A text without any sign of an answer is its own answer if it is no longer than this."""

STRIKES = 2
"""Comparisons without an end after which a search among known answers asks the sandbox no more."""


class AnswerFormat(BaseModel):
    r"""How answers are read and compared.

    - `math`: the last `\boxed{…}`, else what is stated ("The answer is …", "Answer: …", "#### …"),
      else the last number; compared as mathematics.
    - `number`: a number, looked for in the same places; compared exactly.
    - `choice`: a letter, looked for in the same places, else the last "(B)", else a text that is
      one letter.
    - `json`: the whole text, else its last fenced block; compared by structure.
    - `regex`: the last match of `pattern`, or of its group if it has one; compared as text.
    - `exact`: box, statement, or the whole of a short text; compared as text.
    - `auto`: the first that there is of JSON as the whole text, box, statement, fenced JSON, "(B)",
      last number, short text; compared as mathematics.

    Text is compared without regard to case, white space and closing punctuation. A box that is
    never closed is no answer. Only the last 20,000 characters of a text are searched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["auto", "math", "choice", "json", "regex", "number", "exact"] = "auto"
    pattern: str | None = Field(
        default=None,
        max_length=1000,
        description="A Python regular expression, for `regex`; one group at most.",
    )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if (self.kind == "regex") != (self.pattern is not None):
            raise ValueError("'pattern' and kind 'regex' go together")
        if self.pattern is not None and compiled(self.pattern).groups > 1:
            raise ValueError("'pattern' may have one group at most, which is the answer")
        return self


class Answers:
    """Reads and compares answers. Knows no model and no vote."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def extract(
        self, text: str, form: AnswerFormat, *, seconds: float | None = None
    ) -> str | None:
        """The answer in canonical form; None if there is none, or none was found in time.

        What stands between reasoning tags is no answer, nor is reasoning that never ended. A
        client's pattern may take `seconds` at most.
        """
        text = _concluded(text)[-SEARCHED:]
        if form.kind != "regex":
            return _read(text, form.kind)
        found = await self._apart(seconds, "strategies.core.answers:find", form.pattern, text)
        return (found.strip() or None) if isinstance(found, str) else None

    async def same(self, left: str, right: str, form: AnswerFormat) -> bool:
        """Whether two canonical answers are equivalent; those too hard to compare are not."""
        return bool(await self._compare(left, right, form, None))

    async def place(
        self,
        answer: str,
        known: Sequence[str],
        form: AnswerFormat,
        *,
        seconds: float | None = None,
    ) -> int | None:
        """The index of the first known answer that is equivalent; equal strings come first.

        After `seconds`, what only algebra could tell counts as different.
        """
        if answer in known:
            return known.index(answer)
        strikes = 0
        end = None if seconds is None else time.monotonic() + seconds
        for index, other in enumerate(known):
            if strikes < STRIKES:
                left = None if end is None else end - time.monotonic()
                same = await self._compare(answer, other, form, left)
            else:
                same = _quick(answer, other, form)
            if same:
                return index
            strikes += same is None
        return None

    async def _compare(
        self, left: str, right: str, form: AnswerFormat, seconds: float | None
    ) -> bool | None:
        """As `same`, but None if the sandbox came to no end."""
        same = _quick(left, right, form)
        if same is not None:
            return same
        equal = await self._apart(seconds, "strategies.core.mathematics:equivalent", left, right)
        return None if equal is None else equal is True

    async def _apart(self, seconds: float | None, function: str, *arguments: str | None) -> object:
        """A call in the sandbox; None if it came to no end, there or in `seconds`."""
        call = self._sandbox.call(function, *arguments, seconds=SECONDS)
        try:
            return await (call if seconds is None else asyncio.wait_for(call, seconds))
        except (TimeoutError, TimedOut, Crashed):
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """An expression's exact value and the numbers written in it, from left to right."""

    value: Fraction
    numbers: tuple[Fraction, ...]


@lru_cache(maxsize=4096)
def arithmetic(text: str) -> Arithmetic | None:
    """Read numbers, `+ - * /` and brackets, also in LaTeX; None for all else, and for `1 / 0`."""
    if len(text) > _LONGEST_EXPRESSION:
        return None
    try:
        return _Reader(text).read()
    except (ValueError, ZeroDivisionError):
        return None


def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled pattern.

    Raises:
        ValueError: It does not compile, or would take long to.
    """
    if len(_WIDE_RANGE.findall(pattern)) > 8:
        raise ValueError("the pattern has too many wide character ranges")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern does not compile: {error}") from None


def find(pattern: str, text: str) -> str | None:
    """The last match of a client's pattern, or of its group. For the sandbox: it may never end."""
    found = [match[match.re.groups] for match in re.finditer(pattern, text)]
    return next((one for one in reversed(found) if one is not None), None)


def json_block(text: str, fence: str = "(?:json)?") -> str | None:
    """What the last fenced block holds; `fence` is a pattern for its language."""
    blocks = re.findall(rf"```{fence}[ \t]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return blocks[-1] if blocks else None


def json_value(text: str) -> JsonValue:
    """Parse JSON as the standard has it.

    Raises:
        ValueError: It is none; `NaN` and the infinities are none.
        RecursionError: It is too deeply nested.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


_LONGEST_EXPRESSION = 300
_DEEPEST = 50
_WIDE_RANGE = re.compile(r"-(?:\\[uUN]|[^\x00-\x7f])")  # each takes up to 10 ms to compile
_TOKEN = re.compile(
    r"\s*(?:((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)|([-+*/()]))"
)
_DIGITS = r"(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))"
_FRACTION = re.compile(rf"\\[dt]?frac\s*{_DIGITS}\s*{_DIGITS}")
_SPELLINGS = {
    r"\times": "*",
    r"\cdot": "*",
    "\u00d7": "*",
    "\u00b7": "*",
    r"\div": "/",
    "\u00f7": "/",
    "\u2212": "-",
    r"\left(": "(",
    r"\right)": ")",
    "{,}": ",",
    r",\!": ",",
}
_SPELLING = re.compile(
    "|".join(re.escape(spelling) + r"(?![a-z])" * spelling[-1].isalpha() for spelling in _SPELLINGS)
)
_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>")
_BOX = re.compile(r"\\boxed\s{0,9}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STATED = re.compile(r"\banswer\*{0,2}\s{0,3}(?:is\b|[:=])\*{0,2}\s?:?|####", re.IGNORECASE)
_END = re.compile(r"[.;!?](?=\**(?:\s|$))|,?\s(?:because|since|which|so)\b")
_WRAPPED = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]|\*\*([^*]+)\*\*",
    re.DOTALL,
)
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
_OPTION = re.compile(r"[(\[]([A-Za-z])[)\]]|([A-Za-z])[).:](?=\s)")
_BRACKETED = re.compile(r"(?<![\w\\])\(([A-J])\)")
_NUMBER = re.compile(
    r"(?:(?<![\w.)}])-)?(?<![\w.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))(?:/[0-9]+)?"
)
_UPRIGHT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s?\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019,.&-]+[^\W\d_]+)*")
_LONG_WORD = re.compile(r"[^\W\d_]{3}")


class _Reader:
    """A recursive descent over one expression. The text is short, so its numbers stay small."""

    def __init__(self, text: str) -> None:
        text = _FRACTION.sub(lambda match: "({}/{})".format(*filter(None, match.groups())), text)
        self._text = _SPELLING.sub(lambda match: _SPELLINGS[match[0]], text).strip()
        self._tokens = self._split()
        self._next = next(self._tokens, "")
        self._depth = 0
        self._numbers: list[Fraction] = []

    def read(self) -> Arithmetic:
        value = self._sum()
        if self._next:
            raise ValueError("something follows the expression")
        return Arithmetic(value=value, numbers=tuple(self._numbers))

    def _split(self) -> Iterator[str]:
        position = 0
        while position < len(self._text):
            match = _TOKEN.match(self._text, position)
            if match is None:
                raise ValueError("neither a number nor an operator")
            yield match[1] or match[2]
            position = match.end()

    def _take(self) -> str:
        token, self._next = self._next, next(self._tokens, "")
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._next in ("*", "/"):
            value = value * self._factor() if self._take() == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        token = self._take()
        if token not in ("+", "-", "("):
            number = Fraction(token.replace(",", ""))
            self._numbers.append(number)
            return number
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        if token == "(":
            value = self._sum()
            if self._take() != ")":
                raise ValueError("a bracket stays open")
        else:
            value = self._factor() if token == "+" else -self._factor()
        self._depth -= 1
        return value


def _concluded(text: str) -> str:
    """What follows the reasoning; nothing if that is still open."""
    tags = list(_REASONING.finditer(text))
    if not tags:
        return text
    return text[tags[-1].end() :] if tags[-1][1] else text[: tags[-1].start()]


def _read(text: str, kind: str) -> str | None:
    """The answer of any kind but `regex`."""
    if kind == "json":
        return _canonical_json(text) or _canonical_json(json_block(text))
    if kind == "auto" and (whole := _canonical_json(text, scalars=False)):
        return whole
    marked = _boxed(text)
    boxed = marked is not None
    if marked is None:
        marked = _stated(text)
    match kind:
        case "math":
            found = _last_number(text) if marked is None else marked
        case "number":
            found = _last_number(text) if marked is None else _numeric(marked)
        case "choice":
            found = _letter(_last_option(text) or _bare(text) if marked is None else marked)
        case "exact":
            found = _short(text) if marked is None else marked
        case _ if marked is not None:
            letter = None if boxed else _letter(marked)
            found = letter if letter and letter in marked else marked
        case _:
            found = _canonical_json(json_block(text, "json"), scalars=False) or _last_option(text)
            found = found or _last_number(text) or _short(text)
    return found or None


def _boxed(text: str) -> str | None:
    """What the last box holds: nothing (`""`) if it is never closed, None if there is no box."""
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return _bare(text[start : match.start()])
    return ""


def _stated(text: str) -> str | None:
    """What the text last says the answer is: the rest of that sentence."""
    end = None
    for match in _STATED.finditer(text):
        end = match.end()
    if end is None:
        return None
    line, _, _ = text[end:].lstrip()[: SHORT + 1].partition("\n")
    sentence = _bare(_END.split(line, maxsplit=1)[0].strip("* "))
    return sentence if 0 < len(sentence) <= SHORT else None


def _letter(answer: str) -> str | None:
    """The letter of "B", "(B)", "B) Paris" or "(B) Paris", as a capital."""
    answer = _UPRIGHT.sub(r"\1", answer).strip()
    match = _LETTER.fullmatch(answer) or _OPTION.match(answer)
    return next(filter(None, match.groups())).upper() if match else None


def _last_option(text: str) -> str | None:
    letters = _BRACKETED.findall(text)
    return letters[-1] if letters else None


def _numeric(answer: str) -> str | None:
    return answer if arithmetic(answer) else _last_number(answer)


def _last_number(text: str) -> str | None:
    text = _FRACTION.sub(lambda match: "{}/{}".format(*filter(None, match.groups())), text)
    found = None
    for match in _NUMBER.finditer(text):
        found = match[0]
    return found if found is not None and len(found) <= SHORT else None


def _short(text: str) -> str | None:
    text = _bare(text)
    return text if 0 < len(text) <= SHORT else None


def _canonical_json(text: str | None, *, scalars: bool = True) -> str | None:
    """JSON in one spelling, None if it is none; without `scalars` only objects and arrays count."""
    text = (text or "").strip()
    if not scalars and text[:1] + text[-1:] not in ("{}", "[]"):
        return None
    try:
        return json.dumps(json_value(text), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None


def _alike(left: JsonValue, right: JsonValue) -> bool:
    """Equality of JSON values: `1` is `1.0` but not `true`."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_alike, left, right))
    return left == right


def _quick(left: str, right: str, form: AnswerFormat) -> bool | None:
    """Whether two answers are the same, None where only mathematics can tell."""
    if left == right:
        return True
    if form.kind in ("choice", "regex", "exact"):
        return _plain(left) == _plain(right)
    if form.kind == "json" or (left.startswith(("{", "[")) and right.startswith(("{", "["))):
        try:
            return _alike(json_value(left), json_value(right))
        except (ValueError, RecursionError):
            if form.kind == "json":
                return False
    ours, theirs = arithmetic(left), arithmetic(right)
    if ours is not None and theirs is not None:
        return ours.value == theirs.value
    if form.kind == "number" or len(left) > COMPARED or len(right) > COMPARED:
        return False
    first, second = _plain(left), _plain(right)
    if first == second:
        return True
    return False if (ours or _is_words(first)) and (theirs or _is_words(second)) else None


def _is_words(answer: str) -> bool:
    """Whether it is language or one letter. To algebra, "listen" and "silent" are one product."""
    return _LETTER.fullmatch(answer) is not None or (
        _WORDS.fullmatch(answer) is not None and _LONG_WORD.search(answer) is not None
    )


def _plain(answer: str) -> str:
    """Text as it is compared: no typesetting, no case, no closing punctuation."""
    answer = _bare(_UPRIGHT.sub(r"\1", answer)).casefold()
    calm = answer.rstrip("!? ")  # of words only: `6!` is a number
    letter = _LETTER.fullmatch(answer)
    return letter[1] if letter else calm if _is_words(calm) else answer


def _bare(text: str) -> str:
    """The text without spare white space, closing punctuation, and signs around it, as `$…$`."""
    while True:
        tidy = " ".join(text.split()).rstrip(" \\.,;:")
        wrapped = _WRAPPED.fullmatch(tidy)
        tidy = next(filter(None, wrapped.groups())) if wrapped else tidy
        if tidy == text:
            return text
        text = tidy
