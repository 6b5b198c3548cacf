"""What `mull-tiny` learns and is tested on, and the line between the two.

Knows no tokenizer and no model.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune.tiny import countdown, prices, word
from finetune.tiny.countdown import reaches
from finetune.tiny.solution import (
    Family,
    Item,
    attempt,
    boxed,
    faults,
    right_until,
    solution,
    wander,
)

FAMILIES: tuple[Family, ...] = ("word", "countdown")
"""What pretraining sees; `prices` is kept for adapters."""

SYSTEM = (
    "You are a helpful assistant.",
    "You are a careful mathematician.",
    "Solve the problem step by step and put the final answer in \\boxed{}.",
)
INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}."

SLIPS: dict[Family, float] = {"word": 0.12, "countdown": 0.25, "prices": 0.25}
"""How often a line goes wrong in the attempts that verification is learned from."""

WEIGHTS: dict[Family, float] = {"word": 0.4, "countdown": 0.6, "prices": 1.0}
"""How often each is drawn to learn from: countdown needs more, and its solutions are shorter."""

WANDERED: dict[Family, float] = {"word": 0.0, "countdown": 0.25, "prices": 0.0}
"""How often a solution to imitate is a walk at random, of which only the results are imitated.

Right solutions of countdown all end with the target, so from them alone a model learns to write the
target last, whatever the operation makes.
"""

_PROBLEM: dict[Family, Callable[[random.Random, int], Item]] = {
    "word": word.problem,
    "countdown": countdown.problem,
    "prices": prices.problem,
}
_STEPS: dict[Family, tuple[int, ...]] = {
    "word": word.STEPS,
    "countdown": countdown.STEPS,
    "prices": prices.STEPS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question and a solution.

    `right` is how many of its leading characters are right, the end being one more; None: it is to
    be imitated, in `taught` only if there are such places. `faults` are the later lines that are
    wrong by themselves.
    """

    system: str | None
    prompt: str
    solution: str
    right: int | None = None
    faults: tuple[tuple[int, int], ...] = ()
    taught: tuple[tuple[int, int], ...] = ()

    @classmethod
    def judging(cls, item: Item, written: str) -> "Example":
        """Somebody's solution of an item, judged."""
        return cls(
            system=None,
            prompt=item.prompt,
            solution=written,
            right=right_until(item, written),
            faults=tuple(faults(item, written)),
        )


def draw(
    rng: random.Random,
    *,
    held_out: bool,
    family: Family | None = None,
    steps: int | None = None,
) -> Item:
    """Draw one item from the training or the test side."""
    while True:
        chosen = family or rng.choice(FAMILIES)
        item = _PROBLEM[chosen](rng, steps or rng.choice(_STEPS[chosen]))
        if item.held_out == held_out:
            return item


def exam(seed: int, per_family: int, families: tuple[Family, ...] = FAMILIES) -> list[Item]:
    """Distinct held-out problems, each number of steps in turn.

    Raises:
        ValueError: A family has fewer.
    """
    rng = random.Random(f"mull-tiny test {seed}")
    chosen: dict[str, Item] = {}
    for family in families:
        wanted, fruitless = len(chosen) + per_family, 0
        while len(chosen) < wanted:
            depths = _STEPS[family]
            steps = depths[(wanted - len(chosen)) % len(depths)]
            item = draw(rng, held_out=True, family=family, steps=steps)
            fruitless = fruitless + 1 if item.identity in chosen else 0
            if fruitless > 10_000:
                raise ValueError(f"'{family}' has fewer than {per_family} held-out problems")
            chosen.setdefault(item.identity, item)
    return list(chosen.values())


def examples(
    rng: random.Random,
    *,
    verified: float = 0.0,
    families: tuple[Family, ...] = FAMILIES,
) -> Iterator[Example]:
    """Draw from the training side without end; the share `verified` is to be judged."""
    while True:
        (family,) = rng.choices(families, [WEIGHTS[one] for one in families])
        item = draw(rng, held_out=False, family=family)
        system = rng.choice(SYSTEM) if rng.random() < 0.1 else None
        prompt = item.prompt + INSTRUCTION if rng.random() < 0.1 else item.prompt
        if rng.random() < verified:
            written = attempt(item, rng, slip=SLIPS[family])
            yield replace(Example.judging(item, written), system=system, prompt=prompt)
        elif rng.random() < WANDERED[family]:
            walked, results = wander(item, rng)
            yield Example(system=system, prompt=prompt, solution=walked, taught=results)
        else:
            yield Example(system=system, prompt=prompt, solution=solution(item, rng))


def grade(item: Item, text: str) -> bool:
    """Whether a solution's boxed answer is right.

    A countdown answer must use each number exactly once.
    """
    answer = boxed(text)
    if answer is None:
        return False
    if item.family != "countdown":
        return answer == item.answer
    assert item.target is not None
    return reaches(answer, item.target, item.numbers)
