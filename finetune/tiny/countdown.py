"""Countdown: reach a target from three or four numbers, each used once, with + - * /.

It needs search: most lines with right arithmetic lead nowhere. Whole numbers only, the larger
operand first, nothing above `LARGEST`.
"""

import ast
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

from finetune.tiny.solution import Item, Move, Walk, answered, boxed

LARGEST = 199

STEPS = (2, 3)
"""With three numbers, and with four."""

_Operation = tuple[int, str, int, int, tuple[int, ...]]
"""Left, operator, right, result, and the sorted numbers that are left afterwards."""


@dataclass(frozen=True, slots=True)
class Numbers(Walk):
    """The numbers at hand, ascending, each with the expression that made it."""

    target: int
    values: tuple[int, ...]
    written: tuple[str, ...]

    def moves(self) -> Iterator[Move]:
        for left, operator, right, result, _ in operations(self.values):
            yield Move(
                f"{left} {operator} {right} = ",
                result,
                lambda value, a=left, o=operator, b=right: self._joined(a, o, b, value),
            )

    def hopeful(self) -> bool:
        return solvable(self.values, self.target)

    def finished(self) -> str | None:
        return self.written[0] if len(self.values) == 1 else None

    def concluded(self, line: str) -> bool:
        """However the expression is written."""
        answer = boxed(line) or ""
        return line == answered(answer) and reaches(
            answer, self.target, numbers_in(self.written[0])
        )

    def abandoned(self) -> str:
        return " + ".join(_operand(written) for written in self.written)

    def remark(self) -> str:
        return f" (left: {', '.join(map(str, self.values))})"

    def wished(self) -> int | None:
        return self.target if len(self.values) == 2 else None

    def _joined(self, left: int, operator: str, right: int, result: int) -> "Numbers":
        pairs = list(zip(self.values, self.written, strict=True))
        first, second = (
            _operand(pairs.pop(next(at for at, pair in enumerate(pairs) if pair[0] == value))[1])
            for value in (left, right)
        )
        pairs = sorted([*pairs, (result, f"{first} {operator} {second}")])
        values, written = zip(*pairs, strict=True)
        return Numbers(self.target, values, written)


def problem(rng: random.Random, steps: int) -> Item:
    """Numbers and a target that can be reached from them; the same in another order is the same."""
    while True:
        numbers = tuple(rng.randint(1, 12) for _ in range(steps + 1))
        target = 24 if steps == 3 and rng.random() < 0.5 else rng.randint(10, 60)
        ordered = tuple(sorted(numbers))
        if solvable(ordered, target):
            break
    start = Numbers(target, ordered, tuple(map(str, ordered)))
    listed = ", ".join(map(str, numbers))
    return Item(
        family="countdown",
        steps=steps,
        prompt=f"Use the numbers {listed} with + - * / to make {target}. Use each number once.",
        answer=str(target),
        identity=f"{ordered} -> {target}",
        start=start,
        numbers=numbers,
        target=target,
    )


@lru_cache(maxsize=200_000)
def operations(numbers: tuple[int, ...]) -> tuple[_Operation, ...]:
    """Everything that can be done with two of the sorted numbers."""
    found: set[_Operation] = set()
    for i, j in combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        right, left = numbers[i], numbers[j]
        for operator in "+-*/":
            if operator == "/" and (right == 0 or left % right):
                continue
            result = _apply(left, operator, right)
            if result <= LARGEST:
                found.add((left, operator, right, result, tuple(sorted((*rest, result)))))
    return tuple(sorted(found))


@lru_cache(maxsize=2_000_000)
def solvable(numbers: tuple[int, ...], target: int) -> bool:
    """Whether the target can be reached from the sorted numbers."""
    if len(numbers) == 1:
        return numbers[0] == target
    return any(solvable(operation[4], target) for operation in operations(numbers))


def reaches(expression: str, target: int, numbers: Sequence[int]) -> bool:
    """Whether it is worth the target and uses each number exactly once."""
    used = numbers_in(expression)
    return sorted(used) == sorted(numbers) and value_of(expression) == target


def numbers_in(expression: str) -> list[int]:
    """As they stand in it."""
    return [int(number) for number in re.findall("[0-9]+", expression)]


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


def _apply(left: int, operator: str, right: int) -> int:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left // right


def _operand(written: str) -> str:
    """Put anything but a plain number in brackets."""
    return written if written.isdigit() else f"({written})"
