"""Voting over equivalent answers, and the rules by which a vote may end early.

Pure and synchronous.
"""

from dataclasses import dataclass, field
from math import ceil, comb
from typing import Literal

StopRule = Literal["never", "unassailable", "confidence", "window"]


@dataclass(slots=True)
class Tally:
    """Weights by answer, in order of first appearance; in [0, 1] where a stop rule reads them."""

    answers: list[str] = field(default_factory=list[str])
    weights: list[float] = field(default_factory=list[float])
    first: list[int] = field(default_factory=list[int])
    """Per answer, the lowest index of a sample that gave it; it breaks ties."""
    recent: list[str | None] = field(default_factory=list[str | None])
    """Every ballot's answer in the order counted, None for a sample without one."""

    def blank(self) -> None:
        """Count a ballot without an answer."""
        self.recent.append(None)

    def count(self, place: int | None, answer: str, weight: float, index: int) -> str:
        """Count one ballot for the known answer at `place`, or for a new one.

        Return the answer counted for.
        """
        if place is None:
            place = len(self.answers)
            self.answers.append(answer)
            self.weights.append(0.0)
            self.first.append(index)
        self.weights[place] += weight
        self.first[place] = min(self.first[place], index)
        self.recent.append(self.answers[place])
        return self.answers[place]

    def ranked(self) -> list[int]:
        """Places of the answers, best first; a tie goes to the answer with the earliest sample."""
        return sorted(
            range(len(self.answers)), key=lambda place: (-self.weights[place], self.first[place])
        )

    def rank(self, answer: str | None) -> int:
        """The place of an answer in the ranking, from 0; one that has no vote comes last."""
        ranked = [self.answers[place] for place in self.ranked()]
        return ranked.index(answer) if answer in ranked else len(ranked)

    @property
    def votes(self) -> dict[str, float]:
        """The weight of every answer."""
        return dict(zip(self.answers, self.weights, strict=True))

    @property
    def lead(self) -> tuple[float, float]:
        """The weights of the best and the second best answer."""
        best = sorted(self.weights, reverse=True)[:2]
        return (best[0] if best else 0.0, best[1] if len(best) > 1 else 0.0)


def majority_confidence(best: int, second: int) -> float:
    """P(the best answer is the likelier of the two), uniform Beta prior (Aggarwal et al. 2023)."""
    draws = best + second + 1
    return sum(comb(draws, k) for k in range(best + 1)) / 2**draws


def unassailable(best: float, second: float, left: int) -> bool:
    """Whether `left` further samples, each of weight at most one, cannot overtake or draw level."""
    return best - second > left


def fewest_to_decide(
    rule: StopRule, tally: Tally, left: int, *, confidence: float, window: int
) -> int:
    """The smallest number of further samples after which the vote could be over; at most `left`."""
    best, second = tally.lead
    if rule == "never":
        return left
    if rule == "window":
        current = tally.recent[len(tally.recent) // window * window :]
        spoiled = None in current or len(set(current)) > 1
        return min(left, window - len(current) + window * spoiled)
    for more in range(1, left):
        if rule == "unassailable" and unassailable(best + more, second, left - more):
            return more
        if (
            rule == "confidence"
            and majority_confidence(int(best) + more, int(second)) >= confidence
        ):
            return more
    return left


def likely_to_decide(
    rule: StopRule, tally: Tally, left: int, *, confidence: float, window: int
) -> int:
    """How many further samples end the vote if they agree as those counted did; at most `left`.

    A close vote thus goes on with all at once. The fewest that could decide it would save tokens
    only if luck changed, and would make the client wait for one round after the other.
    """
    fewest = fewest_to_decide(rule, tally, left, confidence=confidence, window=window)
    if rule in ("never", "window") or not tally.recent:
        return fewest
    best, second = tally.lead
    counted = len(tally.recent)
    for more in range(fewest, left):
        first, other = (weight * (1 + more / counted) for weight in (best, second))
        if rule == "unassailable" and unassailable(first, other, left - more):
            return more
        if rule == "confidence" and majority_confidence(int(first), ceil(other)) >= confidence:
            return more
    return left


def decided(rule: StopRule, tally: Tally, left: int, *, confidence: float, window: int) -> bool:
    """Whether the vote is over before its last sample."""
    best, second = tally.lead
    if not tally.answers or left == 0 or rule == "never":
        return False
    if rule == "unassailable":
        return unassailable(best, second, left)
    if rule == "confidence":
        return majority_confidence(int(best), int(second)) >= confidence
    last = tally.recent[-window:]
    return len(tally.recent) % window == 0 and last[0] is not None and len(set(last)) == 1
