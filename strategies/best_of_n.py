"""Best-of-N: sample independently, keep what the verifier likes most (Cobbe et al. 2021)."""

import random
from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from strategies.core.bandit import Bandit
from strategies.core.context import Context, Draw
from strategies.core.errors import BudgetSpent, NoCandidate
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem
from strategies.core.vote import Tally

Select = Literal["max", "weighted"]

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class BestOfN(Strategy, frozen=True):
    """Draw `n` samples, judge them all, return the best.

    `max` returns the candidate with the highest score; `weighted` adds up the scores of equivalent
    answers and returns the best candidate of the heaviest answer (Li et al. 2023); `soft` draws one
    with probability in proportion to exp(score / softness), which stays nearer to what the model
    says by itself, and so gives an over-trusted verifier less to spoil (soft best-of-n, Verdun et
    al. 2025, arXiv:2505.03156). A sample that a limit cut short wins only if no other ended by
    itself. Ties go to the earliest sample.

    With `models`, samples come from several adapters in one batch, in rounds: in the first each has
    two, then more come from those whose samples scored higher (Thompson sampling).
    """

    cost: ClassVar[str] = "n samples, each judged once; with models, in up to five rounds"
    paper: ClassVar[str] = (
        "Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv:2110.14168"
    )

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = Field(default=8, ge=1, le=256, description="Samples to draw.")
    select: Literal["max", "weighted", "soft"] = Field(
        default="max", description="Best score, score-weighted vote, or a draw by score."
    )
    softness: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="For select `soft`, where it is 0.1: near 0 is `max`, large is any sample.",
    )
    verifier: VerifierChoice = Field(
        default=VerifierChoice(kind="likelihood"),
        description="Who judges: a kind from GET /v1/verifiers, or an object with its parameters.",
    )
    models: tuple[Name, ...] = Field(
        default=(),
        max_length=8,
        description="Adapters or aliases, and the base by its name, to draw from; none: `model`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.softness is not None and self.select != "soft":
            raise ValueError("'softness' needs select 'soft'")
        if len(set(self.models)) < len(self.models):
            raise ValueError("'models' names one twice")
        if len(self.models) > 1 and self.n < 2 * len(self.models):
            raise ValueError("'n' is to be twice the number of 'models' at least")
        return self

    def most(self) -> int:
        """All its samples."""
        return self.n

    def judges_together(self) -> bool:
        """Unless the next round depends on it."""
        return len(self.models) < 2

    def drawn_from(self) -> tuple[str, ...]:
        """The models that it was given."""
        return self.models

    def judged_by(self) -> VerifierChoice:
        """The verifier that scores every candidate."""
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Sample, judge, choose."""
        if self.n == 1:
            ctx.commit(0)
        candidates: list[Candidate] = []
        scores: dict[int, float] = {}
        bandit = Bandit(self.models, problem.seed) if len(self.models) > 1 else None
        drawn = 0
        try:
            while drawn < self.n:
                draws = [Draw(model=self.models[0] if self.models else None)] * self.n
                if bandit is not None:
                    size = 2 * len(self.models) if drawn == 0 else ceil(self.n / 4)
                    names = bandit.pull(min(size, self.n - drawn))
                    draws = [Draw(model=name) for name in names]
                drawn += len(draws)
                some = await ctx.sample_many(problem, draws)
                candidates += some
                for one, verdict in zip(some, await ctx.verify(problem, some), strict=True):
                    scores[one.index] = verdict.score
                    if bandit is not None and one.model is not None:
                        bandit.tell(one.model, verdict.score)
        except BudgetSpent:
            pass
        except NoCandidate:  # the budget had none for this round
            if not candidates:
                raise
        if self.select != "soft":
            return await elect(problem, ctx, candidates, scores, self.select)
        worth = softened(scores, self.softness or 0.1, seed=problem.seed)
        return await ctx.choose(problem, _ranked(candidates, worth), scores=scores)


def softened(scores: Mapping[int, float], softness: float, seed: int | None) -> dict[int, float]:
    """Worths by index, of which the largest is that of a draw by exp(score / softness).

    The order of all is that of draws without putting back (the Gumbel trick).
    """
    rng = random.Random(seed)
    return {
        index: scores[index] / softness - log(-log(rng.random() or 0.5)) for index in sorted(scores)
    }


async def elect(
    problem: Problem,
    ctx: Context,
    candidates: Sequence[Candidate],
    scores: Mapping[int, float],
    select: Select,
    *,
    decided: bool = False,
) -> Outcome:
    """End the run by scores, which are by index; `candidates` come in the order that breaks ties.

    What nobody judged has no vote, and wins only if nothing that ended as it did was judged.
    """
    ranked = _ranked(candidates, scores)
    if select == "max":
        return await ctx.choose(problem, ranked, decided=decided, scores=scores)
    order = {candidate.index: at for at, candidate in enumerate(candidates)}
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
    best_first = sorted(ranked, key=lambda one: tally.rank(voted.get(one.index)))
    return await ctx.choose(problem, best_first, decided=decided, scores=scores, votes=tally.votes)


def _ranked(candidates: Sequence[Candidate], worth: Mapping[int, float]) -> list[Candidate]:
    """Best first: what ended by itself, then what was judged, then what is worth more."""

    def badness(one: Candidate) -> tuple[float, ...]:
        score = worth.get(one.index)
        return (not one.complete, score is None, -(score or 0.0))

    return sorted(candidates, key=badness)
