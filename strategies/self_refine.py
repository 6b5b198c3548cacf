"""Self-refine: let the model revise its own answers (Madaan et al. 2023)."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from strategies.best_of_n import Select, elect
from strategies.core.context import Context, Draw
from strategies.core.errors import BudgetSpent, InvalidRequest, NoCandidate
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem, Turn
from strategies.core.vote import Tally, unassailable

REVISE = """Check your answer step by step. If anything in it is wrong, find the mistake and \
correct it; if it is right, keep it. Then write the whole solution again, with its final answer."""


class SelfRefine(Strategy, frozen=True):
    """Draw `parallel` answers and revise each, until there are `n` answers in all.

    `n` over `parallel` is the ratio of sequential to parallel compute (Snell et al. 2024). A
    revision is a new answer after two more turns of the same conversation: the answer so far, and
    `revise_prompt`.

    With a verifier, a revision takes the place of what it revises only if it scores higher, or
    ended by itself where that one did not; it ends early when an answer that ended by itself scores
    `accept_at`; of all answers `select` takes one, ties going to the earliest. `likelihood` is a
    poor judge here: having read an answer, the model finds its copy likely. Without a verifier,
    each revision takes the place of what it revises, and all answers vote until the lead cannot be
    overtaken; ties go to the answer given last, and the last sample of an answer is returned, so
    that where nothing can be voted on it is the last revision.
    """

    cost: ClassVar[str] = (
        "at most n samples, in rounds of parallel, each judged once if there is a verifier; "
        "a revision also reads the answer that it revises"
    )
    paper: ClassVar[str] = (
        "Madaan et al. 2023, Self-Refine: Iterative Refinement with Self-Feedback, "
        "arXiv:2303.17651; Snell et al. 2024, arXiv:2408.03314"
    )
    rereads: ClassVar[bool] = True

    kind: Literal["self_refine"] = "self_refine"
    n: int = Field(default=8, ge=1, le=256, description="Answers in all, first ones included.")
    parallel: int = Field(
        default=2, ge=1, le=256, description="Answers that are revised side by side; `n` at most."
    )
    verifier: VerifierChoice | None = Field(
        default=None, description="Who says whether a revision is better; none: each is taken."
    )
    select: Select | None = Field(
        default=None,
        description="With a verifier: best score, where it is `max`, or score-weighted vote.",
    )
    accept_at: float | None = Field(
        default=None, ge=0, le=1, description="With a verifier: the score that ends it."
    )
    revise_prompt: str = Field(
        default=REVISE, min_length=1, max_length=8000, description="Asks for a revision."
    )
    shown_tokens: int = Field(
        default=4096,
        ge=1,
        le=32_768,
        description="Of an answer, as many of its last tokens are shown to be revised.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("select", "accept_at"):
            if getattr(self, name) is not None and self.verifier is None:
                raise ValueError(f"'{name}' needs a 'verifier'")
        return self

    def most(self) -> int:
        """All its answers."""
        return self.n

    def judged_by(self) -> VerifierChoice | None:
        """The verifier of every answer, if any."""
        return self.verifier

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Draw the first answers, then revise what each chain holds, round by round."""
        if self.n == 1:
            ctx.commit(0)
        chains = min(self.parallel, self.n)
        talk = None
        if chains < self.n:
            talk = await _Conversation.begun(problem, ctx, self.revise_prompt)
        opinion = _Vote(ctx) if self.verifier is None else _Judgement(self, problem, ctx)
        candidates: list[Candidate] = []
        held: dict[int, Candidate] = {}
        reads: dict[int, tuple[int, ...] | None] = dict.fromkeys(range(chains))
        """By chain, the prompt of its next answer; None is the problem's."""
        over = False
        async with ctx.sampling(problem, 0) as drawing:
            try:
                for first in range(0, self.n, chains):
                    draws = [Draw(place=first + at, prompt=prompt) for at, prompt in reads.items()]
                    drawn = zip(reads, await drawing.finish(draws), strict=True)
                    found = {chain: one for chain, one in drawn if one is not None}
                    candidates += found.values()
                    if not found:
                        break
                    await opinion.hear(list(found.values()))
                    for chain, one in found.items():
                        if chain not in held or opinion.prefers(one, held[chain]):
                            held[chain] = one
                    left = self.n - first - chains
                    if left <= 0 or talk is None:
                        break
                    if over := opinion.settled(left):
                        break
                    reads = {
                        chain: prompt
                        for chain, one in sorted(held.items())[:left]
                        if (prompt := await talk.after(await self._shown(one, ctx))) is not None
                    }
            except BudgetSpent:
                pass
        if not candidates:
            raise NoCandidate("the budget ran out before the first answer had a single token")
        return await opinion.choose(problem, candidates, decided=over)

    async def _shown(self, one: Candidate, ctx: Context) -> str:
        """An answer in words, or its end."""
        if len(one.token_ids) <= self.shown_tokens:
            return one.text
        return await ctx.engine.decode(one.token_ids[-self.shown_tokens :])


class _Judgement:
    """What a verifier thinks of the answers."""

    def __init__(self, strategy: SelfRefine, problem: Problem, ctx: Context) -> None:
        self._strategy = strategy
        self._problem = problem
        self._ctx = ctx
        self._scores: dict[int, float] = {}
        self._best = -1.0
        """Of those that ended by themselves."""

    async def hear(self, answers: Sequence[Candidate]) -> None:
        """Have these judged."""
        verdicts = await self._ctx.verify(self._problem, answers)
        for one, verdict in zip(answers, verdicts, strict=True):
            self._scores[one.index] = verdict.score
            if one.complete:
                self._best = max(self._best, verdict.score)

    def prefers(self, revision: Candidate, before: Candidate) -> bool:
        """Whether a revision is better than what it revises."""
        new, old = ((one.complete, self._scores[one.index]) for one in (revision, before))
        return new > old

    def settled(self, left: int) -> bool:
        """Whether one is good enough."""
        return self._strategy.accept_at is not None and self._best >= self._strategy.accept_at

    async def choose(
        self, problem: Problem, answers: Sequence[Candidate], *, decided: bool
    ) -> Outcome:
        """End the run by scores."""
        select = self._strategy.select or "max"
        return await elect(problem, self._ctx, answers, self._scores, select, decided=decided)


class _Vote:
    """What most answers say."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._tally = Tally()
        self._voted: dict[int, str] = {}

    async def hear(self, answers: Sequence[Candidate]) -> None:
        """Count these; of answers with as many votes, the one that is given later leads."""
        for one in answers:
            if one.answer is not None:
                place = await self._ctx.place(one.answer, self._tally.answers)
                counted = self._tally.count(place, one.answer, 1.0, -one.index)
                self._voted[one.index] = counted
                self._ctx.vote(one, counted, 1.0)

    def prefers(self, revision: Candidate, before: Candidate) -> bool:
        """A revision has the last word."""
        return True

    def settled(self, left: int) -> bool:
        """Whether the lead cannot be overtaken."""
        return unassailable(*self._tally.lead, left)

    async def choose(
        self, problem: Problem, answers: Sequence[Candidate], *, decided: bool
    ) -> Outcome:
        """End the run by votes; the last sample of an answer stands for it."""

        def badness(one: Candidate) -> tuple[int, bool, int]:
            return (self._tally.rank(self._voted.get(one.index)), not one.complete, -one.index)

        return await self._ctx.choose(
            problem, sorted(answers, key=badness), decided=decided, votes=self._tally.votes
        )


class _Conversation:
    """The client's conversation, to be continued by two turns: an answer, and what is said to it.

    By tokens, so that all that shaped the client's prompt stays as it is (system messages, tools,
    earlier turns), in the prefix cache, too. What two turns add is read off another conversation.
    """

    def __init__(
        self, problem: Problem, ctx: Context, words: str, begin: tuple[int, ...], opening: int
    ) -> None:
        self._problem = problem
        self._ctx = ctx
        self._words = words
        self._begin = begin
        self._opening = opening
        """How many tokens the template puts between a question and its answer."""

    @classmethod
    async def begun(cls, problem: Problem, ctx: Context, words: str) -> Self:
        """The conversation in which `words` follow every answer.

        Raises:
            InvalidRequest: The model cannot read it on.
        """
        begin, other = [await ctx.engine.render((_said("user", one),)) for one in ("0", "1")]
        opening = _alike(begin[::-1], other[::-1])
        ids = problem.token_ids
        if ids[len(ids) - opening :] != begin[len(begin) - opening :]:
            raise InvalidRequest(
                "the prompt does not end where the model's template lets it answer, so no turn can "
                "follow the answer",
                field="messages",
            )
        talk = cls(problem, ctx, words, begin, opening)
        if await talk.after("0") is None:
            raise InvalidRequest(
                "with an answer and 'revise_prompt' after it, the conversation is too long for the "
                "model, or its template tells it otherwise from the beginning",
                field="messages",
            )
        return talk

    async def after(self, answer: str) -> tuple[int, ...] | None:
        """The prompt for what follows this answer; None if the model cannot read so much."""
        turns = (_said("user", "0"), _said("assistant", answer.strip()), _said("user", self._words))
        try:
            longer = await self._ctx.engine.render(turns)
            same = _alike(self._begin, longer)
            otherwise = len(self._begin) - same
            ids = self._problem.token_ids
            whole = ids[: len(ids) - otherwise] + longer[same:]
            if otherwise <= self._opening and len(whole) < self._ctx.engine.longest:
                return whole
        except InvalidRequest:  # it alone is too long
            pass
        self._ctx.fell_short("exhausted")
        return None


def _said(role: Literal["user", "assistant"], content: str) -> Turn:
    return Turn(role=role, content=content)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
