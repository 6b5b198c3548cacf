"""Compute-optimal: look how hard a problem is, and spend where a token buys most."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from strategies.beam_search import BeamSearch
from strategies.core.calibration import Ballot, Calibration, Outlook, Plan, outlook, plan, votes
from strategies.core.context import Context, Draw
from strategies.core.errors import BudgetSpent, MullError, NoCandidate
from strategies.core.events import Planned
from strategies.core.market import Bidder, Offer, Probe
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem
from strategies.self_consistency import SelfConsistency
from strategies.self_refine import SelfRefine
from strategies.tree_of_thoughts import TreeOfThoughts

SEARCH: TypeAdapter[BeamSearch | TreeOfThoughts | SelfRefine] = TypeAdapter(
    BeamSearch | TreeOfThoughts | SelfRefine
)
"""The searches that a calibration may name."""

_USUAL = 16
"""Samples whose price holds where no budget says another."""

_AT_MOST = 3
"""A search that is granted tokens has this many times what it takes in the mean."""


class ComputeOptimal(Strategy, frozen=True):
    """Draw a few samples, estimate how hard the problem is, and go on while it pays.

    What `mull calibrate` has learned of this model says, after 1, 2, 3, 4, 6 … samples, how likely
    it is that the leading answer is right, how likely the problem is of each bin of difficulty, and
    what each option (more samples, a search) would gain and cost. An option is taken if it gains
    more P(right) than its tokens are worth; their price is what accuracy costs at the end of the
    budget, or of `mean_tokens`, with a fixed number of samples. With `target_confidence`, it goes
    on until that is reached. All samples and what a search finds vote together. The plan stands in
    the reply.

    In a batch there is no such price: an option is taken when no other prompt's gains more per
    token of what is left of the batch's budget.

    Without a calibration of this model, verifier and temperature: self-consistency of up to 16
    samples, ended when the Beta posterior of the two leading answers is 0.95 sure; the reply says
    so.
    """

    cost: ClassVar[str] = "as much as pays: from the probe to all of the budget"
    paper: ClassVar[str] = (
        "Snell et al. 2024, Scaling LLM Test-Time Compute Optimally, arXiv:2408.03314; "
        "Damani et al. 2024, Learning How Hard to Think, arXiv:2410.04707"
    )

    kind: Literal["compute_optimal"] = "compute_optimal"
    n: int = Field(default=64, ge=1, le=256, description="Samples at most.")
    verifier: VerifierChoice | None = Field(
        default=None, description="Who judges the samples; unset: as calibrated."
    )
    mean_tokens: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Tokens that a problem is to take on average over many; some take far more. "
        "Unset: the budget, which bounds each.",
    )
    target_confidence: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Go on until the answer is right with this probability, whatever it costs.",
    )
    min_confidence: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Below this probability the reply says that it abstained.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (
            self.target_confidence is not None
            and self.min_confidence is not None
            and self.min_confidence > self.target_confidence
        ):
            raise ValueError("'min_confidence' is above 'target_confidence'")
        return self

    def most(self) -> int:
        """All its samples."""
        return self.n

    def judged_by(self) -> VerifierChoice | None:
        """The verifier of the samples, if it is named."""
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Probe, plan, spend, until nothing more pays."""
        if ctx.calibration is None:
            why = "no calibration of this model, verifier and temperature: "
            why += "votes until 0.95 sure, 16 at most"
            ctx.emit(Planned(samples=0, option=str(min(self.n, _USUAL)), why=why))
            if ctx.verifier is not None:
                raise MullError("a verifier needs a calibration")  # the server sees to that
            usual = SelfConsistency(
                n=min(self.n, _USUAL), early_stop="confidence", answer=self.answer
            )
            return await usual.solve(problem, ctx)
        return await _Search(self, problem, ctx, ctx.calibration, ctx.bidder).run()


class _Search:
    """One run: what there is so far, and what it looks like."""

    def __init__(
        self,
        strategy: ComputeOptimal,
        problem: Problem,
        ctx: Context,
        calibration: Calibration,
        bidder: Bidder | None,
    ) -> None:
        self._strategy = strategy
        self._problem = problem
        self._ctx = ctx
        self._calibration = calibration
        self._bidder = bidder
        self._candidates: list[Candidate] = []
        self._scores: dict[int, float] = {}
        self._answers: list[str] = []
        self._places: dict[int, int] = {}
        """By candidate, which of the answers it gives."""
        budget = ctx.budget
        tokens = strategy.mean_tokens or budget.left
        if tokens is None and budget.samples_left is not None:
            tokens = budget.samples_left * self._per_sample()
        if tokens is None:
            tokens = _USUAL * self._per_sample()
        self._drawn_as = Draw(likeliest=0 if calibration.reads_likelihood else None)
        self._price = calibration.price(tokens) if bidder is None else 0.0

    async def run(self) -> Outcome:
        """To the end."""
        strategy, ctx = self._strategy, self._ctx
        wanted = min(self._calibration.stages[0].samples, strategy.n)
        if self._bidder is not None:
            most = self._dearest(1)
            probe = Probe(samples=wanted, tokens=self._per_sample(), most=most)
            wanted, ctx.budget = await self._bidder.probe(probe)
        while True:
            short = not await self._draw(wanted - len(self._candidates))
            decision = await self._decided(over=short)
            if decision.option is None:
                break
            if not decision.option.isdigit():
                short = not await self._search(decision.option)
                decision = self._planned(over=True)
                break
            wanted = self._calibration.advanced(wanted, int(decision.option))
        counted = votes(self._ballots(), self._calibration.rule)
        order = {place: at for at, place in enumerate(sorted(counted, key=lambda p: -counted[p]))}

        def badness(one: Candidate) -> tuple[float, ...]:
            """Of the leading answer first; then what ended by itself and scored best."""
            rank = order.get(self._places.get(one.index, -1), len(order))
            return (rank, not one.complete, -(self._scores.get(one.index) or 0.0), one.index)

        sure, least = decision.confidence, strategy.min_confidence
        return await ctx.choose(
            self._problem,
            sorted(self._candidates, key=badness),
            decided=not short and ctx.short is None,
            scores=self._scores,
            votes={self._answers[place]: weight for place, weight in counted.items()},
            confidence=sure,
            abstained=least is not None and (sure is None or sure < least),
        )

    async def _draw(self, n: int) -> bool:
        """Add so many samples; whether all could be had and judged."""
        if n <= 0:
            return True
        try:
            drawn = await self._ctx.sample_many(self._problem, [self._drawn_as] * n)
        except NoCandidate:
            if self._candidates:
                return False
            raise
        return await self._add(drawn) and len(drawn) == n

    async def _add(self, drawn: Sequence[Candidate]) -> bool:
        """Judge and place what came; False if the budget ended before it was judged."""
        self._candidates += drawn
        for one in drawn:
            if one.answer is not None and one.complete:
                place = await self._ctx.place(one.answer, self._answers)
                if place is None:
                    place = len(self._answers)
                    self._answers.append(one.answer)
                self._places[one.index] = place
        fresh = [one for one in drawn if one.index not in self._scores]
        if self._ctx.verifier is None or not fresh:
            return True
        try:
            verdicts = await self._ctx.verify(self._problem, fresh)
        except BudgetSpent:
            return False
        self._scores |= {
            one.index: verdict.score for one, verdict in zip(fresh, verdicts, strict=True)
        }
        return True

    async def _search(self, name: str) -> bool:
        """A search by the calibration's name; what it ends with votes with the samples.

        Whether the budget let it come to its end.
        """
        search = SEARCH.validate_python(
            self._calibration.searches[name]
            | {"verifier": self._calibration.verifier, "answer": self._strategy.answer}
        )
        try:
            outcome = await search.solve(self._problem, self._ctx.inner())
        except (NoCandidate, BudgetSpent):
            return False
        self._scores |= outcome.scores
        judged = await self._add(outcome.candidates)
        return judged and outcome.stopped not in ("exhausted", "deadline")

    async def _decided(self, *, over: bool) -> Plan:
        """What to do next, if those who share the budget leave it to this prompt."""
        bidder, ctx, goal = self._bidder, self._ctx, self._strategy.target_confidence
        if bidder is None or over or not (ballots := self._ballots()):
            return self._planned(over=over)
        first = min(self._calibration.stages[0].samples, self._strategy.n)
        if len(ballots) < first:
            return await self._completed(bidder, first)
        seen = outlook(
            self._calibration,
            ballots,
            prompt_tokens=len(self._problem.token_ids),
            most=self._strategy.n,
        )
        enough = goal is not None and seen.confidence >= goal
        offers = [] if enough else self._offers(seen)
        granted = await bidder.step(offers)
        decision = Plan(None, seen.confidence, seen.posterior)
        if granted is not None:
            grant, ctx.budget = granted
            gain, tokens = next((g, t) for name, g, t in seen.options if name == grant.option)
            decision = Plan(grant.option, seen.confidence, seen.posterior, gain, tokens)
            why = "no other prompt gains more for its tokens"
        elif offers:
            why = self._turned_away()
        else:
            why = "as sure as asked for" if enough else "nothing gains anything"
        self._record(decision, why)
        return decision

    async def _completed(self, bidder: Bidder, first: int) -> Plan:
        """Go on to as many samples as something is known of; so far, nobody knows how sure it is.

        They gain what a fixed number of samples would.
        """
        have, each = len(self._candidates), self._per_sample()
        more, tokens = first - have, (first - have) * each
        offer = Offer(
            option=str(first),
            gain=max(1e-9, tokens * self._calibration.price(have * each)),
            tokens=tokens,
            step=tokens,
            most=self._dearest(more),
            samples=more,
        )
        granted = await bidder.step([offer])
        if granted is None:
            self._ctx.emit(Planned(samples=have, option=None, why=self._turned_away()))
            return Plan(None, None, ())
        self._ctx.budget = granted[1]
        why = "too few samples to say anything"
        self._ctx.emit(Planned(samples=have, option=offer.option, why=why))
        return Plan(offer.option, None, (), offer.gain, tokens)

    def _turned_away(self) -> str:
        """Remember that there was more to gain, and say why it was not to be."""
        seconds = self._ctx.budget.seconds_left
        if seconds is not None and seconds <= 0:
            self._ctx.fell_short("deadline")
            return "the time is over"
        self._ctx.fell_short("exhausted")
        return "what is left gains more with other prompts"

    def _offers(self, seen: Outlook) -> list[Offer]:
        """What would gain something, with what it costs until the samples are looked at again."""
        have, offers = len(self._candidates), list[Offer]()
        for option, gain, tokens in seen.options:
            if gain <= 0:
                continue
            step, most, more = tokens, int(_AT_MOST * tokens) + 1, 0
            if option.isdigit():
                more = self._calibration.advanced(have, int(option)) - have
                step = tokens * more / max(1, int(option) - have)
                most = self._dearest(more)
            offers.append(
                Offer(option=option, gain=gain, tokens=tokens, step=step, most=most, samples=more)
            )
        return offers

    def _dearest(self, samples: int) -> int:
        """Tokens that samples may take at most, those set aside for judging them included."""
        room = self._problem.max_tokens
        return samples * (room + self._ctx.aside(room))

    def _planned(self, *, over: bool) -> Plan:
        """What to do next; nothing if it is over. It goes on record."""
        budget, strategy = self._ctx.budget, self._strategy
        most = strategy.n
        if budget.samples_left is not None:
            most = min(most, len(self._candidates) + budget.samples_left)
        late = budget.seconds_left is not None and budget.seconds_left <= 0
        if not (ballots := self._ballots()):
            why = "the budget ended before anything was judged"
            self._ctx.emit(Planned(samples=len(self._candidates), option=None, why=why))
            return Plan(None, None, ())

        def best(left: float | None, most: int) -> Plan:
            return plan(
                self._calibration,
                ballots,
                prompt_tokens=len(self._problem.token_ids),
                price=self._price,
                left=left,
                most=most,
                wanted=strategy.target_confidence,
            )

        decision = best(0.0 if over or late else budget.left, most)
        goal = strategy.target_confidence
        if decision.option is not None:
            why = "it gains more than its tokens are worth" if goal is None else "not sure enough"
        elif goal is not None and decision.confidence is not None and decision.confidence >= goal:
            why = "as sure as asked for"
        elif over or best(None, strategy.n).option is None:
            why = "nothing more can be had" if over else "nothing gains what it would cost"
        else:
            why = "nothing more can be had"
            fits = best(None, most).option is not None  # into the samples that are left
            self._ctx.fell_short("deadline" if late else "exhausted" if fits else "samples")
        self._record(decision, why)
        return decision

    def _record(self, decision: Plan, why: str) -> None:
        self._ctx.emit(
            Planned(
                samples=len(self._candidates),
                option=decision.option,
                why=why,
                confidence=decision.confidence,
                posterior=decision.posterior,
                gain=decision.gain,
                tokens=decision.tokens,
                price=decision.price,
            )
        )

    def _ballots(self) -> list[Ballot]:
        """What nobody judged, where there is a judge, has no vote: a missing score is no number."""
        judged = self._ctx.verifier is not None
        return [
            Ballot(
                self._places.get(one.index),
                self._scores.get(one.index),
                len(one.token_ids),
                one.likelihood,
            )
            for one in self._candidates
            if not judged or one.index in self._scores
        ]

    def _per_sample(self) -> float:
        """Tokens of a sample, the verifier's included, in the mean."""
        return self._calibration.fixed[0][0]
