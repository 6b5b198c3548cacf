"""Best-of-N: sample independently, keep what the verifier likes most (Cobbe et al. 2021)."""

from typing import ClassVar, Literal

from pydantic import Field

from strategies.core.context import Context
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem
from strategies.core.vote import Tally


class BestOfN(Strategy, frozen=True):
    """Draw `n` samples, judge them all, return the best.

    `max` returns the candidate with the highest score; `weighted` adds up the scores of equivalent
    answers and returns the best candidate of the heaviest answer (Li et al. 2023). A sample that a
    limit cut short wins only if no other ended by itself. Ties go to the earliest sample.
    """

    cost: ClassVar[str] = "n samples and one batched verification"
    paper: ClassVar[str] = (
        "Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv:2110.14168"
    )

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = Field(default=8, ge=1, le=256, description="Samples to draw.")
    select: Literal["max", "weighted"] = Field(
        default="max", description="Best score, or score-weighted vote."
    )
    verifier: VerifierChoice = Field(
        default=VerifierChoice(kind="likelihood"),
        description="Who judges: a kind from GET /v1/verifiers, or an object with its parameters.",
    )

    def judged_by(self) -> VerifierChoice:
        """The verifier that scores every candidate."""
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Sample, judge, choose."""
        candidates = await ctx.sample_many(problem, self.n)
        verdicts = await ctx.verify(problem, candidates)
        scores = {
            candidate.index: verdict.score
            for candidate, verdict in zip(candidates, verdicts, strict=True)
        }
        if self.select == "max":
            return ctx.choose(_best(candidates, scores), among=candidates, scores=scores)
        tally = Tally()
        voters: dict[str, list[Candidate]] = {}
        for candidate in [one for one in candidates if one.complete] or candidates:
            if candidate.answer is None:
                continue
            place = await ctx.answers.place(candidate.answer, tally.answers, ctx.answer_format)
            counted = tally.count(place, candidate.answer, scores[candidate.index], candidate.index)
            if counted is not None:
                voters.setdefault(counted, []).append(candidate)
                ctx.vote(candidate, counted, scores[candidate.index])
        ranked = tally.ranked()
        winners = voters[tally.answers[ranked[0]]] if ranked else candidates
        votes = dict(zip(tally.answers, tally.weights, strict=True))
        return ctx.choose(_best(winners, scores), among=candidates, scores=scores, votes=votes)


def _best(candidates: list[Candidate], scores: dict[int, float]) -> Candidate:
    return max(candidates, key=lambda one: (one.complete, scores[one.index], -one.index))
