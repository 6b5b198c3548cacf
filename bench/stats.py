"""The few statistics that the measurements share."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import comb


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def half_width(values: Sequence[float]) -> float:
    """Half of a 95 % interval of the mean."""
    return 1.96 * standard_error(values)


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
    """How often a vote of k random samples is right.

    Its answer is the first drawn of those that say what most say; ties go to the first drawn.
    """
    rng = random.Random(k)
    hits = 0
    for _ in range(draws):
        drawn = rng.sample(range(len(answers)), k)
        votes = Counter(answers[at] for at in drawn if answers[at] is not None)
        if votes:
            winner = votes.most_common(1)[0][0]
            hits += next(right[at] for at in drawn if answers[at] == winner)
    return hits / draws


def best_at(k: int, scores: Sequence[float], right: Sequence[bool]) -> float:
    """How often the best scored of k random samples is right, over all choices of k.

    Of equal scores, the earlier sample counts as the better.
    """
    ranked = sorted(range(len(scores)), key=lambda at: (scores[at], -at))
    hits = sum(comb(below, k - 1) for below, at in enumerate(ranked) if right[at])
    return hits / comb(len(scores), k)


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """The chance that a positive scores above a negative, a tie counting half.

    None without both.
    """
    ups = sum(positive)
    downs = len(positive) - ups
    if not ups or not downs:
        return None
    order = sorted(range(len(scores)), key=lambda at: scores[at])
    ranks, at = 0.0, 0
    while at < len(order):
        end = at
        while end < len(order) and scores[order[end]] == scores[order[at]]:
            end += 1
        middle = (at + 1 + end) / 2
        ranks += middle * sum(positive[order[place]] for place in range(at, end))
        at = end
    return (ranks - ups * (ups + 1) / 2) / (ups * downs)


def tenths(said: Iterable[tuple[float, bool]]) -> list[tuple[int, float, float]]:
    """By tenth of what was said: how many, what was said in the mean, and how often it was so."""
    parts: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    for score, so in said:
        parts[min(9, int(10 * score))].append((score, so))
    return [
        (len(part), mean([score for score, _ in part]), mean([float(so) for _, so in part]))
        for part in parts
        if part
    ]


def calibration_error(parts: Sequence[tuple[int, float, float]]) -> float | None:
    """Expected, of `tenths`; None without any."""
    total = sum(count for count, _, _ in parts)
    return sum(count * abs(said - so) for count, said, so in parts) / total if total else None


def shares(curve: Sequence[float], tokens: float) -> list[float]:
    """How much of each of two neighbours on an ascending curve makes `tokens`, in their logarithm.

    Outside of the curve it is its nearest end.
    """
    found = [0.0] * len(curve)
    if tokens <= curve[0] or tokens >= curve[-1]:
        found[0 if tokens <= curve[0] else -1] = 1.0
        return found
    at = next(at for at, (_, high) in enumerate(pairwise(curve)) if tokens <= high)
    part = math.log(tokens / curve[at]) / math.log(curve[at + 1] / curve[at])
    found[at], found[at + 1] = 1 - part, part
    return found
