"""What every strategy obeys, over HTTP: the rules of the conformance suite, a remote engine."""

from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings

from server.gateway.engine import Asked, RemoteEngine
from server.gateway.fleet import Features, Fleet, Terms
from server.gateway.vocabulary import Vocabulary
from strategies.core.budget import Limits
from strategies.core.strategy import Strategy
from strategies.core.testing import FakeEngine
from strategies.core.types import Chunk, Generation, Turn
from strategies.self_consistency import SelfConsistency
from tests.server.fake_upstream import MODEL, FakeUpstream
from tests.strategies import test_conformance as rules
from tests.strategies.test_conformance import VARIANTS, Watched, name


class Spelled(Vocabulary):
    """The fake engine's tokens, which are too many to be spelled over HTTP."""

    fake: FakeEngine

    async def words(self, headers: Mapping[str, str]) -> Any:
        return self

    def __len__(self) -> int:
        return 1 << 32

    def __getitem__(self, token: int) -> str:
        return self.fake.words[token]


class OverHTTP(RemoteEngine):
    """A remote engine before a fake one."""

    def __init__(self, engine: FakeEngine, **upstream: Any) -> None:
        self.upstream = FakeUpstream(engine, **upstream)
        fleet = Fleet(["http://fake"], Terms(retries=0), transport=lambda url: self.upstream)
        [one] = fleet.upstreams
        one.cards = [{"id": MODEL}]
        one.features = Features(tokens=True, longest=10_000, aborts=self.upstream.aborts)
        vocabulary = Spelled(fleet, MODEL)
        vocabulary.fake = engine
        asked = Asked(model=MODEL, fields={}, key="k", headers={})
        super().__init__(fleet, vocabulary, asked, name="run", pieces=False)
        self.fake = engine
        vocabulary.ends += engine.ends

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        self.upstream.generations[f"run-{generation.index}"] = generation
        async with aclosing(super().generate(generation)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def tokens_with(self, text: str) -> Collection[int]:
        return await self.fake.tokens_with(text)

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        return await self.fake.render(turns)


class WatchedOverHTTP(Watched):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.ctx.engine = OverHTTP(self.engine)


RULES: list[Callable[..., Any]] = [
    rules.test_no_run_overspends_and_every_run_adds_up,
    rules.test_cancelled_at_any_moment_it_adds_up_and_nothing_runs_on,
    rules.test_same_seed_same_answer_however_fast_each_sample_is,
    rules.test_fewer_tokens_than_samples_still_give_an_answer,
    rules.test_an_engine_failure_is_raised_as_itself_and_leaves_nothing_running,
]


@pytest.fixture(autouse=True, scope="module")
def over_http() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "Watched", WatchedOverHTTP)
        yield


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("strategy", VARIANTS, ids=name)
def test_it_obeys_over_http_what_it_obeys_here(rule: Any, strategy: Strategy):
    drawn = rule.hypothesis._given_kwargs

    @settings(deadline=None, max_examples=2, database=None)
    @given(**drawn)
    def obeys(**story: Any) -> None:
        rule.hypothesis.inner_test(strategy=strategy, **story)

    obeys()


@pytest.mark.parametrize("turns", range(1, 22, 2))
def test_whoever_leaves_twice_still_pays_what_was_generated(turns: int):
    strategy = SelfConsistency(n=4, early_stop="never")
    story = rules.Story([(5, "1"), (10, "1")], [1.0, 0.0], [1])
    rule = rules.test_cancelled_at_any_moment_it_adds_up_and_nothing_runs_on.hypothesis.inner_test
    rule(strategy, story, Limits(), pauses=[(0.0, turns), (0.0, 0)], thinking=0)
