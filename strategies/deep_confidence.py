"""Deep confidence: give up traces that the model itself is unsure of (DeepConf, Fu et al. 2025)."""

from collections import deque
from collections.abc import Collection, Sequence
from math import ceil, inf
from typing import ClassVar, Literal

from pydantic import Field

from strategies.core.context import Context, Draw
from strategies.core.errors import NoCandidate
from strategies.core.strategy import Strategy
from strategies.core.types import Candidate, Chunk, Outcome, Problem
from strategies.core.vote import Tally
from strategies.likelihood import require

ROUNDING = 1e-9
"""By how much sums that are equal may differ."""


class DeepConfidence(Strategy, frozen=True):
    """Learn from a few whole traces how sure is sure enough, and abort later ones that are not.

    A token's confidence is the mean of -log p over the `likeliest` tokens at its place; a group's
    is the mean over the last `group` tokens, a trace's that of its lowest group. `warmup` traces
    are drawn whole. The bar is the lowest trace among the `eta` most confident of them: small is
    strict (DeepConf-low, 0.1), large is lenient (DeepConf-high, 0.9). From then on, a trace is
    aborted at the token at which its group falls below the bar. Traces at or above it vote with the
    weight of their confidence. The vote is over when the leader's share of the weight is
    `consensus` and, so that a strict bar does not make one vote unanimous, as many voted as warmed
    up; until then as many are drawn at once as would bring it about if they all agreed.

    A trace shorter than `group` has one group, and is never aborted. Ties go to the answer with
    the earliest trace.
    """

    cost: ClassVar[str] = (
        "at most n samples, of which all but warmup are cut off where they become unsure, "
        "and the log-probabilities of the likeliest tokens at each place"
    )
    paper: ClassVar[str] = "Fu et al. 2025, Deep Think with Confidence, arXiv:2508.15260"

    kind: Literal["deep_confidence"] = "deep_confidence"
    n: int = Field(default=16, ge=1, le=256, description="Traces at most, warm-up included.")
    warmup: int = Field(
        default=4, ge=1, le=256, description="Traces drawn whole, to set the bar; `n` at most."
    )
    eta: float = Field(
        default=0.9, gt=0, le=1, description="Share of the warm-up traces that pass the bar."
    )
    group: int = Field(
        default=32, ge=1, le=8192, description="Tokens of a group; the paper has 2048."
    )
    likeliest: int = Field(
        default=20, ge=2, le=20, description="Likeliest tokens that a token's confidence is of."
    )
    consensus: float = Field(
        default=0.95, gt=0.5, le=1, description="The leader's share of the votes that ends it."
    )

    def most(self) -> int:
        """All its traces."""
        return self.n

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Warm up, set the bar, and draw rounds until the vote is over."""
        if self.n == 1:
            ctx.commit(0)
        tally = Tally()
        candidates: list[Candidate] = []
        confidence: dict[int, float] = {}
        voted: dict[int, str] = {}
        bar: float | None = None
        drawn, wanted = 0, min(self.warmup, self.n)
        async with ctx.sampling(problem, 0) as drawing:
            while wanted:
                draws = [self._draw(bar) for _ in range(wanted)]
                found = [one for one in await drawing.finish(draws) if one is not None]
                confidence |= {one.index: self._lowest(one) for one in found}
                candidates += found
                if not candidates:
                    raise NoCandidate("the budget ran out before the first trace had a token")
                if bar is None:
                    bar = self._bar(confidence.values())
                for one in found:
                    weight = confidence[one.index]
                    if one.answer is not None and weight >= bar:
                        place = await ctx.place(one.answer, tally.answers)
                        voted[one.index] = tally.count(place, one.answer, weight, one.index)
                        ctx.vote(one, voted[one.index], weight)
                drawn += wanted
                wanted = min(self.n - drawn, self._missing(tally, len(voted)))

        def badness(one: Candidate) -> tuple[float, ...]:
            return (
                tally.rank(voted.get(one.index)),
                not one.complete,
                confidence[one.index] < (bar or 0.0),
                one.index,
            )

        return await ctx.choose(
            problem,
            sorted(candidates, key=badness),
            decided=drawn < self.n,
            scores=confidence,
            votes=tally.votes,
        )

    def _draw(self, bar: float | None) -> Draw:
        groups = _Groups(self.group)

        def sure(chunk: Chunk) -> bool:
            groups.add(chunk.top_logprobs)
            return bar is None or groups.lowest >= bar

        return Draw(likeliest=self.likeliest, worth=None if bar is None else sure)

    def _lowest(self, one: Candidate) -> float:
        require(one, one.top_logprobs, self.kind)
        groups = _Groups(self.group)
        groups.add(one.top_logprobs)
        return groups.mean if groups.lowest == inf else groups.lowest

    def _bar(self, confidences: Collection[float]) -> float:
        passing = max(1, ceil(self.eta * len(confidences) - ROUNDING))
        return sorted(confidences, reverse=True)[passing - 1] - ROUNDING

    def _missing(self, tally: Tally, ballots: int) -> int:
        """How many more votes for the leader, of mean weight, would make the consensus."""
        total = sum(tally.weights)
        disagreement = self.consensus - tally.lead[0] / total if total else 1.0
        if disagreement <= ROUNDING:
            return max(0, self.warmup - ballots)
        if total == 0 or self.consensus == 1:
            return self.n
        return ceil(ballots * disagreement / (1 - self.consensus) - ROUNDING)


class _Groups:
    """The confidence of the groups of tokens of a trace, as it grows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: deque[float] = deque()
        self._sum = 0.0
        self.lowest = inf
        """Of all groups so far that are full."""

    def add(self, tokens: Sequence[Sequence[float]]) -> None:
        """The log-probabilities of the likeliest tokens at each of the next places."""
        for top in tokens:
            self._recent.append(-sum(top) / len(top))
            self._sum += self._recent[-1]
            if len(self._recent) > self._size:
                self._sum -= self._recent.popleft()
            if len(self._recent) == self._size:
                self.lowest = min(self.lowest, self.mean)

    @property
    def mean(self) -> float:
        """Of the last group."""
        return self._sum / len(self._recent)
