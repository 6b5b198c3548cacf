"""Fakes for tests: an engine with a script, a verifier with a view, a context with a memory."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from math import exp, log
from types import TracebackType
from typing import Self
from zlib import crc32

from strategies.core.answers import AnswerFormat, Answers
from strategies.core.budget import Budget, Limits
from strategies.core.context import Context, Verifier
from strategies.core.engine import Engine, Remote
from strategies.core.events import Event
from strategies.core.sandbox import Sandbox
from strategies.core.types import (
    Candidate,
    Chunk,
    FinishReason,
    Generation,
    Labels,
    Problem,
    Turn,
    Verdict,
)


def pieces(text: str) -> tuple[str, ...]:
    """The fake engine's tokens: words, each with the space and newlines after it."""
    return tuple(re.findall(r"\S+\s*|^\s+", text))


def encode(text: str) -> tuple[int, ...]:
    """The fake engine's token ids: the same piece has the same id everywhere."""
    return tuple(crc32(piece.encode()) for piece in pieces(text))


def surprise(piece: str) -> float:
    """The default log-probability of a token: negative, above -1, and exact in binary."""
    return -(crc32(piece.encode()) % 16 + 1) / 32


END = "</s>"
"""The piece with which the fake engine ends a sequence, where tokens decide that."""


class FakeEngine:
    """An `Engine` that writes what it is told to, a token a chunk, and counts what it is asked.

    `texts` are cycled by the generation's index, or made by a function of the generation. Before
    each token it sleeps `delay(index)` seconds. `failures` are raised instead of a token, by number
    of the call and number of the token, both from 0.
    """

    def __init__(
        self,
        texts: Sequence[str] | Callable[[Generation], str],
        *,
        delay: Callable[[int], float] = lambda index: 0.0,
        logprob: Callable[[str], float] = surprise,
        failures: Mapping[tuple[int, int], Exception] | None = None,
    ) -> None:
        self._texts = texts
        self._delay = delay
        self._logprob = logprob
        self._failures = failures or {}
        self.asked: list[Generation] = []
        """Every generation that was begun."""
        self.tokens = 0
        """Tokens delivered."""
        self.running = 0
        """Sequences begun and not ended."""
        self.aborted: list[int] = []
        """Indices of the sequences that were aborted, closed or cancelled before their end."""
        self.rendered: list[tuple[Turn, ...]] = []
        """Every conversation."""
        self.words: dict[int, str] = {encode(END)[0]: ""}
        """By token id, what `decode` says."""
        self._ending: dict[int, asyncio.Event] = {}

    @property
    def calls(self) -> int:
        """How many sequences were begun."""
        return len(self.asked)

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Deliver the scripted sequence."""
        call = self.calls
        self.asked.append(generation)
        self.running += 1
        ended = False
        try:
            for number, chunk in enumerate(self._script(generation)):
                if await self._told_to_end(generation.index, self._delay(generation.index)):
                    self.aborted.append(generation.index)
                    ended = True
                    yield Chunk(finish_reason="abort")
                    return
                if (call, number) in self._failures:
                    raise self._failures[call, number]
                self.tokens += len(chunk.token_ids)
                ended = chunk.finish_reason is not None
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            if not ended:
                self.aborted.append(generation.index)
            raise
        finally:
            self.running -= 1

    longest = 1_000_000

    @property
    def ends(self) -> Sequence[int]:
        """One piece."""
        return encode(END)

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Their words, one after the other; what comes later changes nothing before it."""
        self.rendered.append(tuple(turns))
        return encode("".join(f"{turn.content}\n" for turn in turns))

    async def encode(self, text: str) -> tuple[int, ...]:
        """As `encode`, remembered for `decode`."""
        self.words |= dict(zip(encode(text), pieces(text), strict=True))
        return encode(text)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Of the pieces that it was told of."""
        return "".join(self.words.get(token, f"{token} ") for token in token_ids)

    def labels(self, adapter: str) -> Labels:
        """The same for any adapter."""
        return Labels(good=1, bad=2)

    async def tokens_with(self, text: str) -> Collection[int]:
        """Of the pieces written so far."""
        written = {piece for asked in self.asked for piece in pieces(self._text(asked))}
        return {token for piece in written if text in piece for token in encode(piece)}

    async def abort(self, indices: Collection[int]) -> None:
        """End these sequences at their next token."""
        for index in indices:
            self._ending.setdefault(index, asyncio.Event()).set()

    async def _told_to_end(self, index: int, seconds: float) -> bool:
        """Wait that long, or until the sequence is aborted; say whether it is."""
        ending = self._ending.setdefault(index, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                await ending.wait()
        except TimeoutError:
            return False
        return True

    def _script(self, generation: Generation) -> list[Chunk]:
        """All chunks of a sequence; an empty text is one chunk without a token."""
        if generation.labels:
            likely = tuple(-1.0 - at for at in range(len(generation.labels)))
            return [
                Chunk(
                    token_ids=(0,),
                    label_logprobs=likely,
                    finish_reason="length",
                    prompt_tokens=len(generation.token_ids),
                )
            ]
        text = self._text(generation)
        if generation.choices:
            text = generation.choices[(generation.seed or 0) % len(generation.choices)]
        written = pieces(text)
        finish: FinishReason = "stop"
        if generation.until is not None:
            until = generation.until
            end = next((at for at, piece in enumerate(written) if until in piece), None)
            if end is not None:
                written, finish = written[: end + 1], "step"
        if len(written) > generation.max_tokens:
            written, finish = written[: generation.max_tokens], "length"
        if not written:
            return [Chunk(finish_reason=finish, prompt_tokens=len(generation.token_ids))]
        return [
            self._chunk(generation, piece, finish if number == len(written) else None)
            for number, piece in enumerate(written, start=1)
        ]

    def _text(self, generation: Generation) -> str:
        if callable(self._texts):
            return self._texts(generation)
        return self._texts[generation.index % len(self._texts)]

    def _chunk(self, generation: Generation, piece: str, finish: FinishReason | None) -> Chunk:
        wanted = generation.logprobs
        self.words[encode(piece)[0]] = piece
        logprob = self._logprob(piece)
        return Chunk(
            text=piece,
            token_ids=encode(piece),
            logprobs=() if wanted is None else (logprob,),
            pieces=() if wanted is None else (piece,),
            top_logprobs=(_likeliest(logprob, wanted),) if wanted else (),
            top_token_ids=(tuple(range(wanted)),) if wanted else (),
            finish_reason=finish,
            prompt_tokens=len(generation.token_ids),
        )


def _likeliest(logprob: float, k: int) -> tuple[float, ...]:
    """This token and `k - 1` others that halve what is left of the probability, in turn."""
    left = max(1 - exp(logprob), 1e-9)
    others = [log(left / 2**number) for number in range(1, k)]
    return tuple(sorted([logprob, *others], reverse=True))


class FakeVerifier:
    """A `Verifier` that scores by a function of the candidate, after `seconds` of thought.

    With `reads`, it asks the engine of each candidate first, for a token.
    """

    def __init__(
        self,
        score: Callable[[Candidate], float],
        *,
        logprobs: int | None = None,
        seconds: float = 0.0,
        reads: bool = False,
    ) -> None:
        self._score = score
        self._seconds = seconds
        self._reads = reads
        self.logprobs = logprobs
        self.stepwise = True
        self.judged: list[int] = []
        """Indices of the candidates, in the order judged."""

    def aside(self, tokens: int) -> int:
        """Nothing, unless it reads."""
        return max(1, tokens // 9) if self._reads else 0

    @property
    def kind(self) -> str:
        """Its name in requests."""
        return "fake"

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """One verdict per candidate."""
        await asyncio.sleep(self._seconds)
        if self._reads:
            paths = [problem.token_ids + one.token_ids for one in candidates]
            await ctx.read([(path, [len(path)]) for path in paths], (1, 2), adapter="fake")
        self.judged += [candidate.index for candidate in candidates]
        return [Verdict(score=self._score(candidate)) for candidate in candidates]


class RecordingContext(Context):
    """A context that keeps its events; leaving its block ends its sandbox."""

    events: list[Event]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.sandbox.close()


def context(
    engine: Engine,
    *,
    limits: Limits | None = None,
    verifier: Verifier | None = None,
    answer_format: AnswerFormat | None = None,
    clock: Callable[[], float] = time.monotonic,
    remote: Remote | None = None,
) -> RecordingContext:
    """A context for one run.

    Example:
        async with context(engine, limits=Limits(tokens=100)) as ctx:
            outcome = await strategy.solve(problem, ctx)
        print(outcome.chosen.text, ctx.events)
    """
    events: list[Event] = []
    sandbox = Sandbox()
    ctx = RecordingContext(
        engine=engine,
        budget=Budget(limits, clock=clock),
        answers=Answers(sandbox),
        sandbox=sandbox,
        emit=events.append,
        verifier=verifier,
        answer_format=answer_format,
        remote=remote,
    )
    ctx.events = events
    return ctx
