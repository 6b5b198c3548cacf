"""One budget for many prompts: who may spend next, so that each token goes where it gains most.

Pure and synchronous, but for `Bidder`, through which a search waits for its turn. Knows nothing of
what the tokens are spent on.
"""

import asyncio
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from strategies.core.budget import Budget, Lease, Limits
from strategies.core.errors import NoCandidate

_ENDLESS = 1 << 60
"""Tokens of a lease where tokens have no limit."""

_TRUST = 8
"""So many samples weigh as much as what was thought that one costs."""

_SURELY = 1.5
"""What better offers ask for is this many times what is left: then the rest has no chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A prompt's first look. `tokens` is what one sample takes in the mean, `most` at most."""

    samples: int
    tokens: float
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A way to go on with a prompt, and what it would gain."""

    option: str
    gain: float
    """In P(right), of the whole option."""
    tokens: float
    """Expected of the whole option, which makes the gain per token."""
    step: float
    """Expected until the prompt looks again: an option of many samples goes by stages."""
    most: int
    """That the step may take."""
    samples: int
    """Of the step."""

    @property
    def worth(self) -> float:
        """Gain per token."""
        return self.gain / max(1.0, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Leave to spend, backed by a lease on the budget of all."""

    option: str | None
    """Of the offer; None for a probe."""
    samples: int
    lease: Lease


Answer = Callable[[Grant | None], None]
"""Hears the decision, once; None: the prompt is to do with what it has."""


class Market:
    """Grants steps of prompts, numbered from 0, out of one budget; `running` at once at most.

    Every prompt has its probe before any has more, with fewer samples each where the budget has no
    room for all. Then the offer that gains most per token goes first, over all prompts and options
    (Damani et al. 2024). Since each prompt's best offer counts by its average gain, an option whose
    gain comes late competes with all of it: the greedy choice walks each prompt's concave hull.

    A step is leased at the most that it may take, and what it leaves comes back before the next.
    Where that much is not free, it waits for what runs; with nothing running, it takes what there
    is. Offers that would not fit even so, or that stand behind others which will surely use all
    that is left, are refused at once. Changes only between awaits, so it needs no lock.
    """

    def __init__(self, budget: Budget, *, prompts: int, running: int) -> None:
        self.budget = budget
        self.probed = 0
        """Prompts that have had their probe, or will have none."""
        self._prompts = prompts
        self._running = running
        self._probes: dict[int, tuple[Probe, Answer]] = {}
        self._offers: list[tuple[float, int, int, Offer]] = []
        """Best first: (worth below zero, prompt, number, offer)."""
        self._asking: dict[int, tuple[int, Answer]] = {}
        """By prompt, how many of its offers are still in the list, and who waits."""
        self._out: dict[int, Lease] = {}
        self._over: set[int] = set()
        """Prompts that have been counted in `probed`."""

    def probe(self, prompt: int, probe: Probe, answer: Answer) -> None:
        """Ask for a first look."""
        self._probes[prompt] = (probe, answer)
        self._serve()

    def offer(self, prompt: int, offers: Sequence[Offer], answer: Answer) -> None:
        """Ask for one of these, whose gains are above zero; of none, nothing is granted."""
        if offers:
            self._asking[prompt] = (len(offers), answer)
        else:
            answer(None)
        for number, one in enumerate(offers):
            insort(self._offers, (-one.worth, prompt, number, one))
        self._serve()

    def settle(self, prompt: int, spent: int, *, unused: int = 0) -> None:
        """A step is over, of which so many samples were not started.

        An offer is to follow, or the prompt is to leave: what it gave back is for both.
        """
        self._out.pop(prompt).settle(spent, unused=unused)

    def leave(self, prompt: int) -> None:
        """A prompt asks for no more, whatever it waits for."""
        self._probes.pop(prompt, None)
        if self._asking.pop(prompt, None) is not None:
            self._offers = [one for one in self._offers if one[1] != prompt]
        self._first(prompt)
        self._serve()

    def _serve(self) -> None:
        """Decide all that can be decided now."""
        while len(self._out) < self._running:
            if not (self._probe_one() if self.probed < self._prompts else self._take_one()):
                break
        self._refuse_hopeless()

    def _first(self, prompt: int) -> None:
        if prompt not in self._over:
            self._over.add(prompt)
            self.probed += 1

    def _probe_one(self) -> bool:
        """Decide the next probe; whether there was one to decide."""
        if not self._probes:
            return False  # those that are still to come go before second helpings
        prompt, (probe, answer) = next(iter(self._probes.items()))
        coming = self._prompts - self.probed
        n, most = probe.samples, probe.samples * probe.most
        budget, each = self.budget, self._mean(probe.tokens)
        if budget.samples_left is not None:
            n = min(n, budget.samples_left // coming)
        if budget.left is not None:
            unspent = budget.left + budget.reserved
            n = min(n, max(1, int(unspent / (each * (coming + len(self._out))) + 1e-9)))
            most = n * probe.most
            spare = budget.left - int((coming - 1) * n * each)
            if spare < most and self._out:
                return False
            most = min(most, max(spare, budget.left // coming))
        del self._probes[prompt]
        self._first(prompt)
        self._grant(prompt, None, n, most, answer)
        return True

    def _mean(self, thought: float) -> float:
        """Tokens of a sample: what was thought, corrected by what all so far took."""
        started = self.budget.samples - sum(lease.samples for lease in self._out.values())
        return max(1.0, (_TRUST * thought + self.budget.spent) / (_TRUST + started))

    def _take_one(self) -> bool:
        """Decide the best offer; whether there was one to decide."""
        if not self._offers:
            return False
        _, prompt, _, best = self._offers[0]
        budget, most = self.budget, best.most
        if not self._fits(best):
            self._drop(0)
            return True
        if budget.left is not None and budget.left < most:
            if self._out:
                return False
            most = budget.left
        _, answer = self._asking.pop(prompt)
        self._offers = [one for one in self._offers if one[1] != prompt]
        self._grant(prompt, best.option, best.samples, most, answer)
        return True

    def _fits(self, offer: Offer) -> bool:
        """Whether there is as much as it is expected to take; what is out on lease may come back.

        What does not fit now never will, since what is spent only grows.
        """
        budget = self.budget
        if budget.samples_left is not None and not 1 <= offer.samples <= budget.samples_left:
            return False  # a search cannot say how many it will start
        return budget.left is None or offer.tokens <= budget.left + budget.reserved

    def _drop(self, at: int) -> None:
        """Take an offer off the list; a prompt without any more is refused."""
        _, prompt, _, _ = self._offers.pop(at)
        left, answer = self._asking[prompt]
        self._asking[prompt] = (left - 1, answer)
        if left == 1:
            del self._asking[prompt]
            answer(None)

    def _refuse_hopeless(self) -> None:
        """Decide what stands behind others that will use all that is left, so that it is told."""
        budget = self.budget
        if budget.left is None or self.probed < self._prompts:
            return
        enough = _SURELY * (budget.left + budget.reserved)
        wanted = 0.0
        seen: set[int] = set()
        for at, (_, prompt, _, one) in enumerate(self._offers):
            if prompt not in seen:
                seen.add(prompt)
                wanted += one.step
            if wanted > enough and at + 1 < len(self._offers):
                hopeless = {prompt for _, prompt, _, _ in self._offers[at + 1 :]} - seen
                self._offers = [one for one in self._offers if one[1] not in hopeless]
                for prompt in sorted(hopeless):
                    self._asking.pop(prompt)[1](None)
                return

    def _grant(
        self, prompt: int, option: str | None, samples: int, most: int, answer: Answer
    ) -> None:
        tokens = _ENDLESS if self.budget.left is None else most
        late = self.budget.seconds_left is not None and self.budget.seconds_left <= 0
        lease = None if late else self.budget.reserve(tokens, samples=samples)
        if lease is not None:
            self._out[prompt] = lease
        answer(None if lease is None else Grant(option=option, samples=samples, lease=lease))


class Bidder:
    """One prompt in a market; leaving its block gives back what it has not spent.

    `equal`: it has the same share as all others, whatever that gains.
    """

    def __init__(self, market: Market, prompt: int, *, share: Limits, equal: bool = False) -> None:
        """`share` is what an equal split gives it."""
        self._market = market
        self._prompt = prompt
        self._share = share
        self.equal = equal
        self._held: tuple[Grant, Budget] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._settle()
        self._market.leave(self._prompt)

    async def share(self) -> Budget:
        """The prompt's share of an equal split, for all that it does.

        Raises:
            NoCandidate: There is no time left.
        """
        samples = self._share.samples or 1
        tokens = self._share.tokens or samples
        each = max(1, tokens // samples)
        return (await self.probe(Probe(samples=samples, tokens=tokens / samples, most=each)))[1]

    async def probe(self, probe: Probe) -> tuple[int, Budget]:
        """How many samples the first look may have, and what they may spend.

        Raises:
            NoCandidate: There is no time left.
        """
        found = await self._granted(lambda answer: self._market.probe(self._prompt, probe, answer))
        if found is None:
            raise NoCandidate("the budget of the batch ended before this prompt's first sample")
        return found[0].samples, found[1]

    async def step(self, offers: Sequence[Offer]) -> tuple[Grant, Budget] | None:
        """Leave to do one of these, with what it may spend; None: others gain more for it."""
        return await self._granted(lambda answer: self._market.offer(self._prompt, offers, answer))

    async def _granted(self, ask: Callable[[Answer], None]) -> tuple[Grant, Budget] | None:
        seconds = self._market.budget.seconds_left
        decided: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()

        def answer(grant: Grant | None) -> None:
            self._held = None if grant is None else (grant, self._lent(grant))
            if not decided.done():  # cancelled, and about to give it back
                decided.set_result(grant)

        self._settle()
        ask(answer)
        try:
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
                await decided
        except TimeoutError:
            self._settle()
            self._market.leave(self._prompt)
        return self._held

    def _lent(self, grant: Grant) -> Budget:
        """What a grant may spend, as a budget of its own."""
        total = self._market.budget
        seconds = total.seconds_left
        return Budget(
            Limits(
                tokens=None if total.left is None else grant.lease.tokens,
                seconds=None if seconds is None else max(1e-9, seconds),
                samples=None if total.samples_left is None else grant.samples or None,
            )
        )

    def _settle(self) -> None:
        """Give back what the last grant has not spent."""
        if self._held is not None:
            (grant, budget), self._held = self._held, None
            budget.reserve(budget.left or 0, samples=0)  # what goes back is no longer its own
            unused = grant.samples - budget.samples
            if self._market.budget.samples_left is not None:
                unused = max(0, unused)  # a search starts more than it could say
            self._market.settle(self._prompt, budget.spent, unused=unused)
