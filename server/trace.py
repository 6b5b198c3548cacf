"""What happened in one run, in order, and the sums over it.

Replies, usage and metrics are folds over this.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, Literal

from strategies.core.events import (
    Aborted,
    Chosen,
    Committed,
    Consulted,
    Event,
    Failed,
    Grown,
    Planned,
    Proposed,
    Read,
    Sampled,
    Scored,
    Started,
    Verified,
    Voted,
)
from strategies.core.types import Candidate

LONGEST_TEXT = 2000
"""Characters of a step that a trace keeps."""

MOST_NODES = 4096
"""Sequences of a run that a tree shows."""

Detail = Literal["summary", "full"]
"""How much of a run a reply is to show: the shape of its tree, or all words and all events."""

Timed = tuple[float, Event]
"""(seconds since the start, event)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by fate.

    `kept` are those of the answers returned; `discarded` were finished and not returned; `aborted`
    were stopped.
    """

    kept: int = 0
    discarded: int = 0
    aborted: int = 0
    verifier: int = 0
    prompt: int = 0
    """Prompt tokens that the engine worked on, over all its calls."""
    cached: int = 0
    """Those of them that came from the prefix cache."""
    continued: int = 0
    """Those of sequences that went on with another and ended by themselves."""
    continued_cached: int = 0
    engine_calls: int = 0
    verifier_calls: int = 0
    """Those of them that a verifier made."""
    answer_cached: int = 0
    """Prompt tokens from the prefix cache when the answer was generated."""
    consulted: int = 0
    """Those of the verifier's tokens that other servers generated."""
    consulted_prompt: int = 0
    consultations: int = 0

    @property
    def generated(self) -> int:
        """Everything that was generated."""
        return self.kept + self.discarded + self.aborted + self.verifier


class Trace:
    """One ordered list of events. Grows while the run lasts; `record` never awaits.

    Pieces of sequences go to followers only: the finished sequence says them again.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.began = time.time()
        """By the clock on the wall, which may jump; all else goes by the other."""
        self._followers: set[asyncio.Queue[Timed | None]] = set()
        self.over = False
        self.events: list[Timed] = []

    def record(self, event: Event) -> None:
        """Append an event; `Chosen` and `Failed` are the last."""
        if isinstance(event, Sampled | Proposed):  # without what is many, or is the parent's, too
            candidate = event.candidate
            own = candidate.token_ids[candidate.inherited :]
            text = candidate.text[candidate.inherited_chars :][:LONGEST_TEXT]
            bare = replace(candidate, text=text, token_ids=own, inherited=0, inherited_chars=0)
            event = type(event)(
                candidate=replace(bare, logprobs=(), pieces=(), top_logprobs=(), top_token_ids=())
            )
        timed = (time.monotonic() - self._started, event)
        if not isinstance(event, Grown):
            self.events.append(timed)
        self.over = self.over or isinstance(event, Chosen | Failed)
        for follower in self._followers:
            follower.put_nowait(timed)
            if self.over:
                follower.put_nowait(None)

    async def follow(self) -> AsyncGenerator[Timed, None]:
        """Everything so far, and then whatever happens until the run is over."""
        heard: asyncio.Queue[Timed | None] = asyncio.Queue()
        for timed in [*self.events, *([None] if self.over else [])]:
            heard.put_nowait(timed)
        self._followers.add(heard)
        try:
            while (timed := await heard.get()) is not None:
                yield timed
        finally:
            self._followers.discard(heard)

    @property
    def seconds(self) -> float:
        """From the start to the last event, or to now while the run lasts."""
        return self.events[-1][0] if self.over else time.monotonic() - self._started

    def tree(self, detail: Detail) -> list[dict[str, Any]]:
        """Every finished sequence or thought with what it goes on with, in order.

        `parent` is the index of another, or None for the bare prompt; a plain search has nothing
        but roots. The first `MOST_NODES` of them.
        """
        scores = {event.index: event.score for _, event in self.events if isinstance(event, Scored)}
        chosen = next((one for _, one in self.events if isinstance(one, Chosen)), None)
        nodes: list[dict[str, Any]] = []
        for _, event in self.events:
            if isinstance(event, Sampled | Proposed) and len(nodes) < MOST_NODES:
                one = event.candidate
                node: dict[str, Any] = {
                    "index": one.index,
                    "parent": one.parent,
                    "tokens": one.drawn,
                    "score": scores.get(one.index),
                    "finish_reason": one.finish_reason,
                    "chosen": chosen is not None and one.index == chosen.index,
                }
                nodes.append(node | ({"text": one.text} if detail == "full" else {}))
        return nodes

    def usage(self) -> Usage:
        """The sums so far; before the end, nothing is kept yet."""
        returned: set[int] = set()
        """The answers, and the sequences that they go on with."""
        answer_cached = 0
        best = -1
        kept = discarded = aborted = verifier = prompt = cached = calls = reads = 0
        continued = continued_cached = 0
        consulted = consulted_prompt = consultations = 0
        for _, event in reversed(self.events):
            match event:
                case Chosen():
                    returned = set(event.returned)
                    best = event.index
                case Started():
                    calls += 1
                case Sampled(candidate=candidate):
                    prompt += candidate.prompt_tokens
                    cached += candidate.cached_tokens
                    if candidate.parent is not None:
                        continued += candidate.prompt_tokens
                        continued_cached += candidate.cached_tokens
                    if candidate.index == best:
                        answer_cached = candidate.cached_tokens
                    if candidate.index in returned:
                        kept += candidate.drawn
                        if candidate.parent is not None:  # it stands further in front
                            returned.add(candidate.parent)
                    else:
                        discarded += candidate.drawn
                case Proposed(candidate=Candidate(parent=int(parent)) as candidate):
                    if candidate.index in returned:
                        returned.add(parent)
                case Aborted():
                    prompt += event.prompt_tokens
                    cached += event.cached_tokens
                    aborted += event.tokens
                case Read():
                    reads += 1
                    prompt += event.prompt_tokens
                    cached += event.cached_tokens
                    verifier += event.tokens
                case Consulted():
                    consultations += 1
                    consulted += event.tokens
                    verifier += event.tokens
                    consulted_prompt += event.prompt_tokens
                case _:
                    pass
        return Usage(
            kept=kept,
            discarded=discarded,
            aborted=aborted,
            verifier=verifier,
            prompt=prompt,
            cached=cached,
            continued=continued,
            continued_cached=continued_cached,
            engine_calls=calls + reads,
            verifier_calls=reads,
            answer_cached=answer_cached,
            consulted=consulted,
            consulted_prompt=consulted_prompt,
            consultations=consultations,
        )


def told(timed: Timed) -> dict[str, Any]:
    """An event as clients read it."""
    seconds, event = timed
    said: dict[str, Any] = {"event": type(event).__name__.lower(), "seconds": round(seconds, 6)}
    match event:
        case Grown():
            said |= {"index": event.index, "text": event.chunk.text}
            said |= {"tokens": len(event.chunk.token_ids)}
        case Sampled(candidate=candidate) | Proposed(candidate=candidate):
            said |= {"index": candidate.index, "answer": candidate.answer}
            said |= {"tokens": candidate.drawn, "finish_reason": candidate.finish_reason}
            said |= {} if candidate.model is None else {"model": candidate.model}
            if candidate.parent is not None or candidate.finish_reason == "step":
                said |= {"parent": candidate.parent, "text": candidate.text}
        case Scored():
            said |= {"index": event.index, "score": event.score, "steps": list(event.steps)}
        case Verified():
            said |= {"verifier": event.verifier, "candidates": event.candidates}
            said |= {"done": event.done}
        case Read():
            said |= {"tokens": event.tokens}
        case Consulted():
            said |= {"endpoint": event.name, "tokens": event.tokens}
        case Voted():
            said |= {"index": event.index, "answer": event.answer, "weight": event.weight}
        case Started() | Aborted():
            said |= {"index": event.index, "tokens": event.tokens}
        case Planned():
            said |= planned(event)
        case Committed():
            said |= {"index": event.index}
        case Chosen():
            said |= {"index": event.index, "stopped": event.stopped}
        case Failed():
            said |= {"stopped": event.stopped, "error": event.error}
    return said


def planned(event: Planned) -> dict[str, Any]:
    """A decision as clients read it."""
    said: dict[str, Any] = {"samples": event.samples, "option": event.option, "why": event.why}
    if event.confidence is not None:
        said |= {"confidence": event.confidence, "difficulty": list(event.posterior)}
        said |= {"gain": event.gain, "tokens": event.tokens, "price": event.price}
    return said
