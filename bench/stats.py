"""The few statistics that the measurements share."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from math import comb


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_width(values: Sequence[float]) -> float:
    """Half of a 95 % interval of the mean."""
    if len(values) < 2:
        return math.inf
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return 1.96 * math.sqrt(variance / len(values))


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def pass_at(k: int, samples: int, right: int) -> float:
    """Unbiased chance that one of k samples is right (Chen et al. 2021)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority_at(
    k: int, answers: Sequence[str | None], right: Sequence[bool], *, draws: int = 40
) -> float:
    """How often the most frequent of k random samples is right.

    Ties go to the first drawn.
    """
    rng = random.Random(k)
    hits = 0
    for _ in range(draws):
        drawn = rng.sample(range(len(answers)), k)
        votes = Counter(answers[at] for at in drawn if answers[at] is not None)
        if votes:
            winner = votes.most_common(1)[0][0]
            hits += any(right[at] for at in drawn if answers[at] == winner)
    return hits / draws
