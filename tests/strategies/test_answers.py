"""Answers: what is read from a text, and what counts as the same."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.core.answers import SEARCHED, AnswerFormat, Answers, arithmetic
from strategies.core.sandbox import JSON, Crashed, Sandbox, TimedOut

T = TypeVar("T")

AUTO = AnswerFormat()
MATH = AnswerFormat(kind="math")
QUICKLY = settings(max_examples=60, deadline=None)
shared = pytest.mark.asyncio(loop_scope="module")


class NoSandbox(Sandbox):
    """Whoever calls it fails: ordinary answers need no worker."""

    async def call(self, function: str, *arguments: JSON, seconds: float = 2.0) -> JSON:
        raise AssertionError(f"{function} was called with {arguments}")


class FailingSandbox(Sandbox):
    calls = 0

    async def call(self, function: str, *arguments: JSON, seconds: float = 2.0) -> JSON:
        self.calls += 1
        raise TimedOut("too long") if self.calls % 2 else Crashed("died")


LOCAL = Answers(NoSandbox())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers() -> AsyncIterator[Answers]:
    sandbox = Sandbox()
    yield Answers(sandbox)
    await sandbox.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.core.answers.SECONDS", 1.0)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited")


def form_of(kind: Any) -> AnswerFormat:
    return AnswerFormat(kind=kind, pattern="." if kind == "regex" else None)


def extract(text: str, kind: str = "auto") -> str | None:
    return at_once(LOCAL.extract(text, form_of(kind)))


def same(left: str, right: str, kind: str = "auto") -> bool:
    forth = at_once(LOCAL.same(left, right, form_of(kind)))
    assert forth is at_once(LOCAL.same(right, left, form_of(kind)))
    return forth


@contextmanager
def responsive() -> Iterator[None]:
    """The event loop does other work meanwhile.

    Between two ticks it computes for less than 0.1 s; the bound on waiting is far wider, because a
    busy machine may leave this process alone for long.
    """
    computed: list[float] = []
    waited: list[float] = []

    async def tick() -> None:
        while True:
            then, since = time.thread_time(), time.monotonic()
            await asyncio.sleep(0.005)
            computed.append(time.thread_time() - then)
            waited.append(time.monotonic() - since)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
    assert max(computed, default=0.0) < 0.1
    assert max(waited, default=0.0) < 1.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{ (10 + 7) - 2 }", "(10 + 7) - 2"),
        (r"\boxed{\text{Paris}}", r"\text{Paris}"),
        (r"\boxed{$15$.}", "15"),
        (r"\boxed{\{1, 2\}} is a set }", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{5} but \boxed{6", None),
        (r"\boxed{}", None),
        (r"\boxed{", None),
        ("The answer is 15.", "15"),
        ("The answer is not 4. The answer is: **12**.", "12"),
        ("The answer is 3.5 because it must be.", "3.5"),
        ("**Answer:** 15 apples", "15 apples"),
        ("Final answer: $\\frac{3}{4}$.\nGoodbye 7", r"\frac{3}{4}"),
        ("Answer:\n\n 7\nbye", "7"),
        ("3 * 5\n#### 1,234", "1,234"),
        ("The answer is (B) Paris", "B"),
        ("Answer: C) Rome", "C"),
        ("The answer is x", "x"),
        ("It is surely (C), not (B) or rather (D)!", "D"),
        ('{"b": 1, "a": [1,2]}', '{"a": [1, 2], "b": 1}'),
        ('First 5:\n```json\n{"x": 1}\n```\nthen\n```json\n{"x": 2}\n```', '{"x": 2}'),
        ("Tom has 12 apples, of which 7.50 are left", "7.50"),
        ("from 10-3 = 7 to -4", "-4"),
        ("about 1,234,567.5 people", "1,234,567.5"),
        ("roughly 1/2", "1/2"),
        (r"hence x = -\frac{1}{2}", "-1/2"),
        ("Paris.", "Paris"),
        ("  Yes,  indeed!  ", "Yes, indeed!"),
        ("long prose " * 30, None),
        ("", None),
        (" \n ", None),
    ],
)
def test_auto_reads(text: str, answer: str | None):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("math", "so it is 17, then 18 apples", "18"),
        ("math", "no idea", None),
        ("math", r"18, \boxed{17", None),
        ("number", r"\boxed{x = 5}", "5"),
        ("number", r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        ("number", "The answer is $ 1,200.50 dollars", "1,200.50"),
        ("number", r"\boxed{\text{none}} 5", None),
        ("choice", r"\boxed{b}", "B"),
        ("choice", r"\boxed{\text{(C)}}", "C"),
        ("choice", "**B**", "B"),
        ("choice", "A", "A"),
        ("choice", "(a) is wrong; choose (E).", "E"),
        ("choice", "A train leaves at 5", None),
        ("choice", "The answer is D. Rome", "D"),
        ("json", " 5 ", "5"),
        ("json", 'x ```\n{"b": [true, null], "a": "ä"}\n``` y', '{"a": "ä", "b": [true, null]}'),
        ("json", "NaN", None),
        ("json", "1e999", None),
        ("json", "[" * 9_000 + "]" * 9_000, None),
        ("json", "{", None),
        ("exact", "  Hello,   World. ", "Hello, World"),
        ("exact", r"long \boxed{positive}", "positive"),
        ("exact", "x" * 201, None),
    ],
)
def test_kinds_read(kind: str, text: str, answer: str | None):
    assert extract(text, kind) == answer


def test_only_the_end_of_a_text_is_searched():
    assert extract(r"\boxed{5}" + " " * SEARCHED) is None
    assert extract(r"\boxed{5}" + "." * (SEARCHED - 9)) == "5"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\frac12", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac{-1}{2}", "-.50"),
        ("1,000", "1000.0"),
        ("1{,}000", "1000"),
        ("(10 + 7) - 2", "15"),
        (r"\left(10+7\right) \times 2", "34"),
        ("3 \u00d7 4", "2 * 6"),
        ("--5", "5"),
        ("007", "7"),
        ("(B)", "b"),
        (r"\text{Paris}", "paris."),
        ("  new   york", "New York"),
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}'),
        ("9" * 400, "9" * 400),
    ],
)
def test_same_without_a_worker(left: str, right: str):
    assert same(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1/3", "0.333333"),
        ("15", "16"),
        ("A", "B"),
        ("listen", "silent"),
        ("15", "fifteen"),
        ("Paris", "Rome"),
        ("[1, 2]", "[2, 1]"),
        ('{"a": true}', '{"a": 1}'),
        ("x" * 2_000, "y"),
        ("1" * 90, "1" * 91),
    ],
)
def test_different_without_a_worker(left: str, right: str):
    assert not same(left, right)


@pytest.mark.parametrize(
    ("kind", "left", "right", "equal"),
    [
        ("exact", "1.0", "1", False),
        ("exact", "Yes!", "yes", True),
        ("regex", "007", "7", False),
        ("choice", "B", "B", True),
        ("choice", "B", "C", False),
        ("number", "1/2", "0.5", True),
        ("number", r"\pi", "3.14", False),
        ("json", "1", "1.0", True),
        ("json", "{", "[", False),
        ("math", "6!", "6", None),
    ],
)
def test_kinds_compare(kind: str, left: str, right: str, equal: bool | None):
    if equal is None:
        with pytest.raises(AssertionError, match="equivalent"):
            same(left, right, kind)
    else:
        assert same(left, right, kind) is equal


@shared
@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("2^{10}", "1024", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("[0, 1)", "[0,1)", True),
        ("(0, 1)", "(0, 1]", False),
        ("x = 5", "5", True),
        (r"5\text{ cm}", "5", True),
        (r"50\%", "0.5", True),
        ("6!", "720", True),
        ("6!", "6", False),
        (r"\pi", "3", False),
        ("}", r"\frac{", False),
    ],
)
async def test_mathematics(answers: Answers, left: str, right: str, equal: bool):
    assert await answers.same(left, right, AUTO) is equal
    assert await answers.same(right, left, MATH) is equal


@shared
async def test_place_is_the_first_equivalent(answers: Answers):
    known = ["3", "(10 + 7) - 2", r"\frac{\sqrt{2}}{2}", "Paris"]
    assert await answers.place("Paris", known, AUTO) == 3
    assert await answers.place("15", known, AUTO) == 1
    assert await answers.place("5 * 3", known, AUTO) == 1
    assert await answers.place(r"1/\sqrt2", known, AUTO) == 2
    assert await answers.place("16", known, AUTO) is None
    assert await answers.place("16", [], AUTO) is None


async def test_hard_comparisons_are_given_up():
    sandbox = FailingSandbox()
    assert not await Answers(sandbox).same(r"\alpha", r"\beta", AUTO)
    sandbox.calls = 0
    known = [rf"\alpha_{index}" for index in range(50)] + ["1.0"]
    assert await Answers(sandbox).place(r"\omega", known, AUTO) is None
    assert sandbox.calls == 2
    assert await Answers(sandbox).extract("5", AnswerFormat(kind="regex", pattern="5")) is None


@shared
@pytest.mark.parametrize(
    "hard", ["9**9**9**9", "9^{9^{9^{9}}}", "10^{10^{10}}!", "{" * 400 + "}" * 400, r"\sqrt{" * 150]
)
async def test_hostile_mathematics_is_bounded(answers: Answers, hard: str, impatient: None):
    with responsive():
        assert not await answers.same(hard, r"\sqrt{7}", AUTO)
    assert await answers.place("x", ["x", hard], AUTO) == 0


@shared
async def test_a_timed_out_comparison_costs_only_itself(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("strategies.core.answers.SECONDS", 0.2)
        assert not await answers.same("9^{9^{9^{9}}}", r"\sqrt{7}", AUTO)
    assert await answers.same(r"\sqrt{4}", "2", AUTO)


@shared
async def test_patterns_search_in_the_sandbox(answers: Answers):
    form = AnswerFormat(kind="regex", pattern=r"result=(\w+)")
    assert await answers.extract("result=a result=b!", form) == "b"
    assert await answers.extract("nothing", form) is None
    whole = AnswerFormat(kind="regex", pattern=r"(?i)yes|no")
    assert await answers.extract("No, YES", whole) == "YES"


@shared
async def test_backtracking_pattern_is_no_answer(answers: Answers, impatient: None):
    form = AnswerFormat(kind="regex", pattern=r"(a+)+$")
    with responsive():
        assert await answers.extract("a" * 5_000 + "!", form) is None
    assert await answers.extract("aaa", form) == "aaa"


@pytest.mark.parametrize(
    "format_",
    [
        {"kind": "regex"},
        {"kind": "math", "pattern": "a"},
        {"kind": "regex", "pattern": "("},
        {"kind": "regex", "pattern": "(a)(b)"},
        {"kind": "regex", "pattern": "a" * 1001},
        {"kind": "regex", "pattern": "(?i)" + "[\x00-\U0010ffff]" * 200},
        {"kind": "other"},
        {"kind": "math", "unknown": 1},
    ],
)
def test_formats_refused(format_: dict[str, Any]):
    with pytest.raises(ValidationError):
        AnswerFormat.model_validate(format_)


def test_format_round_trips():
    form = AnswerFormat(kind="regex", pattern="(?:a)(b)")
    assert AnswerFormat.model_validate_json(form.model_dump_json()) == form


HOSTILE = [
    "x" * 1_000_000,
    "9" * 1_000_000,
    "\\boxed{" * 100_000,
    "\\boxed{" + "{" * 100_000 + "}" * 100_000,
    "The answer is " * 70_000,
    "answer" + " " * 1_000_000,
    "answer is" + " " * 19_000,
    "```json\n" * 100_000,
    "```" + " " * 19_000,
    "[" * 500_000 + "]" * 500_000,
    '{"a":' * 200_000,
    "(" * 1_000_000,
    "1,111" * 200_000,
    "\\frac" * 200_000,
    "$" * 1_000_000,
    "\\(" * 9_000 + "\\)" * 9_000,
    "\\text{" * 3_000,
    "-" * 1_000_000,
    "\ud800" * 1_000_000,
]


@pytest.mark.parametrize("kind", ["auto", "math", "choice", "json", "number", "exact"])
def test_hostile_texts_are_read_at_once(kind: str):
    for text in HOSTILE:
        started = time.thread_time()
        answer = extract(text, kind)
        if answer:
            same(answer, "5", "exact")
        assert time.thread_time() - started < 0.05, text[:40]


# Properties.

NUMBERS = st.integers(-(10**12), 10**12)
SIZES = st.integers(1, 10**9)


def spellings(value: Fraction) -> list[str]:
    """Several ways to write a fraction."""
    above, below = value.numerator, value.denominator
    written = [
        f"{above}/{below}",
        f"{3 * above} / {3 * below}",
        rf"\frac{{{above}}}{{{below}}}",
        rf"\dfrac{{{-above}}}{{{-below}}}",
        f"({above:,}) / {below:,}",
        f"{above + below}/{below} - 1",
    ]
    if 10**6 % below == 0:
        written.append(
            f"{above * 10**6 // below / 10**6:.6f}" if abs(above) < 10**6 else written[0]
        )
    return written


@QUICKLY
@given(NUMBERS, SIZES)
def test_every_spelling_of_a_fraction_is_the_same(above: int, below: int):
    written = spellings(Fraction(above, below))
    for other in written:
        assert same(written[0], other), other
        assert extract(rf"hence \boxed{{{other}}}.") == other


@QUICKLY
@given(NUMBERS, SIZES, NUMBERS, SIZES)
def test_different_values_are_different(above: int, below: int, other: int, under: int):
    left, right = Fraction(above, below), Fraction(other, under)
    for one in spellings(left)[:4]:
        for two in spellings(right)[:4]:
            assert same(one, two) is (left == right)


@QUICKLY
@given(st.integers(-(10**7), 10**7), st.integers(0, 6))
def test_decimals_are_exact(digits: int, places: int):
    text = f"{'-' * (digits < 0)}{abs(digits) // 10**places}.{abs(digits) % 10**places:0{places}d}"
    text = text.rstrip(".") if places == 0 else text
    text = text.removesuffix(".0") if places == 0 else text
    read = arithmetic(text)
    assert read is not None
    assert read.value == Fraction(digits, 10**places)


Expression = tuple[str, Fraction | None]
"""As written, with its value; None if something is divided by zero."""


def combined(left: Expression, operator: str, right: Expression) -> Expression:
    text = f"({left[0]} {operator} {right[0]})"
    if left[1] is None or right[1] is None or (operator == "/" and right[1] == 0):
        return text, None
    operate = {
        "+": Fraction.__add__,
        "-": Fraction.__sub__,
        "*": Fraction.__mul__,
        "/": Fraction.__truediv__,
    }
    return text, operate[operator](left[1], right[1])


def larger(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.builds(combined, inner, st.sampled_from("+-*/"), inner)


expressions = st.recursive(
    st.integers(0, 999).map(lambda number: (str(number), Fraction(number))), larger, max_leaves=20
)


@QUICKLY
@given(expressions)
def test_arithmetic_agrees_with_fractions(expression: tuple[str, Fraction | None]):
    text, value = expression
    read = arithmetic(text)
    assert (read.value if read else None) == value
    if read:
        assert len(read.numbers) == sum(
            part.isdigit() for part in text.replace("(", " ").replace(")", " ").split()
        )
        assert same(text, f"{value}")


@QUICKLY
@given(st.lists(st.sampled_from(["1", "23", "+", "-", "*", "/", "4.5"]), min_size=1, max_size=9))
def test_precedence_agrees_with_python(tokens: list[str]):
    text = " ".join(tokens)
    if "* *" in text or "/ /" in text:
        return
    exact = " ".join(f"Fraction('{token}')" if token[0].isdigit() else token for token in tokens)
    try:
        value = eval(exact, {"Fraction": Fraction})  # the tokens are ours
    except SyntaxError:
        value = None
    except ZeroDivisionError:
        value = None
    read = arithmetic(text)
    assert (read.value if read else None) == value


@QUICKLY
@given(st.text(alphabet="ab1 .,;:\\{}$()[]*!=+\n\u00e4", max_size=40))
def test_reading_is_idempotent(text: str):
    for kind in ("math", "exact"):
        answer = extract(rf"so \boxed{{{text}}}", kind)
        if answer is not None:
            assert extract(rf"so \boxed{{{answer}}}", kind) == answer


@QUICKLY
@given(st.text(max_size=60))
def test_whatever_the_text_it_can_be_read_and_compared(text: str):
    for kind in ("auto", "math", "choice", "json", "number", "exact"):
        answer = extract(text, kind)
        assert answer is None or answer.strip() == answer != ""
        if answer is not None:
            assert same(answer, answer, kind)
        same(text, "x1", "exact")


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4), containers, max_leaves=8
)


@QUICKLY
@given(json_values)
def test_json_is_canonical(value: Any):
    answer = extract(json.dumps(value, indent=2), "json")
    assert answer is not None
    assert json.loads(answer) == value
    assert extract(answer, "json") == answer
    assert same(answer, json.dumps(value), "json")
