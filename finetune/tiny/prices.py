"""Unit prices: the domain that pretraining never sees, kept for the domain adapter to learn."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from finetune.tiny.solution import Item, Move, Walk

STEPS = (2, 3)
"""What another amount costs; and the change from a note, too."""

_THINGS = ("pens", "cups", "hats", "mats", "pans", "lamps", "forks", "rings")
_NOTES = (50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True)
class Price(Walk):
    """`have` pieces cost `cost`; asked is what `want` cost, or what is left of a `note`."""

    have: int
    cost: int
    want: int
    note: int | None
    found: tuple[int, ...] = ()

    def moves(self) -> Iterator[Move]:
        match self.found:
            case ():
                text, result = f"one: {self.cost} / {self.have} = ", self.cost // self.have
            case (one,):
                text, result = f"all: {self.want} * {one} = ", self.want * one
            case _:
                spent, note = self.found[-1], self.note or 0
                text, result = f"change: {note} - {spent} = ", note - spent
        yield Move(text, result, lambda value: replace(self, found=(*self.found, value)))

    def finished(self) -> str | None:
        lines = 2 if self.note is None else 3
        return str(self.found[-1]) if len(self.found) == lines else None

    def abandoned(self) -> str:
        return str(self.found[-1] if self.found else 0)


def problem(rng: random.Random, steps: int) -> Item:
    """The same numbers with other things to buy, or with a note to pay, are the same problem."""
    thing = rng.choice(_THINGS)
    have, want = rng.sample(range(2, 13), 2)
    one = rng.randint(2, 60)
    note = None
    asked = f"How much do {want} {thing} cost?"
    if steps == 3:
        note = next(value for value in _NOTES if value > want * one)
        asked = f"How much change from {note} does one get for {want} {thing}?"
    answer = want * one if note is None else note - want * one
    return Item(
        family="prices",
        steps=steps,
        prompt=f"The price of {have} {thing} is {have * one}. {asked}",
        answer=str(answer),
        identity=f"{have} for {have * one}, {want}",
        start=Price(have, have * one, want, note),
    )
