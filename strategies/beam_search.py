"""Beam search: grow several solutions step by step, and spend on those that a verifier likes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from strategies.best_of_n import Select, elect
from strategies.core.context import Context, Draw, Sampling
from strategies.core.errors import BudgetSpent, NoCandidate
from strategies.core.hypotheses import Hypotheses, Hypothesis
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.tree import MOST_DRAWS, Allocate, Beam, Frontier
from strategies.core.types import Candidate, Combine, Outcome, Problem, Verdict, combined

WIDEST_BY_TOKEN = 10
"""It takes the `2 * width` likeliest tokens, and vLLM tells 20 unless it is told otherwise."""


class BeamSearch(Strategy, frozen=True):
    """Draw steps, score them, and go on with the promising ones, until `width` solutions ended.

    A round draws `width * branch` steps; those that say the same count once. `allocate` decides who
    grows: `top_k` the `width` best, each `branch` times (Snell et al. 2024); `diverse` the best of
    each of `width` subtrees (DVTS, Beeching et al. 2024); `balanced` all, in proportion to the
    softmax of their scores (REBASE, Wu et al. 2025); `resample` all, drawn again in proportion to
    the odds of their scores (particle filtering, Puri et al. 2025). A solution that ended among the
    best of its round takes its beam with it. `lookahead` judges a step by where it leads after so
    many further greedy steps. Each step is scored as soon as it is drawn, and subtrees do not wait
    for each other. A solution that a limit cut short wins only if no other ended by itself. Ties go
    to the earliest draw.

    Level `token` is the classic search for the likeliest answer (Graves 2012), without sampling and
    without a verifier, as `transformers` does it; of width 1, it is greedy decoding.
    """

    cost: ClassVar[str] = (
        "at most max_steps rounds of width * branch steps, each judged once; "
        "lookahead adds so many steps to each; level token: width tokens for each token"
    )
    paper: ClassVar[str] = (
        "Snell et al. 2024, Scaling LLM Test-Time Compute Optimally, arXiv:2408.03314; "
        "balanced: Wu et al. 2025, arXiv:2408.00724; resample: Puri et al. 2025, arXiv:2502.01618"
    )
    stepwise: ClassVar[bool] = True

    kind: Literal["beam_search"] = "beam_search"
    level: Literal["step", "token"] = Field(
        default="step", description="Whether beams grow by steps or by tokens."
    )
    width: int = Field(default=4, ge=1, le=64, description="Solutions that grow side by side.")
    branch: int = Field(default=4, ge=1, le=64, description="Steps drawn for each of them.")
    allocate: Allocate = Field(default="top_k", description="Who grows after each round.")
    verifier: VerifierChoice = Field(
        default=VerifierChoice(kind="likelihood"),
        description="Who judges each step: a kind from GET /v1/verifiers that judges steps.",
    )
    score: Combine = Field(
        default="min", description="How the scores of its steps make the score of a solution."
    )
    select: Select = Field(
        default="max", description="Best score, or score-weighted vote, of what has ended."
    )
    delimiter: str = Field(
        default="\n", min_length=1, max_length=32, description="Ends a step, and belongs to it."
    )
    max_step_tokens: int = Field(
        default=256, ge=1, le=32_768, description="Ends a step that has no delimiter so far."
    )
    max_steps: int = Field(default=64, ge=1, le=1024, description="Rounds at most.")
    lookahead: int = Field(default=0, ge=0, le=16, description="Greedy steps ahead of each score.")
    spread: float | None = Field(
        default=None,
        ge=0.001,
        le=100,
        description="Temperature of the softmax of `balanced`, where it is 0.1, and of the odds of "
        "`resample`, where it is 1.",
    )
    length_penalty: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="For level `token`, where it is 1: a hypothesis scores its log-probability "
        "over its length to this power.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, field in type(self).model_fields.items():
            if (
                self.level == "token"
                and name not in ("kind", "level", "answer", "width", "length_penalty")
                and getattr(self, name) != field.default
            ):
                raise ValueError(f"'{name}' is for level 'step'")
        if self.level == "step" and self.length_penalty is not None:
            raise ValueError("'length_penalty' needs level 'token'")
        if self.level == "token" and self.width > WIDEST_BY_TOKEN:
            raise ValueError(f"'width' may be {WIDEST_BY_TOKEN} at most with level 'token'")
        if self.level == "step" and self.width * self.branch > MOST_DRAWS:
            raise ValueError(f"'width' times 'branch' may be {MOST_DRAWS} at most")
        if self.spread is not None and self.allocate not in ("balanced", "resample"):
            raise ValueError("'spread' needs allocate 'balanced' or 'resample'")
        return self

    def most(self) -> int:
        """One answer of each beam."""
        return self.width

    def random(self) -> bool:
        """Over tokens, nothing is drawn."""
        return self.level == "step"

    def judged_by(self) -> VerifierChoice | None:
        """The verifier that scores every step."""
        return self.verifier if self.level == "step" else None

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Draw, judge, advance, until every frontier is done or the budget is."""
        if self.level == "token":
            return await self._by_token(problem, ctx)
        async with ctx.sampling(problem, 0) as drawing:
            search = _Search(self, problem, ctx, drawing)
            search.advance()
            try:
                while drawing.pending:
                    await search.judge(await search.arrivals())
                    search.advance()
            except BudgetSpent:
                pass
        beams = [beam for frontier in search.frontiers for beam in frontier.leaves()]
        scores = {beam.candidate.index: beam.score for beam in beams}
        found = sorted(
            [(beam.place, beam.candidate) for beam in beams] + search.unjudged(),
            key=lambda one: one[0],
        )
        if not found:
            raise NoCandidate("the budget ran out before the first step had a single token")
        return await elect(problem, ctx, [one for _, one in found], scores, self.select)

    async def _by_token(self, problem: Problem, ctx: Context) -> Outcome:
        """A round for each token: the likeliest ones after each hypothesis, all at once."""
        beams = Hypotheses(
            width=self.width,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            ends=ctx.engine.ends,
            longest=problem.max_tokens,
        )
        async with ctx.sampling(problem, 0) as drawing:
            while not beams.over:
                draws = [
                    Draw(
                        after=_before(one),
                        max_tokens=1,
                        place=at,
                        greedy=True,
                        likeliest=min(20, (1 + len(beams.ends)) * self.width),
                    )
                    for at, one in enumerate(beams.running)
                ]
                drawn = [one for one in await drawing.finish(draws) if one is not None]
                if len(drawn) < len(draws):
                    break  # the budget ran out within this round
                tokens = [
                    list(zip(one.top_token_ids[-1], one.top_logprobs[-1], strict=True))
                    for one in drawn
                ]
                beams.extend(tokens, [one.index for one in drawn])
        best = [*beams.finished, *beams.running]
        best.sort(key=lambda one: (one not in beams.finished, -beams.score(one)))
        if not best[0].token_ids:
            raise NoCandidate("the budget ran out before the first token")
        by_call: dict[int, Hypothesis] = {}
        for one in best:  # only `max_tokens` can end several with one call: then the best of them
            by_call.setdefault(one.origin or 0, one)
        return await ctx.choose(
            problem,
            [await self._whole(one, ctx) for one in by_call.values()],
            scores={call: beams.score(one) for call, one in by_call.items()},
        )

    async def _whole(self, one: Hypothesis, ctx: Context) -> Candidate:
        """A hypothesis as a candidate."""
        text = await ctx.engine.decode(one.token_ids)
        stopped = one.token_ids[-1] in ctx.engine.ends
        return Candidate(
            index=one.origin or 0,
            text=text,
            token_ids=one.token_ids,
            finish_reason="stop" if stopped else "length",
            answer=await ctx.answer(text, one.token_ids),
            inherited=len(one.token_ids) - 1,
            logprobs=one.logprobs,
        )


def _before(one: Hypothesis) -> Candidate | None:
    """What a hypothesis has so far, to go on with."""
    if one.origin is None:
        return None
    return Candidate(index=one.origin, text="", token_ids=one.token_ids, finish_reason="step")


@dataclass(frozen=True, slots=True)
class _Coming:
    """A sequence under way: one draw, or a look ahead of `beam`'s draw."""

    frontier: Frontier
    place: int
    of: Candidate | None = None
    """The draw that the look ahead is for."""
    ahead: int = 0
    """Steps to look ahead after this one."""


class _Search:
    """The frontiers of one run, and what is on its way to them."""

    def __init__(
        self, strategy: BeamSearch, problem: Problem, ctx: Context, drawing: Sampling
    ) -> None:
        self._strategy = strategy
        self._problem = problem
        self._ctx = ctx
        self._drawing = drawing
        self._coming: dict[int, _Coming] = {}
        """By index of the sequence."""
        self._at_judge: list[tuple[int, Candidate]] = []
        """What the verifier is judging, by place."""
        subtrees = strategy.width if strategy.allocate == "diverse" else 1
        width = strategy.width // subtrees
        spread = 0.1 if strategy.allocate == "balanced" else 1.0
        self.frontiers = [
            Frontier(
                allocate=strategy.allocate,
                width=width,
                branch=strategy.branch,
                temperature=strategy.spread or spread,
                seed=random.randrange(2**32) if problem.seed is None else problem.seed,
                first=at * width * strategy.branch,
                stride=subtrees,
            )
            for at in range(subtrees)
        ]
        self._open = list(self.frontiers)
        # What a budget allows is then the same, and fairly shared, whatever arrives first.
        budget = ctx.budget
        self._in_order = budget.samples_left is not None or budget.left is not None

    def unjudged(self) -> list[tuple[int, Candidate]]:
        """What was drawn and has no score yet, by place."""
        ahead = [(one.place, one.of) for one in self._coming.values() if one.of is not None]
        return self._at_judge + ahead

    async def arrivals(self) -> list[Candidate]:
        """What has been drawn by now; empty only if all that was under way was lost."""
        drawn = await self._drawing.some()
        while self._in_order and (more := await self._drawing.some()):
            drawn += more
        return sorted(drawn, key=lambda one: self._coming[one.index].place)

    def advance(self) -> None:
        """Start the next round of every frontier that has all of its last one."""
        under_way = [one for index, one in self._coming.items() if self._drawing.awaits(index)]
        waiting = {id(coming.frontier) for coming in under_way}
        ready = [one for one in self._open if id(one) not in waiting]
        growing = [one for one in ready if one.rounds < self._strategy.max_steps]
        wanted = [
            (frontier, self._draw(growth.beam and growth.beam.candidate, growth.place + at))
            for frontier in growing
            for growth in frontier.advance()
            for at in range(growth.times)
        ]
        started = self._drawing.start([draw for _, draw in wanted])  # together, to share alike
        for index, (frontier, draw) in zip(started, wanted, strict=False):
            self._coming[index] = _Coming(frontier, draw.place or 0)
        grown = {id(frontier) for frontier, _ in wanted[: len(started)]} | waiting
        self._open = [one for one in self._open if id(one) in grown]

    async def judge(self, drawn: Sequence[Candidate]) -> None:
        """Score what came, and put it into its frontier; or look ahead of it first."""
        judged: list[tuple[_Coming, Candidate, Candidate]] = []
        ahead: list[tuple[_Coming, Candidate, Candidate]] = []
        for candidate in drawn:
            coming = self._coming.pop(candidate.index)
            of = coming.of or candidate
            known = coming.frontier.known(of)
            if known is not None:
                beam = Beam(candidate=of, score=known.score, place=coming.place)
                coming.frontier.insert(beam)
            else:
                further = self._strategy.lookahead if coming.of is None else coming.ahead
                goes_on = further and candidate.finish_reason == "step"
                (ahead if goes_on else judged).append((coming, of, candidate))
        judged += self._look(ahead)
        if not judged:
            return
        seen = {candidate.token_ids: candidate for _, _, candidate in reversed(judged)}
        self._at_judge = [(coming.place, of) for coming, of, _ in judged]
        verdicts = await self._ctx.verify(self._problem, list(seen.values()))
        scores = dict(zip(seen, map(self._score, verdicts), strict=True))
        self._at_judge = []
        for coming, of, candidate in judged:
            score = scores[candidate.token_ids]
            coming.frontier.insert(Beam(candidate=of, score=score, place=coming.place))

    def _look(
        self, ahead: list[tuple["_Coming", Candidate, Candidate]]
    ) -> list[tuple["_Coming", Candidate, Candidate]]:
        """Start one more step ahead of each; those for which the budget has none left."""
        draws = [self._draw(candidate, coming.place, greedy=True) for coming, _, candidate in ahead]
        started = self._drawing.start(draws)
        for index, (coming, of, _) in zip(started, ahead, strict=False):
            left = (self._strategy.lookahead if coming.of is None else coming.ahead) - 1
            self._coming[index] = _Coming(coming.frontier, coming.place, of, left)
        return ahead[len(started) :]

    def _draw(self, after: Candidate | None, place: int, *, greedy: bool = False) -> Draw:
        return Draw(
            after=after,
            until=self._strategy.delimiter,
            max_tokens=self._strategy.max_step_tokens,
            place=place,
            greedy=greedy,
        )

    def _score(self, verdict: Verdict) -> float:
        return combined(verdict.steps or (verdict.score,), self._strategy.score)
