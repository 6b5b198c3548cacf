"""What every strategy obeys. One that is in the registry is held to it, in all its variants."""

import asyncio
import selectors
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from itertools import product
from math import prod
from random import Random
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from zlib import crc32

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.compute_optimal import ComputeOptimal
from strategies.core.budget import Limits
from strategies.core.context import LATE_SECONDS
from strategies.core.errors import EngineUnavailable, NoCandidate, VerifierFailed
from strategies.core.events import (
    Aborted,
    Chosen,
    Committed,
    Event,
    Grown,
    Read,
    Sampled,
    Started,
)
from strategies.core.strategy import Strategy
from strategies.core.testing import FakeEngine, FakeVerifier, context
from strategies.core.types import Candidate, Generation, Outcome, Problem
from strategies.registry import ANY_STRATEGY, STRATEGIES
from tests.strategies.test_calibration import calibration

T = TypeVar("T")

PROBLEM = Problem(token_ids=(1, 2, 3), text="How many?", max_tokens=12, seed=7)
N = 6
SMALL: dict[str, object] = {
    "n": N,
    "answer": {"kind": "math"},
    "width": 2,
    "branch": 2,
    "max_step_tokens": 5,
    "max_steps": 4,
    "max_depth": 3,
    "max_nodes": 12,
    "solutions": 2,
    "evaluations": 2,
    "warmup": 2,
    "group": 2,
    "eta": 0.5,
}
"""Whatever a strategy has of these."""
MORE: dict[tuple[str, object], dict[str, object]] = {
    ("early_stop", "window"): {"window": 2},
    ("early_stop", "confidence"): {"confidence": 0.8},
    ("allocate", "balanced"): {"lookahead": 1},
    ("allocate", "diverse"): {"lookahead": 2},
}
"""What goes with a choice; small, so that a vote can be decided early and wrongly."""
MOST = 24
"""Variants of one strategy; of more, one choice at a time is tried, and each pair of choices."""


# --- the variants of every strategy: each value of each literal field, with each of the others


def choices(kind: type[Strategy]) -> dict[str, tuple[object, ...]]:
    """The fields of a strategy that are a choice among few, with the choices."""
    found: dict[str, tuple[object, ...]] = {}
    for name, field in kind.model_fields.items():
        if get_origin(field.annotation) is Literal and name != "kind":
            found[name] = get_args(field.annotation)
        elif field.annotation is bool:
            found[name] = (False, True)
    return found


def variants(kind: type[Strategy]) -> list[Strategy]:
    """Combinations of choices that it accepts, with a verifier where it asks for one."""
    fields = choices(kind)
    size = {field: value for field, value in SMALL.items() if field in kind.model_fields}
    by_token = {field: value for field, value in size.items() if field in ("width", "answer")}
    found: list[Strategy] = []
    sizes = [len(values) for values in fields.values()]
    for places in product(*map(range, sizes)):
        values = [few[at] for few, at in zip(fields.values(), places, strict=True)]
        usual = [kind.model_fields[field].default for field in fields]
        unusual = sum(a != b for a, b in zip(values, usual, strict=True))
        if prod(sizes) > MOST and sum(places) % max(sizes) and unusual > 1:
            continue
        chosen = dict(zip(fields, values, strict=True))
        for choice in list(chosen.items()):
            chosen |= MORE.get(choice, {})
        unasked = {field: value for field, value in size.items() if field != "evaluations"}
        for more in (size, size | {"verifier": "fake"}, unasked, by_token):
            with suppress(ValidationError):
                found.append(kind.model_validate({**chosen, **more}))
                break
        with suppress(ValidationError):  # one that may do without a verifier, with one
            judged = kind.model_validate({**chosen, **size, "verifier": "fake"})
            if found[-1].judged_by() is None:
                found.append(judged)
    return found


def name(strategy: Strategy) -> str:
    values = [str(getattr(strategy, field)) for field in choices(type(strategy))]
    return "-".join([strategy.kind, *values])


VARIANTS = [variant for kind in STRATEGIES.values() for variant in variants(kind)]
JUDGED = [variant for variant in VARIANTS if variant.judged_by()]
each = pytest.mark.parametrize("strategy", VARIANTS, ids=name)
each_judged = pytest.mark.parametrize("strategy", JUDGED, ids=name)


def test_every_choice_of_every_strategy_has_a_variant():
    for kind in STRATEGIES.values():
        tried = [variant for variant in VARIANTS if type(variant) is kind]
        assert tried
        for field, values in choices(kind).items():
            assert {getattr(variant, field) for variant in tried} == set(values)


# --- a loop in which waiting takes no time, and waiting for nothing is an error


class Skipping(selectors.DefaultSelector):
    """A selector that, instead of waiting, puts the clock forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            if not (ready := super().select(10)):  # the sandbox's processes are real
                raise AssertionError("this run would hang: nothing is left that could wake it")
            return ready
        self.now += max(0.0, timeout)
        return super().select(0)


class SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


def live(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(work)


# --- one watched run


class Story:
    """What the model writes, how fast, and what the verifier thinks of it; all by index."""

    def __init__(
        self,
        samples: Sequence[tuple[int, str | None]],
        delays: Sequence[float],
        eighths: Sequence[int],
        reads: bool = False,
    ) -> None:
        self.samples = samples
        self.delays = delays
        self.eighths = eighths
        self.reads = reads

    def __repr__(self) -> str:
        return f"Story({self.samples}, {self.delays}, {self.eighths}, {self.reads})"

    def text(self, generation: Generation) -> str:
        words, answer = self.samples[generation.index % len(self.samples)]
        unanswered = "" if generation.until is None else f"so{generation.until}"
        return "so " * words + (unanswered if answer is None else rf"\boxed{{{answer}}}")

    def delay(self, index: int) -> float:
        return self.delays[index % len(self.delays)]

    def score(self, candidate: Candidate) -> float:
        return self.eighths[crc32(candidate.text.encode()) % len(self.eighths)] / 8


samples = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from(["1", "2", "3", None])), min_size=1, max_size=N
)
eighths = st.lists(st.integers(0, 8), min_size=1, max_size=N)


def delays(*values: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=N)


stories = st.builds(Story, samples, delays(0.0, 0.25, 1.0), eighths, st.booleans())
slow_stories = st.builds(Story, samples, delays(0.25, 0.5, 1.5), eighths, st.booleans())
limits = st.builds(
    Limits, tokens=st.integers(1, 80) | st.none(), samples=st.integers(1, 2 * N) | st.none()
)


class Watched:
    """A strategy, an engine that tells this story, and a context that is checked at every event."""

    def __init__(
        self,
        strategy: Strategy,
        story: Story,
        limits: Limits | None = None,
        *,
        engine: FakeEngine | None = None,
        verifier: FakeVerifier | None = None,
    ) -> None:
        self.strategy = strategy
        self.limits = limits or Limits()
        self.engine = engine or FakeEngine(story.text, delay=story.delay)
        self.loop = asyncio.get_running_loop()
        self.ctx = context(
            self.engine,
            limits=self.limits,
            verifier=(verifier or FakeVerifier(story.score, reads=story.reads))
            if strategy.judged_by()
            else None,
            answer_format=strategy.answer,
            clock=self.loop.time,
        )
        if isinstance(strategy, ComputeOptimal) and strategy.judged_by():
            self.ctx.calibration = calibration("weighted")  # without one, nobody judges
        self.record = self.ctx.emit
        self.ctx.emit = self.watch

    def watch(self, event: Event) -> None:
        budget = self.ctx.budget
        if self.limits.tokens is not None:
            assert budget.spent + budget.reserved <= self.limits.tokens
        if isinstance(event, Started) and budget.seconds_left is not None:
            assert budget.seconds_left > 0, "nothing starts after the deadline"
        self.record(event)

    async def solve(self) -> Outcome:
        """The whole run; what must hold after any run is checked, also if it fails."""
        async with self.ctx:
            try:
                outcome = await self.strategy.solve(PROBLEM, self.ctx)
            except BaseException:
                self.check()
                raise
            self.check(outcome)
            return outcome

    def check(self, outcome: Outcome | None = None) -> None:
        events, budget = self.ctx.events, self.ctx.budget
        assert self.engine.running == 0, "nothing runs in the engine"
        started = {event.index: event.tokens for event in events if isinstance(event, Started)}
        ended: dict[int, int] = {}
        written = read = 0
        for event in events:
            match event:
                case Sampled(candidate=candidate):
                    assert candidate.index not in ended, "a sequence ends once"
                    ended[candidate.index] = candidate.drawn
                case Aborted():
                    assert event.index not in ended, "a sequence ends once"
                    ended[event.index] = event.tokens
                case Grown():
                    written += len(event.chunk.token_ids)
                case Read():
                    read += event.tokens
                case _:
                    pass
        assert started.keys() == ended.keys(), "whatever starts ends"
        assert all(ended[index] <= started[index] for index in started)
        assert sum(ended.values()) == written
        assert written + read == self.engine.tokens == budget.spent
        assert budget.reserved == 0
        reads = sum(isinstance(event, Read) for event in events)
        assert self.engine.calls <= len(started) + reads
        if self.limits.tokens is not None:
            assert budget.spent <= self.limits.tokens
        if self.limits.samples is not None:
            assert len(started) <= self.limits.samples

        chosen = [event for event in events if isinstance(event, Chosen)]
        if outcome is None:
            assert not chosen
            return
        returned = tuple(candidate.index for candidate in outcome.ranked)
        assert chosen == [
            Chosen(index=outcome.chosen.index, stopped=outcome.stopped, returned=returned)
        ]
        assert returned[0] == outcome.chosen.index
        committed = [event.index for event in events if isinstance(event, Committed)]
        assert committed in ([], [outcome.chosen.index]), "what is streamed is what wins"
        assert events[-1] == chosen[0]
        assert outcome.chosen in outcome.candidates
        indices = [candidate.index for candidate in outcome.candidates]
        assert len(set(indices)) == len(indices)
        finished = [event.candidate for event in events if isinstance(event, Sampled)]
        drawn = {candidate.index for candidate in finished}
        if not self.strategy.scores_tokens():  # thoughts from another conversation are no samples
            pass
        elif getattr(self.strategy, "level", "step") == "token":  # made of what was likely
            assert {candidate.index for candidate in outcome.candidates} <= drawn
        else:
            assert all(candidate in finished for candidate in outcome.candidates)


def asks(strategy: Strategy) -> bool:
    """Whether it asks the model in words, for other things than an answer."""
    words = getattr(strategy, "evaluate", "verifier") != "verifier"
    return words or not strategy.scores_tokens()


def may_decide(strategy: Strategy) -> bool:
    """Whether it may be over before its last sample."""
    rule = getattr(strategy, "early_stop", "never")
    return rule != "never" or strategy.kind in ("deep_confidence", "self_refine")


def tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


# --- the rules


@each
def test_the_wire_form_round_trips(strategy: Strategy):
    assert ANY_STRATEGY.validate_json(ANY_STRATEGY.dump_json(strategy)) == strategy
    short = {"kind": strategy.kind, **strategy.model_dump(exclude_unset=True)}
    assert ANY_STRATEGY.validate_python(short) == strategy


def test_the_registry_names_every_strategy_by_its_kind_and_no_other():
    union, _ = get_args(ANY_STRATEGY._type)
    members = get_args(union) if get_origin(union) in (Union, UnionType) else (union,)
    assert {member.model_fields["kind"].default: member for member in members} == STRATEGIES


@each
@settings(deadline=None, max_examples=20)
@given(story=stories, limits=limits)
def test_no_run_overspends_and_every_run_adds_up(strategy: Strategy, story: Story, limits: Limits):
    async def main() -> None:
        watched = Watched(strategy, story, limits)
        outcome = await watched.solve()
        assert not tasks()
        if limits == Limits():
            assert outcome.stopped in ("samples", "decided")

    live(main())


@each
@settings(deadline=None, max_examples=20)
@given(
    story=stories,
    limits=limits,
    pauses=st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 1.1, 5.0]), st.integers(0, 12)), min_size=1, max_size=2
    ),
    thinking=st.sampled_from([0.0, 0.5]),
)
def test_cancelled_at_any_moment_it_adds_up_and_nothing_runs_on(
    strategy: Strategy,
    story: Story,
    limits: Limits,
    pauses: list[tuple[float, int]],
    thinking: float,
):
    async def main() -> None:
        watched = Watched(
            strategy,
            story,
            limits,
            verifier=FakeVerifier(story.score, seconds=thinking, reads=story.reads),
        )
        solving = asyncio.create_task(watched.solve())
        for seconds, turns in pauses:
            await asyncio.sleep(seconds)
            for _ in range(turns):
                await asyncio.sleep(0)
            solving.cancel()
        with suppress(asyncio.CancelledError):
            await solving
        assert not tasks()
        calls, tokens = watched.engine.calls, watched.engine.tokens
        assert watched.engine.running == 0
        await asyncio.sleep(60)
        assert (calls, tokens) == (watched.engine.calls, watched.engine.tokens)

    live(main())


@each
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1_000),
    answers=st.integers(1, 3),
    limits=st.builds(Limits, samples=st.integers(1, N) | st.none()),
    one=delays(0.0, 0.25, 1.0),
    other=delays(0.0, 0.25, 1.0),
    eighths=eighths,
)
def test_same_seed_same_answer_however_fast_each_sample_is(
    strategy: Strategy,
    seed: int,
    answers: int,
    limits: Limits,
    one: list[float],
    other: list[float],
    eighths: list[int],
):
    def write(generation: Generation) -> str:
        assert generation.seed is not None
        dice = Random(generation.seed * 1_000 + seed)
        words = "so " * dice.randrange(1, 14)
        last = "so\n" if generation.until else ""
        return words + dice.choice([last, *(rf"\boxed{{{n}}}" for n in range(answers))])

    async def main(delays: list[float]) -> str | None:
        story = Story([], delays, eighths)
        engine = FakeEngine(write, delay=story.delay)
        outcome = await Watched(strategy, story, limits, engine=engine).solve()
        return outcome.chosen.answer

    assert live(main(one)) == live(main(other))


@each
@settings(deadline=None, max_examples=20)
@given(story=slow_stories, quarters=st.integers(0, 40), thinking=st.sampled_from([0.0, 3.0]))
def test_the_deadline_is_kept_and_what_exists_by_then_is_the_answer(
    strategy: Strategy, story: Story, quarters: int, thinking: float
):
    seconds = quarters / 4 + 0.1  # no token falls on it
    judged = (thinking or story.reads) and strategy.judged_by()
    late = LATE_SECONDS if judged or asks(strategy) else 0.0

    async def main() -> None:
        verifier = FakeVerifier(story.score, seconds=thinking, reads=story.reads)
        watched = Watched(strategy, story, Limits(seconds=seconds), verifier=verifier)
        try:
            outcome = await watched.solve()
        except NoCandidate:
            assert watched.engine.tokens == 0 or asks(strategy)
            assert seconds - 1e-6 < watched.loop.time() < seconds + late + 1e-6
        else:
            assert watched.loop.time() < seconds + late + 1e-6
            if watched.loop.time() < seconds - 1e-6:
                assert outcome.stopped != "deadline"
            else:  # what the deadline cut may still have decided; a verdict may come a little late
                early = may_decide(strategy)
                assert outcome.stopped in ("deadline", early and "decided", late and "samples")

    live(main())


@each
def test_a_run_that_could_not_have_a_single_token_has_no_candidate(strategy: Strategy):
    async def main() -> None:
        watched = Watched(strategy, Story([(5, "1")], [3.0], [8]), Limits(seconds=2))
        with pytest.raises(NoCandidate):
            await watched.solve()
        assert not tasks()

    live(main())


@each
@settings(deadline=None, max_examples=20)
@given(story=stories, tokens=st.integers(1, N - 1))
def test_fewer_tokens_than_samples_still_give_an_answer(
    strategy: Strategy, story: Story, tokens: int
):
    story.samples = [(words + N, None) for words, _ in story.samples]

    async def main() -> None:
        watched = Watched(strategy, story, Limits(tokens=tokens))
        outcome = await watched.solve()
        assert outcome.stopped == "exhausted"

    live(main())


@each
@settings(deadline=None, max_examples=20)
@given(
    story=stories,
    failures=st.lists(
        st.tuples(st.integers(0, N - 1), st.integers(0, 6)), min_size=1, max_size=3, unique=True
    ),
)
@example(story=Story([(1, "1"), (1, "2"), (1, "3")], [0.0], [8]), failures=[(2, 1)])
def test_an_engine_failure_is_raised_as_itself_and_leaves_nothing_running(
    strategy: Strategy, story: Story, failures: list[tuple[int, int]]
):
    errors = {place: EngineUnavailable(f"call {place[0]}") for place in failures}

    async def main() -> None:
        engine = FakeEngine(story.text, delay=story.delay, failures=errors)
        with suppress(EngineUnavailable):  # a group of them, or another type, is not suppressed
            await Watched(strategy, story, engine=engine).solve()
        assert not tasks()

    live(main())


@each
def test_a_failure_at_once_is_never_lost(strategy: Strategy):
    error = EngineUnavailable("dead")

    async def main() -> None:
        story = Story([(3, "1")], [1.0], [8])
        engine = FakeEngine(story.text, delay=story.delay, failures={(0, 0): error})
        with pytest.raises(EngineUnavailable) as caught:
            await Watched(strategy, story, engine=engine).solve()
        assert caught.value is error

    live(main())


@each_judged
@settings(deadline=None, max_examples=20)
@given(story=stories, good=st.integers(0, N - 1), thinking=st.sampled_from([0.0, 0.5]))
def test_a_verifier_without_an_opinion_ends_the_run(
    strategy: Strategy, story: Story, good: int, thinking: float
):
    left = [0.5] * good

    def score(candidate: Candidate) -> float:
        if not left:
            raise VerifierFailed("no opinion")
        return left.pop()

    async def main() -> None:
        verifier = FakeVerifier(score, seconds=thinking)
        try:
            await Watched(strategy, story, verifier=verifier).solve()
        except VerifierFailed:
            assert not left
        else:
            assert len(verifier.judged) <= good
        assert not tasks()

    live(main())
