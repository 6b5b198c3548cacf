"""The market: never more granted than there is, probes first, then gain per token, no deadlock."""

import asyncio
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.best_of_n import BestOfN
from strategies.compute_optimal import ComputeOptimal
from strategies.core.budget import Budget, Limits
from strategies.core.errors import EngineUnavailable, MullError, NoCandidate
from strategies.core.events import Planned
from strategies.core.market import Bidder, Grant, Market, Offer, Probe
from strategies.core.strategy import Strategy
from strategies.core.testing import FakeEngine, FakeVerifier, context
from strategies.core.types import Outcome, Problem
from tests.strategies.test_calibration import calibration
from tests.strategies.test_compute_optimal import more


def offer(gain: float, tokens: float, *, most: int | None = None, samples: int = 2) -> Offer:
    return Offer(
        option="more",
        gain=gain,
        tokens=tokens,
        step=tokens,
        most=most or int(2 * tokens),
        samples=samples,
    )


PROBE = Probe(samples=2, tokens=10.0, most=30)


@dataclass
class Log:
    """Prompts as a script: what each was told, and what is out."""

    market: Market
    told: list[tuple[int, str, Grant | None]] = field(default_factory=list)
    out: dict[int, Grant] = field(default_factory=dict)

    def probe(self, prompt: int, probe: Probe = PROBE) -> None:
        self.market.probe(prompt, probe, self._hear(prompt, "probe"))

    def offer(self, prompt: int, *offers: Offer) -> None:
        self.market.offer(prompt, offers, self._hear(prompt, "offer"))

    def back(self, prompt: int, spent: int) -> None:
        self.market.settle(prompt, min(spent, self.out.pop(prompt).lease.tokens))

    def granted(self, kind: str) -> list[int]:
        return [prompt for prompt, what, grant in self.told if what == kind and grant is not None]

    def _hear(self, prompt: int, kind: str):
        def hear(grant: Grant | None) -> None:
            self.told.append((prompt, kind, grant))
            if grant is not None:
                assert prompt not in self.out
                self.out[prompt] = grant

        return hear


def log(prompts: int, *, running: int = 99, **limits: int) -> Log:
    return Log(Market(Budget(Limits(**limits)), prompts=prompts, running=running))


def probed(prompts: int, *, running: int = 99, spent: int = 10, **limits: int) -> Log:
    """A market after all probes, none of which runs."""
    found = log(prompts, running=running, **limits)
    for prompt in range(prompts):
        found.probe(prompt)
        found.back(prompt, spent)
        found.market.offer(prompt, (), lambda grant: None)
    return found


def test_the_best_gain_per_token_goes_first_over_prompts_and_options():
    market = probed(4, running=1, tokens=1000)
    market.offer(0, offer(0.5, 50))  # takes the one place that there is
    market.offer(1, offer(0.1, 20))
    market.offer(2, offer(0.1, 40), offer(0.4, 50))  # late, but steep in the mean
    market.offer(3, offer(0.3, 50))
    for prompt in (0, 2, 3, 1):
        assert list(market.out) == [prompt]
        market.back(prompt, 50)
        market.market.leave(prompt)
    assert market.granted("offer") == [0, 2, 3, 1]


def test_a_prompt_that_comes_back_competes_with_those_that_wait():
    market = probed(2, running=1, tokens=1000)
    market.offer(0, offer(0.5, 50))
    market.offer(1, offer(0.1, 50))
    market.back(0, 50)
    market.offer(0, offer(0.4, 50))
    assert market.granted("offer") == [0, 0]


def test_no_second_helping_before_the_last_probe():
    market = log(3, tokens=1000)
    market.probe(0)
    market.back(0, 10)
    market.offer(0, offer(0.9, 10))
    market.probe(1)
    assert market.granted("offer") == []
    market.market.leave(2)  # it failed, and will have none
    assert market.granted("offer") == [0]


def test_a_budget_too_small_for_all_probes_makes_them_smaller():
    market = log(10, tokens=120)
    for prompt in range(10):
        market.probe(prompt)
    while market.out:
        for prompt in list(market.out):
            market.back(prompt, 10)
            market.market.leave(prompt)
    assert market.granted("probe") == list(range(10))
    assert {grant.samples for _, _, grant in market.told[:8] if grant} == {1}
    assert market.market.budget.spent == 100


def test_what_comes_back_is_granted_again():
    market = probed(2, spent=0, tokens=100)
    market.offer(0, offer(0.5, 45, most=100))
    market.offer(1, offer(0.4, 60, most=100))
    assert market.granted("offer") == [0]
    market.back(0, 30)
    market.market.leave(0)
    assert market.granted("offer") == [0, 1]
    assert market.out[1].lease.tokens == 70  # all there is, with nothing else running


def test_what_does_not_fit_is_refused_and_a_cheaper_option_taken():
    market = probed(2, spent=0, tokens=100)
    market.offer(0, offer(0.9, 120))
    assert market.told[-1] == (0, "offer", None)
    market.offer(1, offer(0.9, 120), offer(0.1, 30))
    assert market.out[1].lease.tokens == 60


def test_those_without_a_chance_are_told_at_once():
    market = probed(12, running=1, spent=0, tokens=100)
    for prompt in range(11):
        market.offer(prompt, offer(0.5, 50))
    market.offer(11, offer(0.01, 50))
    assert list(market.out) == [0]
    refused = [prompt for prompt, kind, grant in market.told if kind == "offer" and grant is None]
    assert 11 in refused
    assert not {1, 2} & set(refused)


def test_samples_are_bounded_and_unused_ones_come_back():
    market = probed(3, samples=10)
    assert market.market.budget.samples_left == 4
    market.offer(0, offer(0.9, 10, samples=4))
    market.offer(1, offer(0.8, 10, samples=4))
    assert market.told[-1] == (1, "offer", None)
    market.market.settle(0, 5, unused=2)
    market.offer(2, offer(0.8, 10, samples=2))
    assert market.granted("offer") == [0, 2]
    market.offer(1, offer(0.9, 10, samples=0))  # a search: nobody knows how many it starts
    assert market.told[-1] == (1, "offer", None)


@settings(deadline=None, max_examples=300)
@given(
    prompts=st.integers(1, 12),
    running=st.integers(1, 6),
    tokens=st.integers(12, 2000) | st.none(),
    samples=st.integers(24, 100) | st.none(),
    seed=st.integers(0, 10_000),
)
def test_whatever_happens_nothing_is_overspent_and_nobody_waits_for_ever(
    prompts: int, running: int, tokens: int | None, samples: int | None, seed: int
):
    rng = Random(seed)
    budget = Budget(Limits(tokens=tokens, samples=samples))
    market = Log(Market(budget, prompts=prompts, running=running))
    coming, waiting, left = list(range(prompts)), set[int](), set[int]()
    worths: dict[int, float] = {}
    spent = rounds = 0
    while len(left) < prompts:
        rounds += 1
        assert rounds < 10_000
        before = len(market.told)
        choices = [*coming, *market.out, *(waiting if rng.random() < 0.1 else ())]
        assert choices, "somebody waits and nothing runs"
        one = rng.choice(choices)
        if one in waiting:  # cancelled
            market.market.leave(one)
            left.add(one)
            waiting.discard(one)
            worths.pop(one, None)
        elif one in coming:
            coming.remove(one)
            if rng.random() < 0.1:
                market.market.leave(one)
                left.add(one)
            else:
                waiting.add(one)
                market.probe(one)
        else:
            used = rng.randint(0, min(50, market.out[one].lease.tokens))
            spent += used
            market.back(one, used)
            if rng.random() < 0.3:
                market.market.leave(one)
                left.add(one)
            else:
                waiting.add(one)
                offers = [offer(rng.random(), rng.randint(1, 80)) for _ in range(rng.randint(0, 3))]
                worths[one] = max((other.worth for other in offers), default=0.0)
                market.offer(one, *offers)
        for prompt, kind, grant in market.told[before:]:
            waiting.discard(prompt)
            worths.pop(prompt, None)
            if grant is None:
                market.market.leave(prompt)
                left.add(prompt)
            elif kind == "offer":
                assert not coming, "a second helping before the last probe"
        assert len(market.out) <= running
        assert budget.spent == spent
        assert budget.reserved >= sum(grant.lease.tokens for grant in market.out.values())
        if tokens is not None:
            assert budget.spent + budget.reserved <= tokens
        if samples is not None:
            assert budget.samples_left is not None
            assert budget.samples_left >= 0
    assert not market.out
    assert budget.reserved == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 50)), min_size=1, max_size=12))
def test_grants_are_in_the_order_of_gain_per_token(found: list[tuple[float, int]]):
    market = probed(len(found) + 1, running=1, spent=0, tokens=100_000)
    market.offer(len(found), offer(1.0, 1))
    worths = [offer(gain, tokens).worth for gain, tokens in found]
    for prompt, (gain, tokens) in enumerate(found):
        market.offer(prompt, offer(gain, tokens))
    while market.out:
        [prompt] = market.out
        market.back(prompt, 1)
        market.market.leave(prompt)
    granted = [worths[prompt] for prompt in market.granted("offer")[1:]]
    assert granted == sorted(worths, reverse=True)


# --- with searches that run


async def solved(
    texts: list[list[str]],
    *,
    limits: Limits,
    running: int = 4,
    equal: bool = False,
    strategy: Strategy | None = None,
    searches: bool = False,
    failing: int | None = None,
    delay: float = 0.0,
):
    """A prompt for each list of texts; (outcomes or errors, plans by prompt, market, usage)."""
    known = calibration()
    if not searches:
        known = known.model_copy(update={"searches": {}, "stages": more()})
    market = Market(Budget(limits), prompts=len(texts), running=running)
    share = Limits(
        tokens=None if limits.tokens is None else limits.tokens // len(texts),
        samples=None if limits.samples is None else limits.samples // len(texts),
    )
    plans: dict[int, list[Planned]] = {}
    engines = [FakeEngine(one, delay=lambda _: delay) for one in texts]

    async def one(at: int) -> Outcome | MullError:
        verifier = FakeVerifier(lambda text: 0.5) if searches else None
        with Bidder(market, at, share=share, equal=equal) as bidder:
            if at == failing:
                engines[at] = FakeEngine(texts[at], failures={(0, 0): EngineUnavailable("dead")})
            async with context(engines[at], verifier=verifier) as ctx:
                ctx.calibration, ctx.bidder = known, bidder
                try:
                    if equal:  # as the server does for every strategy
                        ctx.budget, ctx.bidder = await bidder.share(), None
                    problem = Problem(token_ids=(1, at), max_tokens=12, seed=at)
                    return await (strategy or ComputeOptimal()).solve(problem, ctx)
                except MullError as error:
                    return error
                finally:
                    plans[at] = [event for event in ctx.events if isinstance(event, Planned)]

    found = await asyncio.gather(*(one(at) for at in range(len(texts))))
    assert market.budget.reserved == 0
    assert market.budget.spent == sum(engine.tokens for engine in engines)
    return found, plans, market, engines


SPLIT = [f"The answer is {n}." for n in (1, 2, 3, 3, 3, 3, 3, 3)]
AGREED = ["The answer is 3."] * 8


async def test_tokens_go_where_samples_differ():
    found, plans, market, engines = await solved(
        [AGREED] * 6 + [SPLIT] * 2, limits=Limits(tokens=400)
    )
    assert [engine.calls for engine in engines[:6]] == [2] * 6
    assert [engine.calls for engine in engines[6:]] == [8] * 2
    assert [isinstance(one, Outcome) and one.stopped for one in found] == ["decided"] * 8
    assert plans[7][0].why == "no other prompt gains more for its tokens"
    assert plans[0][-1].why == "nothing gains anything"
    assert market.budget.spent <= 400


async def test_a_short_budget_refuses_who_gains_less_and_says_so():
    found, plans, *_ = await solved([SPLIT] * 5, limits=Limits(tokens=90))
    outcomes = [one for one in found if isinstance(one, Outcome)]
    assert len(outcomes) == 5
    refused = [at for at, one in enumerate(outcomes) if one.stopped == "exhausted"]
    assert refused
    assert all("other prompts" in plans[at][-1].why for at in refused)
    assert all(one.chosen.answer for one in outcomes)


@pytest.mark.parametrize("tokens", [8, 11, 17, 40, 64, 200])
@pytest.mark.parametrize("searches", [False, True])
async def test_no_budget_is_overspent_and_everyone_is_answered(tokens: int, searches: bool):
    found, _, market, _ = await solved(
        [AGREED, SPLIT] * 4, limits=Limits(tokens=tokens), searches=searches
    )
    assert market.budget.spent <= tokens
    assert all(isinstance(one, Outcome) for one in found)


async def test_samples_are_one_budget_as_well():
    found, _, _, engines = await solved([SPLIT] * 4, limits=Limits(samples=13))
    assert sum(engine.calls for engine in engines) <= 13
    assert all(isinstance(one, Outcome) for one in found)


async def test_a_failing_prompt_fails_alone_and_its_budget_is_for_the_others():
    found, _, market, _ = await solved([SPLIT] * 4, limits=Limits(tokens=250), failing=1)
    assert isinstance(found[1], EngineUnavailable)
    assert all(isinstance(found[at], Outcome) for at in (0, 2, 3))
    assert market.budget.left == 250 - market.budget.spent


async def test_at_the_deadline_all_end_with_what_they_have():
    limits = Limits(tokens=10_000, seconds=0.12)
    found, *_ = await solved([SPLIT] * 6, limits=limits, running=2, delay=0.02)
    assert {type(one) for one in found} <= {Outcome, NoCandidate}
    assert any(isinstance(one, NoCandidate) for one in found)
    assert any(isinstance(one, Outcome) for one in found)


async def test_an_equal_split_gives_each_the_same():
    _, plans, _, engines = await solved(
        [AGREED] * 3 + [SPLIT], limits=Limits(tokens=64), equal=True
    )
    assert all(engine.tokens <= 16 for engine in engines)
    assert "market" not in plans[3][-1].why


async def test_samples_that_no_share_bounds_are_counted_as_they_are():
    _, _, market, engines = await solved(
        [SPLIT] * 3, limits=Limits(tokens=300), equal=True, strategy=BestOfN(n=5)
    )
    assert market.budget.samples == sum(engine.calls for engine in engines) == 15


async def test_a_cancelled_prompt_gives_back_what_it_holds():
    market = Market(Budget(Limits(tokens=100)), prompts=2, running=1)
    share = Limits(tokens=50)

    async def hold() -> None:
        with Bidder(market, 0, share=share) as bidder:
            await bidder.probe(PROBE)
            await asyncio.sleep(60)

    async def wait() -> int:
        with Bidder(market, 1, share=share) as bidder:
            return (await bidder.probe(PROBE))[0]

    holding, waiting = asyncio.create_task(hold()), asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    assert market.budget.reserved > 0
    holding.cancel()
    assert await waiting == 2
    assert (market.budget.reserved, market.budget.spent) == (0, 0)
