"""What happens during a run, in order.

Replies, usage, metrics and stored traces are folds over these.
"""

from dataclasses import dataclass
from typing import Literal

from strategies.core.types import Candidate, Chunk, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A sequence was asked of the engine, under a lease of `tokens`."""

    index: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """A piece of a sequence arrived."""

    index: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A sequence is finished."""

    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """A solution goes on with words that were not drawn after it, at no more cost."""

    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """A sequence was stopped because it can no longer matter.

    Its `tokens` are spent all the same.
    """

    index: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A verifier judged a candidate."""

    index: int
    score: float
    steps: tuple[float, ...] = ()
    """Of each step, where it has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A verifier is done with `candidates`, or was ended before it had an opinion (not `done`)."""

    verifier: str
    """Its kind."""
    candidates: int
    seconds: float
    """That it took."""
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A verifier asked a model something, at the price of `tokens`."""

    index: int
    """Of the call, below zero."""
    seconds: float
    """That it took."""
    tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Consulted:
    """A verifier asked another server, which generated `tokens`."""

    index: int
    """Of the call, below zero."""
    seconds: float
    """That it took."""
    name: str
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    """A candidate was counted for an answer, in its canonical form."""

    index: int
    answer: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A decision on how to go on, and what it goes by."""

    samples: int
    """So many were there."""
    option: str | None
    """A number of samples, or a search by name; None: to stop."""
    why: str
    confidence: float | None = None
    posterior: tuple[float, ...] = ()
    """Of the bins of difficulty."""
    gain: float | None = None
    tokens: float | None = None
    price: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """This sequence is the answer, finished or not: its pieces may go to the client at once."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The run is over and this candidate won."""

    index: int
    stopped: StopReason
    returned: tuple[int, ...]
    """It, and the runners-up that the client asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The run is over without an answer: the client went away, or an error says why."""

    stopped: Literal["cancelled", "error"]
    error: str = ""


Event = (
    Started
    | Grown
    | Sampled
    | Proposed
    | Aborted
    | Scored
    | Verified
    | Read
    | Consulted
    | Voted
    | Planned
    | Committed
    | Chosen
    | Failed
)
