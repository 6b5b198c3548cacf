"""What happened in one run, in order, and the sums over it.

Replies, usage and metrics are folds over this.
"""

import time
from dataclasses import dataclass

from strategies.core.events import Aborted, Event, Sampled, Scored, Started


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by fate.

    `kept` is the answer's; `discarded` were finished and not chosen; `aborted` were stopped.
    """

    kept: int
    discarded: int
    aborted: int
    verifier: int
    prompt: int
    """Prompt tokens asked of the engine, over all its calls."""
    cached: int
    """Those of them that came from the prefix cache."""
    engine_calls: int

    @property
    def generated(self) -> int:
        """Everything that was generated."""
        return self.kept + self.discarded + self.aborted + self.verifier


class Trace:
    """One ordered list of events. Grows while the run lasts; `record` never awaits."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.events: list[tuple[float, Event]] = []
        """(seconds since the start, event)."""

    def record(self, event: Event) -> None:
        """Append an event."""
        self.events.append((time.monotonic() - self._started, event))

    def usage(self, chosen: int | None) -> Usage:
        """The sums, when candidate `chosen` is the answer."""
        kept = discarded = aborted = verifier = prompt = cached = calls = 0
        for _, event in self.events:
            match event:
                case Started():
                    calls += 1
                case Sampled(candidate=candidate):
                    prompt += candidate.prompt_tokens
                    cached += candidate.cached_tokens
                    if candidate.index == chosen:
                        kept += len(candidate.token_ids)
                    else:
                        discarded += len(candidate.token_ids)
                case Aborted():
                    prompt += event.prompt_tokens
                    cached += event.cached_tokens
                    aborted += event.tokens
                case Scored():
                    verifier += event.tokens
                case _:
                    pass
        return Usage(
            kept=kept,
            discarded=discarded,
            aborted=aborted,
            verifier=verifier,
            prompt=prompt,
            cached=cached,
            engine_calls=calls,
        )
