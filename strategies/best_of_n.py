"""Best-of-N: sample independently, keep what the verifier likes most (Cobbe et al. 2021)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from strategies.core.context import Context
from strategies.core.errors import BudgetSpent
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem
from strategies.core.vote import Tally

Select = Literal["max", "weighted"]


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

    judges_together: ClassVar[bool] = True

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = Field(default=8, ge=1, le=256, description="Samples to draw.")
    select: Select = Field(default="max", description="Best score, or score-weighted vote.")
    verifier: VerifierChoice = Field(
        default=VerifierChoice(kind="likelihood"),
        description="Who judges: a kind from GET /v1/verifiers, or an object with its parameters.",
    )

    def most(self) -> int:
        """All its samples."""
        return self.n

    def judged_by(self) -> VerifierChoice:
        """The verifier that scores every candidate."""
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Sample, judge, choose."""
        if self.n == 1:
            ctx.commit(0)
        candidates = await ctx.sample_many(problem, self.n)
        try:
            verdicts = await ctx.verify(problem, candidates)
        except BudgetSpent:
            verdicts = []
        scores = {
            candidate.index: verdict.score
            for candidate, verdict in zip(candidates, verdicts, strict=bool(verdicts))
        }
        return await elect(problem, ctx, candidates, scores, self.select)


async def elect(
    problem: Problem,
    ctx: Context,
    candidates: Sequence[Candidate],
    scores: Mapping[int, float],
    select: Select,
) -> Outcome:
    """End the run by scores, which are by index; `candidates` come in the order that breaks ties.

    What nobody judged has no vote, and wins only if nothing that ended as it did was judged.
    """
    order = {candidate.index: at for at, candidate in enumerate(candidates)}

    def badness(one: Candidate) -> tuple[float, ...]:
        score = scores.get(one.index)
        return (not one.complete, score is None, -(score or 0.0), order[one.index])

    if select == "max":
        return await ctx.choose(problem, sorted(candidates, key=badness), scores=scores)
    tally = Tally()
    voted: dict[int, str] = {}
    for candidate in [one for one in candidates if one.complete] or candidates:
        score = scores.get(candidate.index)
        if candidate.answer is None or score is None:
            continue
        place = await ctx.place(candidate.answer, tally.answers)
        counted = tally.count(place, candidate.answer, score, order[candidate.index])
        voted[candidate.index] = counted
        ctx.vote(candidate, counted, score)
    best_first = sorted(
        candidates, key=lambda one: (tally.rank(voted.get(one.index)), *badness(one))
    )
    return await ctx.choose(problem, best_first, scores=scores, votes=tally.votes)
