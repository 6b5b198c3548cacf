"""The budget.

Reserved before each engine call, settled after, so samples started together cannot overspend.
"""

import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from strategies.core.errors import InvalidRequest


class Limits(BaseModel):
    """What a client may bound.

    Generated tokens (verifiers' included), seconds of wall time, samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int | None = Field(default=None, ge=1, le=100_000_000)
    seconds: float | None = Field(default=None, gt=0, le=86_400, allow_inf_nan=False)
    samples: int | None = Field(default=None, ge=1, le=100_000)

    def over(self, default: "Limits") -> "Limits":
        """These limits, and `default`'s where this one sets none."""
        return default.model_copy(update=self.model_dump(exclude_none=True))

    def capped(self, most: "Limits") -> "Limits":
        """The stricter of both, field by field."""
        theirs = most.model_dump(exclude_none=True)
        ours = self.model_dump(exclude_none=True)
        return Limits(
            **{name: min(theirs.get(name, mine), mine) for name, mine in (theirs | ours).items()}
        )


class Lease:
    """A reservation of `tokens` and of some samples; settle it exactly once."""

    __slots__ = ("_budget", "samples", "tokens")

    def __init__(self, budget: "Budget", tokens: int, samples: int) -> None:
        self._budget: Budget | None = budget
        self.tokens = tokens
        self.samples = samples

    def settle(self, spent: int, *, unused: int = 0) -> None:
        """Give back what was not spent, and samples that were not started.

        `unused` below zero: so many more were started, where samples have no limit.

        Spending more than was leased is a bug and raises.
        """
        if self._budget is None:
            raise RuntimeError("the lease was settled before")
        if not 0 <= spent <= self.tokens:
            raise RuntimeError(f"{spent} tokens spent on a lease of {self.tokens}")
        least = 0 if self._budget.samples_left is not None else unused
        if not least <= unused <= self.samples:
            raise RuntimeError(f"{unused} samples unused of a lease of {self.samples}")
        self._budget.settled(self.tokens, spent, unused)
        self._budget = None


class Budget:
    """What is left of the limits. Changes only between awaits, so it needs no lock."""

    __slots__ = ("_clock", "_limits", "_started", "reserved", "samples", "spent")

    def __init__(
        self, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits or Limits()
        self._clock = clock
        self._started = clock()
        self.samples = 0
        """Samples that were started, or may be by a lease."""
        self.reserved = 0
        """Tokens out on lease."""
        self.spent = 0
        """Tokens settled."""

    @property
    def left(self) -> int | None:
        """Tokens neither spent nor reserved; None without a limit."""
        return (
            None
            if self._limits.tokens is None
            else self._limits.tokens - self.spent - self.reserved
        )

    @property
    def samples_left(self) -> int | None:
        """Samples that may still be started; None without a limit."""
        return None if self._limits.samples is None else self._limits.samples - self.samples

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline, negative after it; None without a limit."""
        return (
            None
            if self._limits.seconds is None
            else self._started + self._limits.seconds - self._clock()
        )

    def share(self, parts: int) -> int | None:
        """An equal share of the tokens left for each of `parts` calls started together.

        None without a limit.

        Raises:
            InvalidRequest: The budget is too small to give each call a single token.
        """
        if self.left is None:
            return None
        share = self.left // parts
        if share < 1:
            raise InvalidRequest(
                f"a budget of {self._limits.tokens} tokens cannot be shared among {parts} samples; "
                "raise the budget or ask for fewer samples",
                field="budget.tokens",
            )
        return share

    def reserve(self, tokens: int, *, samples: int = 1) -> Lease | None:
        """Lease up to `tokens`, fewer if fewer are left, for so many samples.

        None when tokens or samples have run out.
        """
        left = self.left
        granted = tokens if left is None else min(tokens, left)
        if granted < 1 or (self.samples_left is not None and self.samples_left < samples):
            return None
        self.reserved += granted
        self.samples += samples
        return Lease(self, granted, samples)

    def settled(self, reserved: int, spent: int, unused: int) -> None:
        """Called by the lease."""
        self.reserved -= reserved
        self.spent += spent
        self.samples -= unused
