"""A solution is a walk: lines that lead from the facts of a problem to its answer.

A family of problems says which lines may come next. Everything else follows from that: right
solutions are random walks, wrong ones are walks with a slip, and a written solution is judged by
walking along it.
"""

import random
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

Family = Literal["word", "countdown", "prices"]

HELD_OUT = 8
"""One problem in this many is kept for testing, by a hash of what makes it the same problem."""

SLIP = 0.5
"""Of the lines that go wrong in an `attempt`, the share that miscalculates."""

WISH = 0.7
"""How often an `attempt` without hope claims the result that it needs."""


@dataclass(frozen=True, slots=True)
class Move:
    """One line and where it leads: `after` takes the result, which may be a wrong one."""

    text: str
    result: int
    after: Callable[[int], "Walk"]
    weight: float = 1.0
    """How likely it is to be chosen, relative to its siblings."""

    def line(self, result: int | None = None) -> str:
        value = self.result if result is None else result
        return f"{self.text}{value}{self.after(value).remark()}"


class Walk(ABC):
    """A place on the way from a problem to its answer."""

    __slots__ = ()

    @abstractmethod
    def moves(self) -> Iterator[Move]:
        """The lines that may come next, with right arithmetic."""

    def mistakes(self) -> Iterator[Move]:
        """Lines with right arithmetic that misread the problem."""
        yield from ()

    def hopeful(self) -> bool:
        """Whether the right answer can still be reached from here."""
        return True

    @abstractmethod
    def finished(self) -> str | None:
        """The answer, once nothing is left to do."""

    def concluded(self, line: str) -> bool:
        """Whether this last line rightly says what has been found."""
        return line == answered(self.finished() or "")

    @abstractmethod
    def abandoned(self) -> str:
        """What someone would answer who stops here."""

    def remark(self) -> str:
        """What a line that leads here says after its result."""
        return ""

    def wished(self) -> int | None:
        """The result that the next line would have if only the answer came out."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A problem, its answer, and where its solutions start.

    `identity` is equal for two items that are the same problem.
    """

    family: Family
    steps: int
    prompt: str
    answer: str
    identity: str
    start: Walk
    numbers: tuple[int, ...] = ()
    target: int | None = None

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test side; training never draws such an item."""
        return zlib.crc32(self.identity.encode()) % HELD_OUT == 0


def answered(answer: str) -> str:
    """The last line of a solution."""
    return f"Answer: \\boxed{{{answer}}}"


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` without inner braces."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


def solution(item: Item, rng: random.Random) -> str:
    """One of the right solutions, at random."""
    return attempt(item, rng, slip=0)


def attempt(item: Item, rng: random.Random, *, slip: float) -> str:
    """A solution that may go wrong.

    Each line goes wrong with probability `slip`; after the first that does, the rest follows from
    it in good faith, as a model goes on from its own slip.
    """
    at, good, lines = item.start, True, list[str]()
    while (answer := at.finished()) is None:
        slips = good and rng.random() < slip
        moves = list(at.moves())
        miscalculates = False
        if slips:
            good = False
            wrong = _wrong(at, moves)
            miscalculates = not wrong or rng.random() < SLIP
            moves = moves if miscalculates else wrong
        elif good:
            moves = [move for move in moves if move.after(move.result).hopeful()]
        if not moves or (slips and rng.random() < 0.1):
            answer = at.abandoned()
            break
        move = rng.choices(moves, [move.weight for move in moves])[0]
        value = _near(rng, move.result) if miscalculates else move.result
        if not good and (wished := at.wished()) is not None and rng.random() < WISH:
            value = wished
        lines.append(move.line(value))
        at = move.after(value)
    if good and rng.random() < slip / 2:
        answer = _misspelt(rng, answer)
    return "\n".join([*lines, answered(answer)])


def wander(item: Item, rng: random.Random) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A walk with right arithmetic wherever it leads, and where its results stand in it.

    The results, as (start, end) in characters, run to the ends of their lines; the last line is
    one as a whole.
    """
    at, lines, results = item.start, list[str](), list[tuple[int, int]]()
    done = 0
    while (answer := at.finished()) is None:
        moves = list(at.moves())
        if not moves:
            answer = at.abandoned()
            break
        move = rng.choices(moves, [move.weight for move in moves])[0]
        lines.append(move.line())
        results.append((done + len(move.text), done + len(lines[-1]) + 1))
        done += len(lines[-1]) + 1
        at = move.after(move.result)
    lines.append(answered(answer))
    return "\n".join(lines), (*results, (done, done + len(lines[-1]) + 1))


def right_until(item: Item, text: str) -> int:
    """How many leading characters of a written solution are right; its end counts as one more.

    Right is what some walk to the answer writes, character for character. Nothing after the first
    wrong character is right: a right answer was not reached from there.
    """
    at, done = item.start, 0
    while True:
        line, newline, _ = text[done:].partition("\n")
        if (answer := at.finished()) is not None:
            if at.concluded(line):
                return done + len(line) + 1
            return done + _common(line, answered(answer))
        ahead = [(move, move.after(move.result)) for move in at.moves()]
        lines = {move.line(): after for move, after in ahead if after.hopeful()}
        if not newline or line not in lines:
            return done + max((_common(line + newline, f"{one}\n") for one in lines), default=0)
        at, done = lines[line], done + len(line) + 1


def judged(item: Item, text: str) -> list[tuple[str, bool]]:
    """Each line of a written solution, and whether all is right up to its end."""
    right, ends = right_until(item, text), 0
    judgement: list[tuple[str, bool]] = []
    for line in text.split("\n"):
        ends += len(line) + 1
        judgement.append((line, right >= ends))
    return judgement


def faults(item: Item, text: str) -> list[tuple[int, int]]:
    """Lines after the first wrong one that are wrong by themselves, as (start, end) in characters.

    Those that only follow from a mistake before them are not among them, but a last line is whose
    answer is wrong, and one after which nothing is left to do and the answer is wrong.
    """
    right, done, found = right_until(item, text), 0, list[tuple[int, int]]()
    at: Walk | None = item.start
    lines = text.split("\n")
    for number, line in enumerate(lines):
        end = done + len(line) + 1
        sound, at = _followed(at, line)
        last = number == len(lines) - 1
        missed = at is not None and at.finished() is not None and not at.hopeful()
        if right < done and (not sound or last or missed):
            found.append((done, end))
        done = end
    return found


def _followed(at: Walk | None, line: str) -> tuple[bool, Walk | None]:
    """Whether a line may be written at a place, hopeful or not, and where it leads.

    Where that is not known, nothing is held against the line.
    """
    if at is None or at.finished() is not None:
        return True, None
    moves = [(move, True) for move in at.moves()] + [(move, False) for move in at.mistakes()]
    fitting = [(move, allowed) for move, allowed in moves if line.startswith(move.text)]
    # Of the same words, the right line stands first.
    for move, allowed in sorted(fitting, key=lambda pair: -len(pair[0].text)):
        said = re.match("[0-9]+", line[len(move.text) :])
        if said is None:
            continue
        value = int(said.group())
        written = line == move.line(value)
        return allowed and written and value == move.result, move.after(value) if written else None
    return False, None


def _common(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _wrong(at: Walk, moves: list[Move]) -> list[Move]:
    """Lines that misread the problem or lead nowhere."""
    right = {move.line() for move in moves}
    hopeless = [move for move in moves if not move.after(move.result).hopeful()]
    return hopeless + [move for move in at.mistakes() if move.line() not in right]


def _near(rng: random.Random, value: int) -> int:
    """A wrong result as models write them: one digit off, or a carry forgotten."""
    while True:
        if rng.random() < 0.5:
            wrong = value + rng.choice((-100, -20, -10, -10, -2, -1, 1, 2, 10, 10, 20, 100))
        else:
            wrong = int(_misspelt(rng, str(value)))
        if wrong >= 0 and wrong != value:
            return wrong


def _misspelt(rng: random.Random, answer: str) -> str:
    """The answer with one digit changed."""
    at = rng.choice([at for at, letter in enumerate(answer) if letter.isdigit()])
    digit = rng.choice([digit for digit in "0123456789" if digit != answer[at]])
    return answer[:at] + digit + answer[at + 1 :]
