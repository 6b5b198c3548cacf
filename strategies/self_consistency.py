"""Self-consistency: sample, and return what most samples agree on (Wang et al. 2023)."""

from typing import ClassVar, Literal, Self, TypedDict

from pydantic import Field, model_validator

from strategies.core.context import Context
from strategies.core.errors import BudgetSpent
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem
from strategies.core.vote import (
    StopRule,
    Tally,
    decided,
    fewest_to_decide,
    likely_to_decide,
    majority_confidence,
    unassailable,
)


class _Bounds(TypedDict):
    confidence: float
    window: int


class SelfConsistency(Strategy, frozen=True):
    """Draw up to `n` samples and vote over equivalent answers.

    A vote may stop early: when the lead cannot be overtaken (`unassailable`, the same winner as the
    full vote), when the Beta posterior of the two leading answers is sure enough (`confidence`,
    Adaptive-Consistency, Aggarwal et al. 2023), or when a whole window of samples agrees (`window`,
    Early-Stopping Self-Consistency, Li et al. 2024). Samples start only as needed unless `start` is
    `all`; those still running when the vote is decided are aborted. The last two rules count
    samples in the order of their index, so that the same seed stops at the same place whatever
    arrives first.

    Ties go to the answer with the earliest sample; the earliest complete sample of the winning
    answer is returned.
    """

    cost: ClassVar[str] = "at most n samples; fewer when the vote is decided early"
    paper: ClassVar[str] = (
        "Wang et al. 2023, Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171; "
        "early stops: Aggarwal et al. 2023, arXiv:2305.11860; Li et al. 2024, arXiv:2401.10480"
    )

    kind: Literal["self_consistency"] = "self_consistency"
    n: int = Field(default=16, ge=1, le=256, description="Samples to draw at most.")
    weight: Literal["none", "confidence", "verifier"] = Field(
        default="none",
        description="One vote a sample, or weighted by its mean token probability or a verifier.",
    )
    verifier: VerifierChoice | None = Field(
        default=None,
        description="Who weighs the votes; required for, and only for, weight `verifier`.",
    )
    early_stop: StopRule = Field(
        default="unassailable", description="When the vote may end before its last sample."
    )
    confidence: float | None = Field(
        default=None, gt=0.5, lt=1.0, description="For early_stop `confidence`, where it is 0.95."
    )
    window: int | None = Field(
        default=None,
        ge=2,
        le=64,
        description="Samples that must agree, for early_stop `window`, where it is 4.",
    )
    start: Literal["as_needed", "all"] = Field(
        default="as_needed",
        description="Start what could decide the vote (fewest tokens), or all at once (soonest).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.weight == "verifier") != (self.verifier is not None):
            raise ValueError("'verifier' and weight 'verifier' go together")
        for rule in ("confidence", "window"):
            if getattr(self, rule) is not None and self.early_stop != rule:
                raise ValueError(f"'{rule}' needs early_stop '{rule}'")
        if self.weight != "none" and self.early_stop == "confidence":
            raise ValueError("early_stop 'confidence' counts whole votes; choose weight 'none'")
        return self

    def most(self) -> int:
        """All its samples."""
        return self.n

    def judged_by(self) -> VerifierChoice | None:
        """The verifier that weighs the votes, if any."""
        if self.weight == "confidence":
            return VerifierChoice.model_validate({"kind": "likelihood", "over": "mean"})
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Start samples, count them as they come, stop when the vote is over."""
        tally = Tally()
        candidates: list[Candidate] = []
        voted: dict[int, str] = {}
        scores: dict[int, float] = {}
        held: dict[int, Candidate] = {}
        in_order = self.early_stop in ("confidence", "window")
        committed = over = False
        if self.n == 1:
            committed = True
            ctx.commit(0)

        def badness(one: Candidate) -> tuple[int, bool, int]:
            return (tally.rank(voted.get(one.index)), not one.complete, one.index)

        first = self.n if self.start == "all" else self._wanted(tally, 0)
        async with ctx.sampling(problem, first) as arrivals:
            while True:
                arrived = await anext(arrivals, None)
                if arrived is not None:
                    held[arrived.index] = arrived
                while held and not over:
                    index = len(tally.recent) if in_order else next(iter(held))
                    if index not in held:
                        if arrivals.pending:
                            break
                        index = min(held)  # an earlier one was cut before its first token
                    candidate = held.pop(index)
                    candidates.append(candidate)
                    weight = 1.0
                    if self.weight != "none":
                        try:
                            [verdict] = await ctx.verify(problem, [candidate])
                        except BudgetSpent:  # what nobody judged has no vote
                            tally.blank()
                            continue
                        weight = scores[index] = verdict.score
                    if candidate.answer is None:
                        tally.blank()
                    else:
                        place = await ctx.place(candidate.answer, tally.answers)
                        voted[index] = tally.count(place, candidate.answer, weight, index)
                        ctx.vote(candidate, voted[index], weight)
                    left = self.n - len(tally.recent)
                    over = decided(self.early_stop, tally, left, **self._bounds())
                    best = min(candidates, key=badness)
                    # What still runs could only replace the winner by an earlier sample.
                    settled = best.complete and best.index < arrivals.earliest
                    if not committed and (over or (settled and unassailable(*tally.lead, left))):
                        committed = True
                        ctx.commit(best.index)
                if over or arrived is None:
                    break
                missing = self._wanted(tally, arrivals.pending + len(held))
                if self.start == "as_needed" and missing > 0:
                    arrivals.start(missing)
        candidates += held.values()
        first_two = [int(weight) for weight in tally.lead]
        return await ctx.choose(
            problem,
            sorted(candidates, key=badness),
            decided=over,
            scores=scores,
            votes=tally.votes,
            confidence=majority_confidence(*first_two)
            if tally.answers and self.weight == "none"
            else None,
        )

    def _wanted(self, tally: Tally, coming: int) -> int:
        """How many more to start so that the vote could be decided, with `coming` on their way.

        As soon as most of them are in, what they say is how the others will vote.
        """
        left = self.n - len(tally.recent)
        rule = likely_to_decide if len(tally.recent) >= coming else fewest_to_decide
        return rule(self.early_stop, tally, left, **self._bounds()) - coming

    def _bounds(self) -> _Bounds:
        return {"confidence": self.confidence or 0.95, "window": self.window or 4}
