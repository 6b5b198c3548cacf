"""What a strategy may do: sample, verify, vote, commit.

It keeps the budget, the deadline and the trace honest.
"""

import asyncio
import time
from array import array
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from math import inf, isnan
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

from strategies.core.aio import Arrivals, Group, unbroken
from strategies.core.answers import AnswerFormat, Answers
from strategies.core.budget import Budget, Lease
from strategies.core.calibration import Calibration
from strategies.core.engine import Engine, Remote
from strategies.core.errors import BudgetSpent, InvalidRequest, NoCandidate, VerifierFailed
from strategies.core.events import (
    Aborted,
    Chosen,
    Committed,
    Consulted,
    Event,
    Grown,
    Proposed,
    Read,
    Sampled,
    Scored,
    Started,
    Verified,
    Voted,
)
from strategies.core.market import Bidder
from strategies.core.sandbox import Sandbox
from strategies.core.types import (
    Candidate,
    Chunk,
    FinishReason,
    Generation,
    Outcome,
    Problem,
    Reading,
    StopReason,
    Turn,
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

    @property
    def stepwise(self) -> bool:
        """Whether it judges each step, also of a solution that is not finished."""
        ...

    def aside(self, tokens: int) -> int:
        """How many of the tokens for a sample are to be set aside for judging it; fewer than all.

        Matters only to budgets that could run out.
        """
        ...

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> Sequence[Verdict]:
        """One verdict per candidate, in order.

        What it generates goes through `ctx.read`, which keeps to the budget.

        Raises:
            VerifierFailed: It has no opinion; there are no neutral scores.
            BudgetSpent: The tokens do not suffice for one.
        """
        ...


T = TypeVar("T")

Reader = Callable[[str, Sequence[int]], Reading]
"""Reads a sample's text and tokens as the server of its model will; without, tags in it do."""

MOST_APART = 64
"""Questions that one run's verifiers have in the engine at once."""

LATE_SECONDS = 0.2
"""How long after its deadline a run may still read, compare and judge what it has."""

GRACE_SECONDS = 1.0
"""How long an aborted sequence may take to say what it had generated, before it is cut off."""


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
        read: Reader | None = None,
        remote: Remote | None = None,
        calibration: Calibration | None = None,
        bidder: Bidder | None = None,
    ) -> None:
        """With a `bidder`, the run is one of a batch, and asks it for each budget."""
        self.engine = engine
        self.budget = budget
        self.answers = answers
        self.sandbox = sandbox
        self._remote = remote
        self.emit = emit
        self.verifier = verifier
        self.calibration = calibration
        self.bidder = bidder
        self.answer_format = answer_format or AnswerFormat()
        self._read = read
        self._read_so_far: dict[tuple[str, tuple[int, ...]], dict[bytes, tuple[float, ...]]] = {}
        """By adapter and labels, then by the digest of what was read."""
        self._numbers = count()
        self._apart = count(1)
        self._short: StopReason | None = None
        self._outer: Context | None = None

    def inner(self) -> "Context":
        """The same hands for a search that is a part of this one: what it chooses ends nothing.

        Where it falls short, this one has, too.
        """

        def emit(event: Event) -> None:
            if not isinstance(event, Chosen | Committed):
                self.emit(event)

        inner = copy(self)
        inner.emit = emit
        inner._short, inner._outer = None, self
        return inner

    def sampling(self, problem: Problem, n: "int | Sequence[Draw]") -> "Sampling":
        """Start up to `n` samples, or these; iterate over them as they finish.

        More may be started later, also such as go on with a candidate. Leaving the block aborts the
        rest.
        """
        return Sampling(self, problem, n)

    async def sample_many(self, problem: Problem, n: "int | Sequence[Draw]") -> list[Candidate]:
        """Up to `n` finished samples, or these, in order; fewer if the budget is short.

        Raises:
            NoCandidate: The budget ran out before one sample existed.
        """
        async with self.sampling(problem, n) as arrivals:
            candidates = [candidate async for candidate in arrivals]
        return sorted(candidates, key=lambda candidate: candidate.index)

    async def verify(
        self, problem: Problem, candidates: Sequence[Candidate], by: Verifier | None = None
    ) -> list[Verdict]:
        """The request's verifier, or this one, on all candidates at once.

        Raises:
            VerifierFailed: There is no verifier, or it gave no opinion on some candidate.
            BudgetSpent: The deadline passed, or the tokens ran out, before it had one: go without.
        """
        verifier = by or self.verifier
        if verifier is None:
            raise VerifierFailed("this strategy needs a verifier and none was chosen")
        began, done = time.monotonic(), False
        try:
            async with self._in_time("the verifier had an opinion"):
                verdicts = list(await verifier.judge(problem, candidates, self))
            done = True
        finally:
            self.emit(
                Verified(
                    verifier=verifier.kind,
                    candidates=len(candidates),
                    seconds=time.monotonic() - began,
                    done=done,
                )
            )
        if len(verdicts) != len(candidates):
            raise VerifierFailed(
                f"verifier '{verifier.kind}' gave {len(verdicts)} verdicts "
                f"on {len(candidates)} candidates"
            )
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            self.emit(Scored(index=candidate.index, score=verdict.score, steps=verdict.steps))
        return verdicts

    async def read(
        self,
        paths: Sequence[tuple[tuple[int, ...], Sequence[int]]],
        labels: tuple[int, ...],
        *,
        adapter: str,
    ) -> list[list[tuple[float, ...]]]:
        """How likely an adapter finds each label at places of token paths.

        A path comes with the lengths after which it is asked; for each there is a row of
        log-probabilities, in nats. Asked before what is being generated, at one token each; what
        the run has read before costs nothing.

        Raises:
            BudgetSpent: The tokens do not suffice.
        """
        known = self._read_so_far.setdefault((adapter, labels), {})
        keys = [[_digest(path[:length]) for length in lengths] for path, lengths in paths]

        def fresh() -> Iterator[tuple[Generation, Callable[[_Sequence], None]]]:
            begun: set[bytes] = set()
            for (path, lengths), of_it in zip(paths, keys, strict=True):
                for length, key in zip(lengths, of_it, strict=True):
                    if key not in known and key not in begun:
                        begun.add(key)
                        yield self._apart_from(path[:length], 1, adapter, labels=labels), heard(key)

        def heard(key: bytes) -> Callable[[_Sequence], None]:
            def hear(sequence: _Sequence) -> None:
                likely = sequence.label_logprobs
                if len(likely) != len(labels) or any(map(isnan, likely)):
                    raise VerifierFailed(f"'{adapter}' has no opinion: its labels have no numbers")
                known[key] = likely

            return hear

        await self._each(fresh())
        return [[known[key] for key in of_it] for of_it in keys]

    async def ask(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        choices: tuple[str, ...] = (),
        max_tokens: int,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """What the model says to each conversation, asked before what is being generated.

        The texts come in order; with `choices`, each is one of these. The i-th is drawn with
        `seed + i`.

        Raises:
            BudgetSpent: The tokens do not suffice, or a conversation is too long for the model.
        """
        said: dict[int, str] = {}

        def heard(at: int) -> Callable[[_Sequence], None]:
            def hear(sequence: _Sequence) -> None:
                said[at] = sequence.text

            return hear

        async with self._in_time("the model had said it"):
            prompts: dict[tuple[Turn, ...], tuple[int, ...]] = {}
            for turns in map(tuple, conversations):
                if turns not in prompts:
                    try:
                        prompts[turns] = await self.engine.render(turns)
                    except InvalidRequest as error:
                        self.fell_short("exhausted")
                        raise BudgetSpent(f"the model cannot be asked: {error}") from error
            await self._each(
                (
                    self._apart_from(
                        prompts[tuple(turns)],
                        max_tokens,
                        adapter,
                        choices=choices,
                        seed=None if seed is None else seed + at,
                    ),
                    heard(at),
                )
                for at, turns in enumerate(conversations)
            )
        return [said[at] for at in range(len(conversations))]

    async def consult(
        self, name: str, bodies: Sequence[Mapping[str, object]], *, max_tokens: int = 0
    ) -> list[dict[str, Any]]:
        """What another server says to each request, in order; `max_tokens` bounds each reply.

        What it says it has generated is charged to the budget as the verifier's.

        Raises:
            BudgetSpent: The tokens do not suffice, or the deadline passed.
            VerifierFailed: There is no such server, or it fails.
        """
        remote = self._remote
        if remote is None:
            raise VerifierFailed("no other server is known here")
        replies: dict[int, dict[str, Any]] = {}
        leases: dict[int, Lease] = {}

        async def one(at: int) -> None:
            lease = leases.pop(at, None)
            spent = prompt = 0
            index, began = -next(self._apart), time.monotonic()
            try:
                replies[at] = await remote.post(name, bodies[at], index)
                spent = min(max_tokens, _counted(replies[at], "completion_tokens"))
                prompt = _counted(replies[at], "prompt_tokens")
            finally:
                if lease is not None:
                    lease.settle(spent)
                self.emit(
                    Consulted(
                        index=index,
                        seconds=time.monotonic() - began,
                        name=name,
                        tokens=spent,
                        prompt_tokens=prompt,
                    )
                )

        try:
            async with self._in_time("the other server had answered"), Arrivals[None]() as arrivals:
                for at in range(len(bodies)):
                    if max_tokens:
                        leases[at] = self._lease(max_tokens)
                    arrivals.start(one(at))
                    if arrivals.pending >= MOST_APART:
                        await anext(arrivals)
                async for _ in arrivals:
                    pass
        finally:
            for lease in leases.values():  # of those that were cancelled before they began
                lease.settle(0)
        return [replies[at] for at in range(len(bodies))]

    def _apart_from(
        self, token_ids: tuple[int, ...], max_tokens: int, adapter: str | None, **more: Any
    ) -> Generation:
        """A sequence that is no part of an answer. Its number is below zero."""
        return Generation(
            index=-next(self._apart),
            token_ids=token_ids,
            max_tokens=max_tokens,
            adapter=adapter,
            apart=True,
            priority=-1,
            **more,
        )

    async def _each(
        self, asked: Iterable[tuple[Generation, Callable[["_Sequence"], None]]]
    ) -> None:
        """Run sequences that are no part of an answer, so many at once, each told once whole."""
        async with _Flight[None](self) as flight:
            for generation, heard in asked:
                lease = self._lease(generation.max_tokens)
                flight.start(generation.index, lease, self._asked(generation, lease, flight, heard))
                if flight.arrivals.pending >= MOST_APART:
                    await anext(flight.arrivals)
            async for _ in flight.arrivals:
                pass

    def _lease(self, tokens: int) -> Lease:
        """So many tokens for a verifier.

        Raises:
            BudgetSpent: There are fewer left.
        """
        lease = self.budget.reserve(tokens, samples=0)
        if lease is None or lease.tokens < tokens:
            if lease is not None:
                lease.settle(0)
            self.fell_short("exhausted")
            raise BudgetSpent("the tokens ran out before the verifier had an opinion")
        return lease

    async def _asked(
        self,
        generation: Generation,
        lease: Lease,
        flight: "_Flight[None]",
        heard: Callable[["_Sequence"], None],
    ) -> None:
        flight.leased.pop(generation.index)
        sequence, began = _Sequence(), time.monotonic()
        try:
            async with aclosing(self.engine.generate(generation)) as chunks:
                async for chunk in chunks:
                    sequence.add(chunk)
            if sequence.finish_reason == "abort":
                raise BudgetSpent("it was ended before it had said anything")
            heard(sequence)
        finally:
            flight.running.discard(generation.index)
            lease.settle(len(sequence.token_ids))
            self.emit(
                Read(
                    index=generation.index,
                    seconds=time.monotonic() - began,
                    tokens=len(sequence.token_ids),
                    prompt_tokens=sequence.prompt_tokens,
                    cached_tokens=sequence.cached_tokens,
                )
            )

    def vote(self, candidate: Candidate, answer: str, weight: float) -> None:
        """Put a vote on record."""
        self.emit(Voted(index=candidate.index, answer=answer, weight=weight))

    def commit(self, index: int) -> None:
        """Let the pieces of this sequence go to the client from now on: nothing else can win."""
        self.emit(Committed(index=index))

    async def answer(self, text: str, token_ids: Sequence[int]) -> str | None:
        """The answer in a sample, in canonical form; None if there is none."""
        reading = Reading(call=None, content=text)
        if self._read is not None:
            reading = self._read(text, token_ids)
        return reading.call or await self.answers.extract(
            reading.content, self.answer_format, seconds=self._patience
        )

    async def place(self, answer: str, known: Sequence[str]) -> int | None:
        """The index of the first known answer that is equivalent."""
        return await self.answers.place(answer, known, self.answer_format, seconds=self._patience)

    @asynccontextmanager
    async def _in_time(self, what: str) -> AsyncGenerator[None, None]:
        """End the block soon after the deadline.

        Raises:
            BudgetSpent: It was ended.
        """
        deadline = asyncio.timeout(self._patience)
        try:
            async with deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            self.fell_short("deadline")
            raise BudgetSpent(f"the deadline passed before {what}") from None

    @property
    def _patience(self) -> float | None:
        """How long reading, comparing and judging may take: hardly longer than the run."""
        left = self.budget.seconds_left
        return None if left is None else left + LATE_SECONDS

    async def distinct(self, candidates: Iterable[Candidate], most: int) -> list[Candidate]:
        """The first candidate of each different answer, in order, `most` of them at most.

        Candidates without an answer differ by their text.
        """
        kept: list[Candidate] = []
        answers: list[str] = []
        texts: set[str] = set()
        for candidate in candidates:
            if len(kept) == most:
                break
            if candidate.answer is None:
                fresh = candidate.text not in texts
                texts.add(candidate.text)
            else:
                place = await self.place(candidate.answer, answers)
                fresh = place is None
                if fresh:
                    answers.append(candidate.answer)
            if fresh:
                kept.append(candidate)
        return kept

    async def choose(
        self,
        problem: Problem,
        best_first: Sequence[Candidate],
        *,
        decided: bool = False,
        **details: Any,
    ) -> Outcome:
        """End the run: the first candidate wins; `details` are further fields of `Outcome`."""
        stopped: StopReason = "decided" if decided else self._short or "samples"
        best = best_first[0]
        ranked = (
            [best] if problem.answers == 1 else await self.distinct(best_first, problem.answers)
        )
        returned = tuple(candidate.index for candidate in ranked)
        self.emit(Chosen(index=best.index, stopped=stopped, returned=returned))
        return Outcome(
            chosen=best,
            candidates=tuple(sorted(best_first, key=lambda one: one.index)),
            stopped=stopped,
            ranked=tuple(ranked),
            **details,
        )

    async def put(self, before: Candidate | None, text: str, *, below: int) -> Candidate | None:
        """A solution that goes on with words which were not drawn, and cost nothing.

        None if it would not have fewer than `below` tokens: there is to be room for what follows.
        """
        ids = await self.engine.encode(text)
        head = before or Candidate(index=-1, text="", token_ids=(), finish_reason="step")
        whole = (*head.token_ids, *ids)
        if len(whole) >= below:
            return None
        put = Candidate(
            index=self.number(),
            text=head.text + text,
            token_ids=whole,
            finish_reason="step",
            parent=None if before is None else before.index,
            inherited=len(whole),
            inherited_chars=len(head.text),
        )
        self.emit(Proposed(candidate=put))
        return put

    def number(self) -> int:
        """The index of the next sequence of this run."""
        return next(self._numbers)

    @property
    def short(self) -> StopReason | None:
        """Why fewer samples than asked for could be had, or shorter ones."""
        return self._short

    def fell_short(self, reason: StopReason) -> None:
        """Remember why fewer samples than asked for could be had; the first reason stays."""
        self._short = self._short or reason
        if self._outer is not None:
            self._outer.fell_short(reason)

    def aside(self, tokens: int) -> int:
        """How many of so many tokens for a sample are to be left for the verifier."""
        verifier = self.verifier
        return 0 if verifier is None or tokens < 2 else min(verifier.aside(tokens), tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sequence to start: a whole sample, unless it says otherwise."""

    after: Candidate | None = None
    """The candidate to go on with, which ended with a step."""
    until: str | None = None
    """Ends the step."""
    max_tokens: int | None = None
    """Ends the step, too."""
    place: int | None = None
    """Which draw of the search it is, whenever it starts: its seed follows; None: its index."""
    greedy: bool = False
    """Whether each token is to be the likeliest."""
    model: str | None = None
    """The adapter that writes it, by name; None is what the client named."""
    likeliest: int | None = None
    """How many of the likeliest tokens are wanted at each place; 0: what the chosen ones have."""
    prompt: tuple[int, ...] | None = None
    """What it reads; None is the problem's own prompt."""
    worth: Callable[[Chunk], bool] | None = None
    """Hears each piece as it comes, and says whether the sequence may go on; else it is aborted."""


class Sampling:
    """Samples of one prompt, in flight together. An async context manager and an async iterator."""

    def __init__(self, ctx: Context, problem: Problem, n: int | Sequence[Draw]) -> None:
        self._ctx = ctx
        self._problem = problem
        self._n = n
        self._flight: _Flight[tuple[int, Candidate | None]] = _Flight(ctx, self._never_begun)
        self._arrivals = self._flight.arrivals
        self._watch = Group()
        self._unseen: set[int] = set()
        self._usable = 0
        self._late = False
        """Whether the deadline has passed: what exists of a sample then is the sample."""

    async def __aenter__(self) -> Self:
        await self._flight.__aenter__()
        await self._watch.__aenter__()
        self.start(self._n)
        if (seconds := self._ctx.budget.seconds_left) is not None:
            self._watch.start(self._end_at_deadline(seconds), lambda task: None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._watch.__aexit__(kind, error, trace)
        finally:
            await self._flight.__aexit__(kind, error, trace)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Candidate:
        """The next finished sample.

        Raises:
            NoCandidate: All are in, and not one is usable.
        """
        try:
            candidate = None
            while candidate is None:
                index, candidate = await anext(self._arrivals)
                self._unseen.discard(index)
        except StopAsyncIteration:
            if self._usable == 0:
                raise NoCandidate(
                    "the budget ran out before the first sample had a single token"
                ) from None
            raise
        self._usable += 1
        return candidate

    async def some(self) -> list[Candidate]:
        """The next finished sample, and whatever else is in by then; empty once all are in."""
        found: list[Candidate] = []
        while self._arrivals.pending and (not found or self._arrivals.ready):
            index, candidate = await anext(self._arrivals)
            self._unseen.discard(index)
            if candidate is not None:
                self._usable += 1
                found.append(candidate)
        return found

    async def finish(self, draws: Sequence[Draw]) -> list[Candidate | None]:
        """Start these and wait for all, in order; None for what the budget or `worth` ended.

        Nothing else is to be under way.
        """
        started = self.start(draws)
        found: dict[int, Candidate] = {}
        while some := await self.some():
            found |= {candidate.index: candidate for candidate in some}
        missing = len(draws) - len(started)
        return [*(found.get(index) for index in started), *[None] * missing]

    @property
    def pending(self) -> int:
        """Samples started and not yet iterated over."""
        return self._arrivals.pending

    @property
    def earliest(self) -> float:
        """The lowest index that may still come: started and not yet iterated over, or new."""
        return min(self._unseen, default=inf)

    def awaits(self, index: int) -> bool:
        """Whether a sequence is started and not yet iterated over; one that was lost is over."""
        return index in self._unseen

    def start(self, draws: int | Sequence[Draw]) -> list[int]:
        """Start more sequences, as many as the budget allows, in order; return their indices."""
        asked = [Draw()] * draws if isinstance(draws, int) else draws
        budget, n = self._ctx.budget, len(asked)
        if budget.seconds_left is not None and budget.seconds_left <= 0:
            n = 0
            self._ctx.fell_short("deadline")
        if budget.samples_left is not None:
            n = min(n, budget.samples_left)
        if n > 0 and budget.left is not None and budget.left < n:
            n = budget.left
            self._ctx.fell_short("exhausted")
        share = budget.share(n) if n > 0 else None
        started: list[int] = []
        for draw in asked[:n]:
            room = self._room(draw)
            aside = 0 if share is None else self._ctx.aside(room)
            lease = budget.reserve(room + aside if share is None else min(room + aside, share))
            if lease is None:
                break
            index = self._ctx.number()
            self._ctx.emit(Started(index=index, tokens=lease.tokens))
            tokens = room
            if lease.tokens < room + aside:
                tokens = lease.tokens - (self._ctx.aside(lease.tokens) if aside else 0)
            self._unseen.add(index)
            self._flight.start(index, lease, self._sample(index, draw, tokens))
            started.append(index)
        return started

    async def _spelled(self, candidate: Candidate, after: Candidate | None) -> Candidate:
        """A path with the words of its tokens: steps may meet within a letter of several bytes."""
        ids, engine = candidate.token_ids, self._ctx.engine
        if candidate.complete and ids and ids[-1] in engine.ends:
            ids = ids[:-1]
        before = 0 if after is None else len(after.text)
        return replace(candidate, text=await engine.decode(ids), inherited_chars=before)

    def _never_begun(self, index: int) -> None:
        self._ctx.emit(Aborted(index=index, tokens=0, prompt_tokens=0, cached_tokens=0))

    def _room(self, draw: Draw) -> int:
        """How many tokens a sequence may have, the budget aside."""
        written = 0 if draw.after is None else len(draw.after.token_ids)
        left = self._problem.max_tokens - written
        return left if draw.max_tokens is None else min(left, draw.max_tokens)

    async def _end_at_deadline(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))
        self._late = True
        if self._flight.running:
            self._ctx.fell_short("deadline")
            await self._ctx.engine.abort(tuple(self._flight.running))

    async def _sample(self, index: int, draw: Draw, tokens: int) -> tuple[int, Candidate | None]:
        """One sequence from start to answer; what was spent is settled however it ends."""
        lease = self._flight.leased.pop(index)
        ctx, problem, after = self._ctx, self._problem, draw.after
        place = index if draw.place is None else draw.place
        before = () if after is None else after.token_ids
        wanted = (draw.likeliest, None if ctx.verifier is None else ctx.verifier.logprobs)
        generation = Generation(
            index=index,
            token_ids=(problem.token_ids if draw.prompt is None else draw.prompt) + before,
            max_tokens=tokens,
            continues=None if after is None else after.index,
            seed=None if problem.seed is None else problem.seed + place,
            greedy=draw.greedy,
            adapter=draw.model,
            until=draw.until,
            logprobs=max((k for k in wanted if k is not None), default=None),
            piecewise=draw.worth is not None,
            priority=1 if after else 1 + place,
        )
        sequence = _Sequence()
        candidate: Candidate | None = None
        given_up = False
        try:
            async with aclosing(ctx.engine.generate(generation)) as chunks:
                async for chunk in chunks:
                    sequence.add(chunk)
                    ctx.emit(Grown(index=index, chunk=chunk))
                    if draw.worth is not None and not given_up and not draw.worth(chunk):
                        given_up = True
                        await ctx.engine.abort((index,))
            reason = sequence.finish_reason
            if reason == "abort" and self._late and sequence.token_ids:
                reason = "length"
            if given_up:  # whether or not it could still end by itself
                reason = "abort"
            written = len(before) + len(sequence.token_ids)
            if reason == "length" and len(sequence.token_ids) == draw.max_tokens:
                reason = "step"
            if reason == "step" and written >= problem.max_tokens:
                reason = "length"  # there is no room to go on
            if reason is not None and reason != "abort":
                candidate = sequence.finished(index, reason, after)
                if (draw.until is not None or after is not None) and not draw.likeliest:
                    candidate = await self._spelled(candidate, after)
                if reason != "step":
                    answer = await ctx.answer(candidate.text, candidate.token_ids)
                    candidate = replace(candidate, answer=answer, model=draw.model)
            return index, candidate
        finally:
            self._flight.running.discard(index)
            lease.settle(len(sequence.token_ids))
            if candidate is not None:
                if candidate.finish_reason == "length" and tokens < self._room(draw):
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


class _Flight(Generic[T]):
    """Sequences that one block has in the engine; leaving it aborts those that still run.

    `never_begun` hears of those that were cancelled before they could begin.
    """

    def __init__(self, ctx: Context, never_begun: Callable[[int], None] = lambda index: None):
        self._ctx = ctx
        self._never_begun = never_begun
        self.arrivals: Arrivals[T] = Arrivals()
        self.leased: dict[int, Lease] = {}
        """Leases of sequences whose task has not begun; it takes its own."""
        self.running: set[int] = set()

    def start(self, index: int, lease: Lease, work: Coroutine[Any, Any, T]) -> None:
        """Start the task of a sequence."""
        self.leased[index] = lease
        self.running.add(index)
        self.arrivals.start(work)

    async def __aenter__(self) -> Self:
        await self.arrivals.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.running:
                await unbroken(self._abort())
        finally:
            await self.arrivals.__aexit__(kind, error, trace)
            for index, lease in self.leased.items():
                lease.settle(0)
                self._never_begun(index)

    async def _abort(self) -> None:
        """End what runs, and hear what it had generated, though a client leaves meanwhile."""
        await self._ctx.engine.abort(tuple(self.running))
        await self.arrivals.over(GRACE_SECONDS)


def _counted(reply: dict[str, Any], name: str) -> int:
    """A count in a reply's usage; what is none counts nothing."""
    usage: Any = reply.get("usage")
    count: Any = cast(dict[str, Any], usage).get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0


def _digest(token_ids: Sequence[int]) -> bytes:
    return blake2b(array("q", token_ids).tobytes(), digest_size=16).digest()


class _Sequence:
    """What has arrived of one sequence."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.top_logprobs: list[tuple[float, ...]] = []
        self.top_token_ids: list[tuple[int, ...]] = []
        self.label_logprobs: tuple[float, ...] = ()
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.pieces.extend(chunk.pieces)
        self.top_logprobs.extend(chunk.top_logprobs)
        self.top_token_ids.extend(chunk.top_token_ids)
        self.label_logprobs = chunk.label_logprobs or self.label_logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self.cached_tokens = chunk.cached_tokens or self.cached_tokens

    def finished(
        self, index: int, finish_reason: FinishReason, after: Candidate | None
    ) -> Candidate:
        """All of the solution, whose answer is still to be read."""
        before = after or Candidate(index=-1, text="", token_ids=(), finish_reason="step")
        return Candidate(
            index=index,
            text=before.text + self.text,
            token_ids=(*before.token_ids, *self.token_ids),
            finish_reason=finish_reason,
            parent=None if after is None else after.index,
            inherited=len(before.token_ids),
            logprobs=(*before.logprobs, *self.logprobs),
            pieces=(*before.pieces, *self.pieces),
            top_logprobs=(*before.top_logprobs, *self.top_logprobs),
            top_token_ids=(*before.top_token_ids, *self.top_token_ids),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )
