"""Verifiers that need nothing but the model's own probabilities of what it wrote."""

from collections.abc import Sequence
from math import exp, isnan, log
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from strategies.core.context import Context
from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Problem, Verdict


class Likelihood(BaseModel):
    """How likely the model found its own words; no extra tokens.

    `mean`: the geometric mean probability of a token. `sum`: 1 / (1 + the surprise of the whole
    text in nats). `min`: the probability of the least likely line, a line being a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["likelihood"] = "likelihood"
    over: Literal["sum", "mean", "min"] = Field(
        default="min", description="How token log-probabilities combine."
    )

    @property
    def logprobs(self) -> int:
        """Those of the chosen tokens."""
        return 0

    @property
    def stepwise(self) -> bool:
        """With `min`."""
        return self.over == "min"

    def aside(self, tokens: int) -> int:
        """Nothing: it is free."""
        return 0

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """One score per candidate; with `min`, one per line as well."""
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict:
        require(candidate, [(logprob,) for logprob in candidate.logprobs], self.kind)
        if self.over == "sum":
            return Verdict(score=1 / (1 - min(0.0, sum(candidate.logprobs))))
        if self.over == "mean":
            return Verdict(score=candidate.likelihood or 0.0)
        if len(candidate.pieces) != len(candidate.token_ids):
            raise VerifierFailed(f"verifier '{self.kind}' with 'min' needs each token in words")
        steps = tuple(_probability(total) for total in _lines(candidate))
        return Verdict(score=min(steps), steps=steps)


class SelfCertainty(BaseModel):
    """How far each next-token distribution was from uniform (Kang et al.

    2025), over its k likeliest tokens.

    The mean divergence x from uniform, in nats, becomes the score 1 - exp(-x).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["self_certainty"] = "self_certainty"

    @property
    def logprobs(self) -> int:
        """Those of the 20 likeliest tokens."""
        return 20

    @property
    def stepwise(self) -> bool:
        """It averages over a whole answer."""
        return False

    def aside(self, tokens: int) -> int:
        """Nothing: it is free."""
        return 0

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """One score per candidate."""
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict:
        require(candidate, candidate.top_logprobs, self.kind)
        total = sum(-sum(top) / len(top) - log(len(top)) for top in candidate.top_logprobs)
        return Verdict(score=1 - exp(-max(0.0, total / len(candidate.top_logprobs))))


def require(candidate: Candidate, numbers: Sequence[Sequence[float]], kind: str) -> None:
    """Refuse a candidate unless each of its tokens has numbers that are numbers."""
    usable = [of_token for of_token in numbers if of_token and not any(map(isnan, of_token))]
    if not usable or not len(usable) == len(numbers) == len(candidate.token_ids):
        raise VerifierFailed(
            f"'{kind}' needs the log-probability of every token; "
            f"candidate {candidate.index} has {len(usable)} for {len(candidate.token_ids)} tokens"
        )


def _lines(candidate: Candidate) -> list[float]:
    """Log-probability of each line, its newline included."""
    totals: list[float] = [0.0]
    ended = False
    for piece, logprob in zip(candidate.pieces, candidate.logprobs, strict=True):
        if ended:
            totals.append(0.0)
        totals[-1] += logprob
        ended = "\n" in piece
    return totals


def _probability(logprob: float) -> float:
    return exp(min(0.0, logprob))
