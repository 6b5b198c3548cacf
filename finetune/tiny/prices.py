"""Unit prices: the domain that pretraining never sees, kept for the domain adapter to learn.

Told in the words of `word`: an adapter leaves embeddings as they are, and those of tokens that
pretraining never met say nothing.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from finetune.tiny.solution import Item, Move, Walk
from finetune.tiny.word import NAMES, THINGS, pronouns

STEPS = (2, 3)
"""What another amount costs; and the change from a note, too."""

_NOTES = (50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True)
class Price(Walk):
    """`have` pieces cost `cost`; asked is what `want` cost, or what is left of a `note`.

    `keys`, with which lines begin: who tells the price, and who is asked about.
    """

    keys: tuple[str, str]
    have: int
    cost: int
    want: int
    note: int | None
    found: tuple[int, ...] = ()

    def moves(self) -> Iterator[Move]:
        first, other = self.keys
        match self.found:
            case ():
                text, result = f"{first}: {self.cost} / {self.have} = ", self.cost // self.have
            case (one,):
                text, result = f"{other}: {self.want} * {one} = ", self.want * one
            case _:
                spent, note = self.found[-1], self.note or 0
                text, result = f"{other}: {note} - {spent} = ", note - spent
        yield Move(text, result, lambda value: replace(self, found=(*self.found, value)))

    def finished(self) -> str | None:
        lines = 2 if self.note is None else 3
        return str(self.found[-1]) if len(self.found) == lines else None

    def abandoned(self) -> str:
        return str(self.found[-1] if self.found else 0)


def problem(rng: random.Random, steps: int) -> Item:
    """The same numbers with other things to buy, or with a note to pay, are the same problem."""
    first, other = rng.sample(NAMES, 2)
    she, _ = pronouns(other)
    thing = rng.choice([one for one in THINGS if one != "coins"])
    have, want = rng.sample(range(2, 13), 2)
    one = rng.randint(2, 60)
    note = None
    trade = f"{other} sells {want} {thing}."
    if steps == 3:
        note = next(value for value in _NOTES if value > want * one)
        trade = f"{other} has {note} coins. {she} buys {want} {thing}."
    answer = want * one if note is None else note - want * one
    return Item(
        family="prices",
        steps=steps,
        prompt=(
            f"{first} buys {have} {thing} with {have * one} coins. {trade} "
            f"How many coins does {other} have in the end?"
        ),
        answer=str(answer),
        identity=f"{have} for {have * one}, {want}",
        start=Price((first, other), have, have * one, want, note),
    )
