"""Word problems: one quantity, many facts that change it, and many right ways to add them up.

Every fact has a key of its own (a name, a place, a kind of container), and each line of a solution
begins with the key of the fact that it works on. The facts may be taken in any order that keeps the
total at zero or more, and two-digit operands may be split into tens and units. So a problem has
hundreds of right solutions, and two of them seldom share a sum.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from finetune.tiny.solution import Item, Move, Walk

LARGEST = 499
"""No intermediate result exceeds this, in whatever order the facts are taken."""

STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
"""How many operations the shortest solution may need."""

_SHE = ("Ann", "Mia", "Eva", "Zoe", "Ivy", "Kim", "Amy", "Liz")
_HE = ("Tom", "Bob", "Sam", "Leo", "Max", "Dan", "Ben", "Jon")
NAMES = _SHE + _HE
THINGS = ("apples", "coins", "books", "cards", "shells", "stamps", "pens", "eggs", "nuts", "stars")
_CONTAINERS = ("bags", "boxes", "packs", "jars", "trays", "crates")
_PLACES = ("park", "garden", "shop", "school", "beach", "market")

_SPLIT_SUM, _SPLIT_PRODUCT = 0.25, 0.6
"""How likely a split is, relative to doing the same at once."""


@dataclass(frozen=True, slots=True)
class Fact:
    """It changes the total by `sign * count * each`."""

    key: str
    sign: Literal[1, -1]
    each: int
    count: int | None = None

    @property
    def change(self) -> int:
        return self.sign * self.each * (self.count or 1)


@dataclass(frozen=True, slots=True)
class Sum(Walk):
    """What is still to do, and what is half done."""

    todo: tuple[Fact, ...]
    done: tuple[Fact, ...] = ()
    total: int | None = None
    halves: tuple[Fact, tuple[int, ...]] | None = None
    """A product that was split, and the parts of it that are computed."""
    term: Fact | None = None
    """A computed product, or the units of a split operand: added next."""

    def moves(self) -> Iterator[Move]:
        if self.halves is not None:
            yield self._go_on(*self.halves)
        elif self.term is not None:
            yield from replace(self, term=None)._add(self.term)
        else:
            for fact in self.todo:
                yield from self._taken(fact)

    def mistakes(self) -> Iterator[Move]:
        if self.halves is None and self.term is None:
            for fact in self.todo:
                yield from self._taken(replace(fact, sign=-fact.sign), fact)
                yield from self._taken(replace(fact, each=fact.each + 10), fact)
                yield from self._taken(replace(fact, each=int(str(fact.each)[::-1])), fact)
                for other in (*self.todo, *self.done):  # one number of another fact, or both
                    yield from self._taken(replace(fact, each=other.each), fact)
                    if other.count is not None:
                        both = replace(fact, each=other.each, count=other.count)
                        yield from self._taken(both, fact)
            for fact in self.done:
                yield from self._taken(fact)

    def finished(self) -> str | None:
        return None if self.todo or self.halves or self.term else str(self.total)

    def abandoned(self) -> str:
        return str(self.total or 0)

    def _taken(self, fact: Fact, instead: Fact | None = None) -> Iterator[Move]:
        crossed = instead or fact
        left = tuple(one for one in self.todo if one != crossed)
        rest = replace(self, todo=left, done=(*self.done, crossed))
        if fact.count is not None:
            yield from rest._multiply(fact, fact.count)
        elif fact.sign == 1 or self.total is not None:
            yield from rest._add(fact)

    def _add(self, fact: Fact) -> Iterator[Move]:
        if self.total is None:
            yield Move(f"{fact.key}: ", fact.each, lambda value: replace(self, total=value))
        elif 0 <= self.total + fact.sign * fact.each <= LARGEST:
            so_far = f"{fact.key}: {self.total} {'+' if fact.sign == 1 else '-'}"
            yield Move(
                f"{so_far} {fact.each} = ",
                self.total + fact.sign * fact.each,
                lambda value: replace(self, total=value),
            )
            tens, units = _tens(fact.each)
            if tens and units:
                yield Move(
                    f"{so_far} {tens} = ",
                    self.total + fact.sign * tens,
                    lambda value: replace(self, total=value, term=replace(fact, each=units)),
                    _SPLIT_SUM,
                )

    def _multiply(self, fact: Fact, count: int) -> Iterator[Move]:
        if self.total is None and fact.sign == -1:
            return
        yield Move(
            f"{fact.key}: {count} * {fact.each} = ",
            count * fact.each,
            lambda value: self._computed(fact, value),
        )
        tens, units = _tens(fact.each)
        if tens and units:
            yield Move(
                f"{fact.key}: {count} * {tens} = ",
                count * tens,
                lambda value: replace(self, halves=(fact, (value,))),
                _SPLIT_PRODUCT,
            )

    def _go_on(self, fact: Fact, parts: tuple[int, ...]) -> Move:
        if len(parts) == 1:
            _, units = _tens(fact.each)
            return Move(
                f"{fact.key}: {fact.count} * {units} = ",
                (fact.count or 1) * units,
                lambda value: replace(self, halves=(fact, (*parts, value))),
            )
        whole = replace(self, halves=None)
        return Move(
            f"{fact.key}: {parts[0]} + {parts[1]} = ",
            sum(parts),
            lambda value: whole._computed(fact, value),
        )

    def _computed(self, fact: Fact, product: int) -> "Sum":
        if self.total is None:
            return replace(self, total=product)
        return replace(self, term=Fact(fact.key, fact.sign, product))

    def hopeful(self) -> bool:
        """Whether the term at hand can be taken off, or must wait for what it is taken from."""
        if self.total is None:
            return True
        owed = [self.term] if self.term else [self.halves[0]] if self.halves else []
        return all(self.total + fact.change >= 0 for fact in owed)


def pronouns(name: str) -> tuple[str, str]:
    """As a subject that begins a sentence, and as an object."""
    return ("She", "her") if name in _SHE else ("He", "him")


def problem(rng: random.Random, steps: int) -> Item:
    """One problem whose shortest solution has `steps` operations.

    The same numbers in other words or another order are the same problem.
    """
    owner = rng.choice(NAMES)
    she, her = pronouns(owner)
    thing = rng.choice(THINGS)
    keys = _Keys(rng, owner)
    while True:
        facts = _facts(rng, steps, keys)
        if sum(fact.change for fact in facts if fact.sign == 1) > LARGEST:
            continue
        if (total := sum(fact.change for fact in facts)) >= 1:
            break
    story = [f"{owner} has {_amount(facts[0], thing)}."]
    story += [_told(rng, fact, she, her, thing) for fact in facts[1:]]
    if rng.random() < 0.2:  # a fact that does not matter
        other = rng.choice([one for one in THINGS if one != thing])
        story.insert(
            rng.randint(1, len(story)), f"{keys.friends[-1]} has {rng.randint(2, 99)} {other}."
        )
    story.append(
        f"How many {thing} does {owner} have {rng.choice(('now', 'at the end', 'in the end'))}?"
    )
    return Item(
        family="word",
        steps=steps,
        prompt=" ".join(story),
        answer=str(total),
        identity=" ".join(sorted(f"{fact.sign * (fact.count or 1)}*{fact.each}" for fact in facts)),
        start=Sum(tuple(facts)),
    )


class _Keys:
    """The names, places and containers of one problem, each used once."""

    def __init__(self, rng: random.Random, owner: str) -> None:
        self.owner = owner
        self.friends = rng.sample([name for name in NAMES if name != owner], 7)
        self.places = rng.sample(_PLACES, len(_PLACES))
        self.containers = rng.sample(_CONTAINERS, 3)


def _facts(rng: random.Random, steps: int, keys: _Keys) -> list[Fact]:
    """The owner's own things first, then changes; a product counts as two operations."""
    fewest, most = max(0, steps - 5), min(3, (steps + 1) // 2)
    products = rng.randint(fewest, most)
    kinds = [True] * products + [False] * (steps + 1 - 2 * products)
    rng.shuffle(kinds)
    containers = iter(keys.containers)
    facts: list[Fact] = []
    for at, is_product in enumerate(kinds):
        sign = 1 if at == 0 or rng.random() < 0.6 else -1
        if is_product:
            facts.append(Fact(next(containers), sign, rng.randint(2, 30), rng.randint(2, 9)))
        else:
            key = keys.owner if at == 0 else rng.choice((keys.friends, keys.places))[at]
            facts.append(Fact(key, sign, rng.randint(2, 99)))
    return facts


def _amount(fact: Fact, thing: str) -> str:
    if fact.count is None:
        return f"{fact.each} {thing}"
    return f"{fact.key}, {fact.count} with {fact.each} {thing} each"


def _told(rng: random.Random, fact: Fact, she: str, her: str, thing: str) -> str:
    """One sentence, in which the key comes before its numbers, as in the solution."""
    amount, gain = _amount(fact, thing), fact.sign == 1
    if fact.count is not None:
        verb = rng.choice(("buys", "gets", "finds") if gain else ("sells", "loses", "gives away"))
        return f"{she} {verb} {amount}."
    if rng.random() < 0.2:
        amount = str(fact.each)  # the noun goes without saying
    if fact.key in _PLACES:
        verb = rng.choice(("finds", "buys") if gain else ("loses", "sells"))
        return f"At the {fact.key} {she.lower()} {verb} {amount}."
    return f"{fact.key} gives {her} {amount}." if gain else f"{fact.key} gets {amount} from {her}."


def _tens(number: int) -> tuple[int, int]:
    return number - number % 10, number % 10
