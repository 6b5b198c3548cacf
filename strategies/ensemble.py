"""Several verifiers as one."""

from collections.abc import Sequence
from typing import Literal

from strategies.core.context import Context, Verifier
from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Problem, Verdict

Agree = Literal["mean", "min", "vote"]


class Ensemble:
    """What several verifiers make of a candidate together (Coste et al. 2024, arXiv:2310.02743).

    `mean` and `min` are of their scores, also step by step where all have the same steps; `vote` is
    the share of verifiers that rank it first, ties shared out. The least of several opinions is
    harder to please by accident than any one of them, which is what best-of-n does to a verifier.
    """

    def __init__(self, members: Sequence[Verifier], agree: Agree) -> None:
        self.kind = "ensemble"
        self.members = members
        self._agree = agree

    @property
    def relative(self) -> bool:
        """Whether its scores mean something only beside those of other candidates."""
        return self._agree == "vote" or any(getattr(one, "relative", False) for one in self.members)

    @property
    def logprobs(self) -> int | None:
        """The most that any of them needs."""
        return max((one.logprobs for one in self.members if one.logprobs is not None), default=None)

    @property
    def stepwise(self) -> bool:
        """If all of them are; a vote is about whole answers."""
        return self._agree != "vote" and all(one.stepwise for one in self.members)

    def aside(self, tokens: int) -> int:
        """For all of them."""
        return min(sum(one.aside(tokens) for one in self.members), max(0, tokens - 1))

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """One verdict per candidate. One member without an opinion leaves all without."""
        opinions = [await one.judge(problem, candidates, ctx) for one in self.members]
        if any(len(of_one) != len(candidates) for of_one in opinions):
            raise VerifierFailed("a member of the ensemble left out a candidate")
        if self._agree == "vote":
            return self._votes(opinions, len(candidates))
        together = list(zip(*opinions, strict=True))
        return [self._together(verdicts) for verdicts in together]

    def _together(self, verdicts: Sequence[Verdict]) -> Verdict:
        steps: tuple[float, ...] = ()
        if len({len(one.steps) for one in verdicts}) == 1:
            steps = tuple(map(self._one, zip(*(one.steps for one in verdicts), strict=True)))
        return Verdict(score=self._one([one.score for one in verdicts]), steps=steps)

    def _one(self, scores: Sequence[float]) -> float:
        return min(scores) if self._agree == "min" else sum(scores) / len(scores)

    def _votes(self, opinions: Sequence[Sequence[Verdict]], candidates: int) -> list[Verdict]:
        shares = [0.0] * candidates
        for verdicts in opinions:
            best = max(verdict.score for verdict in verdicts)
            first = [at for at, verdict in enumerate(verdicts) if verdict.score == best]
            for at in first:
                shares[at] += 1 / len(first) / len(opinions)
        return [Verdict(score=min(1.0, share)) for share in shares]
