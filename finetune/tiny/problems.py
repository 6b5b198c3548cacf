"""Synthetic multi-step problems, and the line between training and test.

Two families. *Word* problems follow one quantity through 1 to 8 arithmetic steps. *Countdown*
problems reach a target from three or four numbers, each used once, and so need search. Knows no
tokenizer and no model.
"""

import ast
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import Literal

Family = Literal["word", "countdown"]
FAMILIES: tuple[Family, ...] = ("word", "countdown")

LARGEST = 499
"""No intermediate result of a word problem exceeds this."""

HELD_OUT = 10
"""One problem in this many is kept for testing, by a hash of what makes it the same problem."""

SYSTEM = (
    "You are a helpful assistant.",
    "You are a careful mathematician.",
    "Solve the problem step by step and put the final answer in \\boxed{}.",
)
INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}."

_SHE = ("Ann", "Mia", "Eva", "Zoe", "Ivy", "Kim", "Amy", "Liz")
_HE = ("Tom", "Bob", "Sam", "Leo", "Max", "Dan", "Ben", "Jon")
_NAMES = _SHE + _HE
_THINGS = ("apples", "coins", "books", "cards", "shells", "stamps", "pens", "eggs", "nuts", "stars")
_CONTAINERS = ("bags", "boxes", "packs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A problem with its worked solution.

    `identity` is equal for two items that are the same problem.
    """

    family: Family
    steps: int
    prompt: str
    solution: str
    answer: str
    identity: str
    numbers: tuple[int, ...] = ()
    target: int | None = None

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test side; training never draws such an item."""
        return zlib.crc32(self.identity.encode()) % HELD_OUT == 0


def word_problem(rng: random.Random, steps: int) -> Item:
    """One quantity followed through `steps` changes.

    The same arithmetic in other words is the same problem.
    """
    owner = rng.choice(_NAMES)
    pronoun = "She" if owner in _SHE else "He"
    thing = rng.choice(_THINGS)
    value = rng.randint(2, 99)
    story = [f"{owner} has {value} {thing}."]
    lines: list[str] = []
    while len(lines) < steps:
        if len(lines) <= steps - 2 and rng.random() < 0.25:
            count, each = rng.randint(2, 9), rng.randint(2, 9)
            if value + count * each > LARGEST:
                continue
            verb = rng.choice(("buys", "gets"))
            story.append(
                f"{pronoun} {verb} {count} {rng.choice(_CONTAINERS)} with {each} {thing} each."
            )
            lines += [
                f"{count} * {each} = {count * each}",
                f"{value} + {count * each} = {value + count * each}",
            ]
            value += count * each
            continue
        operator, operand, result = _change(rng, value)
        friend = rng.choice([name for name in _NAMES if name != owner])
        story.append(rng.choice(_sentences(operator, operand, owner, pronoun, friend, thing)))
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    if rng.random() < 0.3:  # a fact that does not matter
        friend = rng.choice([name for name in _NAMES if name != owner])
        story.insert(
            rng.randint(1, len(story)), f"{friend} has {rng.randint(2, 99)} {rng.choice(_THINGS)}."
        )
    story.append(
        f"How many {thing} does {owner} have {rng.choice(('now', 'at the end', 'in the end'))}?"
    )
    return Item(
        family="word",
        steps=steps,
        prompt=" ".join(story),
        solution=_solution(lines, str(value)),
        answer=str(value),
        identity="; ".join(lines),
    )


def countdown_problem(rng: random.Random, count: int) -> Item:
    """Reach a target from `count` numbers (3 or 4) with + - * /; always solvable."""
    while True:
        numbers = tuple(rng.randint(1, 13) for _ in range(count))
        target = 24 if count == 4 and rng.random() < 0.5 else rng.randint(10, 60)
        if solvable(tuple(sorted(numbers)), target):
            break
    state = tuple(sorted(numbers))
    expressions = [(number, str(number)) for number in state]
    lines: list[str] = []
    while len(state) > 1:
        left, operator, right, state = rng.choice(
            [m for m in moves(state) if solvable(m[3], target)]
        )
        result = apply(left, operator, right)
        written = f"{_operand(expressions, left)} {operator} {_operand(expressions, right)}"
        expressions.append((result, written))
        lines.append(f"{left} {operator} {right} = {result} (left: {', '.join(map(str, state))})")
    answer = expressions[0][1]
    listed = ", ".join(map(str, numbers))
    return Item(
        family="countdown",
        steps=count - 1,
        prompt=f"Use the numbers {listed} with + - * / to make {target}. Use each number once.",
        solution=_solution(lines, answer),
        answer=answer,
        identity=f"{sorted(numbers)} -> {target}",
        numbers=numbers,
        target=target,
    )


def draw(
    rng: random.Random,
    *,
    held_out: bool,
    family: Family | None = None,
    steps: int | None = None,
    longest: int = 8,
) -> Item:
    """Draw one item from the training or the test side.

    Countdown takes `steps` 2 or 3, word 1 to `longest`.
    """
    while True:
        chosen = family or rng.choices(FAMILIES, (3, 2))[0]
        if chosen == "word":
            item = word_problem(rng, steps or rng.randint(1, longest))
        else:
            item = countdown_problem(rng, (steps or rng.choices((2, 3), (1, 2))[0]) + 1)
        if item.held_out == held_out:
            return item


def test_set(seed: int, per_family: int) -> list[Item]:
    """Distinct held-out problems: word with 1 to 8 steps in turn.

    Of the countdown problems, one third have three numbers.
    """
    rng = random.Random(f"mull-tiny test {seed}")
    chosen: dict[str, Item] = {}
    depths_of: dict[Family, tuple[int, ...]] = {
        "word": (1, 2, 3, 4, 5, 6, 7, 8),
        "countdown": (2, 3, 3),
    }
    for family, depths in depths_of.items():
        wanted = len(chosen) + per_family
        while len(chosen) < wanted:
            steps = depths[(wanted - len(chosen)) % len(depths)]
            item = draw(rng, held_out=True, family=family, steps=steps)
            chosen.setdefault(item.identity, item)
    return list(chosen.values())


def training_items(rng: random.Random, longest: int = 8) -> Iterator[tuple[str | None, str, str]]:
    """Draw from the training side without end: `(system or None, prompt, solution)`.

    Some prompts carry the usual instructions.
    """
    while True:
        item = draw(rng, held_out=False, longest=longest)
        prompt = item.prompt + INSTRUCTION if rng.random() < 0.1 else item.prompt
        yield rng.choice(SYSTEM) if rng.random() < 0.1 else None, prompt, item.solution


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` without inner braces."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


def grade(item: Item, text: str) -> bool:
    """Whether a solution's boxed answer is right.

    A countdown answer must use each number exactly once.
    """
    answer = boxed(text)
    if answer is None:
        return False
    if item.family == "word":
        return answer == item.answer
    used = sorted(int(number) for number in re.findall(r"\d+", answer))
    return used == sorted(item.numbers) and value_of(answer) == item.target


def value_of(expression: str) -> Fraction | None:
    """The exact value of + - * / over whole numbers.

    None for anything else, or a division by zero.
    """
    if len(expression) > 100 or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
        case _:
            raise ValueError("not arithmetic")


# Countdown's arithmetic: whole numbers only, the larger operand first, nothing above 199.

Move = tuple[int, str, int, tuple[int, ...]]


def apply(left: int, operator: str, right: int) -> int:
    """The result of one move; division is exact by construction."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left // right


@lru_cache(maxsize=100_000)
def moves(state: tuple[int, ...]) -> tuple[Move, ...]:
    """Every `(left, operator, right, next sorted state)` from a sorted state."""
    found: set[Move] = set()
    for i, j in combinations(range(len(state)), 2):
        rest = state[:i] + state[i + 1 : j] + state[j + 1 :]
        right, left = state[i], state[j]
        for operator in "+-*/":
            if operator == "/" and (right == 0 or left % right):
                continue
            result = apply(left, operator, right)
            if result <= 199:
                found.add((left, operator, right, tuple(sorted((*rest, result)))))
    return tuple(sorted(found))


@lru_cache(maxsize=2_000_000)
def solvable(state: tuple[int, ...], target: int) -> bool:
    """Whether the target can still be reached from a sorted state."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(move[3], target) for move in moves(state))


def _operand(expressions: list[tuple[int, str]], value: int) -> str:
    """Take the first expression of this value, in brackets unless it is a plain number."""
    index = next(i for i, (known, _) in enumerate(expressions) if known == value)
    _, written = expressions.pop(index)
    return written if written.isdigit() else f"({written})"


def _change(rng: random.Random, value: int) -> tuple[str, int, int]:
    """Pick an operation on `value` whose result stays between 1 and `LARGEST`."""
    while True:
        operator = rng.choice("+++---**/")
        if operator == "+":
            operand = rng.randint(2, 99)
            result = value + operand
        elif operator == "-":
            if value < 4:
                continue
            operand = rng.randint(2, min(value - 1, 99))
            result = value - operand
        elif operator == "*":
            operand = rng.choice((2, 2, 3, 3, 4, 5, 6, 7))
            result = value * operand
        else:
            operand = rng.choice((2, 2, 3, 4, 5))
            if value % operand or value < operand * 2:
                continue
            result = value // operand
        if 1 <= result <= LARGEST:
            return operator, operand, result


def _sentences(
    operator: str, operand: int, owner: str, pronoun: str, friend: str, thing: str
) -> tuple[str, ...]:
    match operator:
        case "+":
            return (
                f"{pronoun} finds {operand} more.",
                f"{friend} gives {operand} {thing} to {owner}.",
                f"{pronoun} buys {operand} {thing}.",
            )
        case "-":
            return (
                f"{pronoun} loses {operand} of them.",
                f"{pronoun} gives {operand} {thing} to {friend}.",
                f"{pronoun} sells {operand} {thing}.",
            )
        case "*":
            return (
                f"Then the number of {thing} grows {operand} times.",
                f"Now {pronoun.lower()} has {operand} times as many.",
            )
        case _:
            return (
                f"{pronoun} splits them into {operand} equal parts and keeps one.",
                f"{pronoun} keeps only one of every {operand} {thing}.",
            )


def _solution(lines: list[str], answer: str) -> str:
    steps = "".join(f"Step {number}: {line}\n" for number, line in enumerate(lines, 1))
    return f"{steps}Answer: \\boxed{{{answer}}}"
