"""What a strategy may do: sample, verify, vote, commit.

It keeps the budget, the deadline and the trace honest.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol, Self

from strategies.core.aio import Arrivals
from strategies.core.answers import AnswerFormat, Answers
from strategies.core.budget import Budget, Lease
from strategies.core.engine import Engine
from strategies.core.errors import NoCandidate, VerifierFailed
from strategies.core.events import (
    Aborted,
    Chosen,
    Committed,
    Event,
    Grown,
    Noted,
    Sampled,
    Scored,
    Started,
    Voted,
)
from strategies.core.sandbox import Sandbox
from strategies.core.types import (
    Candidate,
    Chunk,
    FinishReason,
    Generation,
    Outcome,
    Problem,
    StopReason,
    Verdict,
)


class Verifier(Protocol):
    """Judges candidates: a rule, a likelihood, an adapter or a reward model."""

    @property
    def kind(self) -> str:
        """Its name in requests."""
        ...

    @property
    def logprobs(self) -> int | None:
        """The log-probabilities that it needs of each sample, as in `Generation.logprobs`."""
        ...

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> Sequence[Verdict]:
        """One verdict per candidate, in order.

        Whatever it generates, it reserves from `ctx.budget`.

        Raises:
            VerifierFailed: It has no opinion; there are no neutral scores.
        """
        ...


class Context:
    """One run's hands: the engine, the budget, the answers and the ear that hears every event."""

    def __init__(
        self,
        *,
        engine: Engine,
        budget: Budget,
        answers: Answers,
        sandbox: Sandbox,
        emit: Callable[[Event], None],
        verifier: Verifier | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> None:
        self.engine = engine
        self.budget = budget
        self.answers = answers
        self.sandbox = sandbox
        self.emit = emit
        self.verifier = verifier
        self.answer_format = answer_format or AnswerFormat()
        self._next = 0
        self._short: StopReason | None = None

    def sampling(self, problem: Problem, n: int) -> "Sampling":
        """Start up to `n` samples; iterate over them as they finish.

        Leaving the block aborts the rest.
        """
        return Sampling(self, problem, n)

    async def sample_many(self, problem: Problem, n: int) -> list[Candidate]:
        """Up to `n` finished samples in the order of their index; fewer if the budget is short.

        Raises:
            NoCandidate: The budget ran out before one sample existed.
        """
        async with self.sampling(problem, n) as arrivals:
            candidates = [candidate async for candidate in arrivals]
        return sorted(candidates, key=lambda candidate: candidate.index)

    async def verify(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Verdict]:
        """The request's verifier on all candidates at once.

        Raises:
            VerifierFailed: There is no verifier, or it gave no opinion on some candidate.
        """
        if self.verifier is None:
            raise VerifierFailed("this strategy needs a verifier and none was chosen")
        verdicts = list(await self.verifier.judge(problem, candidates, self))
        if len(verdicts) != len(candidates):
            raise VerifierFailed(
                f"verifier '{self.verifier.kind}' gave {len(verdicts)} verdicts "
                f"on {len(candidates)} candidates"
            )
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            self.emit(Scored(index=candidate.index, score=verdict.score, tokens=verdict.tokens))
        return verdicts

    def vote(self, candidate: Candidate, answer: str, weight: float) -> None:
        """Put a vote on record."""
        self.emit(Voted(index=candidate.index, answer=answer, weight=weight))

    def commit(self, index: int) -> None:
        """Let the pieces of this sequence go to the client from now on: nothing else can win."""
        self.emit(Committed(index=index))

    def note(self, text: str) -> None:
        """Put a remark on record."""
        self.emit(Noted(level="info", text=text))

    def choose(
        self, best: Candidate, *, among: Sequence[Candidate], decided: bool = False, **details: Any
    ) -> Outcome:
        """End the run with `best`; `details` are further fields of `Outcome`."""
        stopped: StopReason = "decided" if decided else self._short or "samples"
        self.emit(Chosen(index=best.index, stopped=stopped))
        return Outcome(chosen=best, candidates=tuple(among), stopped=stopped, **details)

    def number(self) -> int:
        """The index of the next sequence of this run."""
        self._next += 1
        return self._next - 1

    def fell_short(self, reason: StopReason) -> None:
        """Remember why fewer samples than asked for could be had; the first reason stays."""
        self._short = self._short or reason


class Sampling:
    """Samples of one prompt, in flight together. An async context manager and an async iterator."""

    def __init__(self, ctx: Context, problem: Problem, n: int) -> None:
        self._ctx = ctx
        self._problem = problem
        self._n = n
        self._arrivals: Arrivals[Candidate | None] = Arrivals()
        self._leased: dict[int, Lease] = {}
        """Leases of samples whose task has not begun, and never will if it is cancelled first."""
        self._usable = 0

    async def __aenter__(self) -> Self:
        await self._arrivals.__aenter__()
        self.start(self._n)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._arrivals.__aexit__(kind, error, trace)
        finally:
            for index, lease in self._leased.items():
                lease.settle(0)
                self._ctx.emit(Aborted(index=index, tokens=0, prompt_tokens=0, cached_tokens=0))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Candidate:
        """The next finished sample.

        Raises:
            NoCandidate: All are in, and not one is usable.
        """
        try:
            while (candidate := await anext(self._arrivals)) is None:
                pass
        except StopAsyncIteration:
            if self._usable == 0:
                raise NoCandidate(
                    "the budget ran out before the first sample had a single token"
                ) from None
            raise
        self._usable += 1
        return candidate

    @property
    def pending(self) -> int:
        """Samples started and not yet iterated over."""
        return self._arrivals.pending

    def start(self, n: int) -> None:
        """Start up to `n` more samples, as many as the budget allows."""
        budget = self._ctx.budget
        if budget.seconds_left is not None and budget.seconds_left <= 0:
            n = 0
            self._ctx.fell_short("deadline")
        if budget.samples_left is not None:
            n = min(n, budget.samples_left)
        if n > 0 and budget.left is not None and budget.left < n:
            n = budget.left
            self._ctx.fell_short("exhausted")
        share = budget.share(n) if n > 0 else None
        for _ in range(n):
            allowed = (
                self._problem.max_tokens if share is None else min(self._problem.max_tokens, share)
            )
            lease = budget.reserve(allowed)
            if lease is None:
                break
            index = self._ctx.number()
            self._ctx.emit(Started(index=index, tokens=lease.tokens))
            self._leased[index] = lease
            self._arrivals.start(self._sample(index))

    async def _sample(self, index: int) -> Candidate | None:
        """One sequence from start to answer; what was spent is settled however it ends."""
        lease = self._leased.pop(index)
        ctx, problem = self._ctx, self._problem
        generation = Generation(
            index=index,
            token_ids=problem.token_ids,
            max_tokens=lease.tokens,
            seed=None if problem.seed is None else problem.seed + index,
            logprobs=None if ctx.verifier is None else ctx.verifier.logprobs,
        )
        sequence = _Sequence()
        candidate: Candidate | None = None
        try:
            await self._collect(generation, sequence)
            if sequence.finish_reason is not None:
                candidate = sequence.finished(
                    index,
                    sequence.finish_reason,
                    await ctx.answers.extract(sequence.text, ctx.answer_format),
                )
            return candidate
        finally:
            lease.settle(len(sequence.token_ids))
            if candidate is not None:
                if candidate.finish_reason == "length" and lease.tokens < problem.max_tokens:
                    ctx.fell_short("exhausted")
                ctx.emit(Sampled(candidate=candidate))
            else:
                ctx.emit(
                    Aborted(
                        index=index,
                        tokens=len(sequence.token_ids),
                        prompt_tokens=sequence.prompt_tokens,
                        cached_tokens=sequence.cached_tokens,
                    )
                )

    async def _collect(self, generation: Generation, sequence: "_Sequence") -> None:
        """Read the sequence to its end.

        One that the deadline cuts ends by length if it has any token.
        """
        ctx = self._ctx
        deadline = asyncio.timeout(ctx.budget.seconds_left)
        try:
            async with (
                deadline,
                aclosing(ctx.engine.generate(generation)) as chunks,
            ):
                async for chunk in chunks:
                    sequence.add(chunk)
                    ctx.emit(Grown(index=generation.index, chunk=chunk))
        except TimeoutError:
            if not deadline.expired():
                raise
            ctx.fell_short("deadline")
            if sequence.token_ids:
                sequence.finish_reason = sequence.finish_reason or "length"


class _Sequence:
    """What has arrived of one sequence."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.top_logprobs: list[tuple[float, ...]] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.pieces.extend(chunk.pieces)
        self.top_logprobs.extend(chunk.top_logprobs)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self.cached_tokens = chunk.cached_tokens or self.cached_tokens

    def finished(self, index: int, finish_reason: FinishReason, answer: str | None) -> Candidate:
        return Candidate(
            index=index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=finish_reason,
            answer=answer,
            logprobs=tuple(self.logprobs),
            pieces=tuple(self.pieces),
            top_logprobs=tuple(self.top_logprobs),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )
