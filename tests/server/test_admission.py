"""Slots for candidates: never more than there are, fair between requests, none lost."""

import asyncio
from contextlib import ExitStack, aclosing

import pytest

from server.admission import Admission
from server.keys.accounts import Account
from server.keys.keyring import Key
from strategies.core.errors import Busy
from strategies.core.testing import FakeEngine
from strategies.core.types import Generation

TEXT = "one two three"


def generation(index: int) -> Generation:
    return Generation(index=index, token_ids=(1,), max_tokens=10)


async def read(engine, index: int, log: list[str] | None = None, name: str = "") -> str | None:
    reason = None
    async with aclosing(engine.generate(generation(index))) as chunks:
        async for chunk in chunks:
            if log is not None and reason is None and chunk.token_ids:
                log.append(name)
            reason = chunk.finish_reason or "growing"
    return reason


async def test_never_more_candidates_than_slots_and_every_one_is_served():
    admission = Admission(requests=9, candidates=3)
    engine = FakeEngine([TEXT])
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, engine.running)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    with admission.admit(engine) as one, admission.admit(engine) as other:
        ended = await asyncio.gather(*(read(side, i) for i in range(10) for side in (one, other)))
    watching.cancel()
    assert ended == ["stop"] * 20
    assert most == 3
    assert admission.candidates == 0


async def test_a_short_request_overtakes_the_tail_of_a_long_one():
    admission = Admission(requests=9, candidates=1)
    engine, log = FakeEngine([TEXT]), []
    with admission.admit(engine) as long, admission.admit(engine) as short:
        first = [asyncio.create_task(read(long, i, log, "long")) for i in range(8)]
        await asyncio.sleep(0)
        then = [asyncio.create_task(read(short, i, log, "short")) for i in range(2)]
        await asyncio.gather(*first, *then)
    assert len(log) == 10
    assert [place for place, name in enumerate(log) if name == "short"][-1] <= 4


async def test_newcomers_without_end_do_not_starve_a_long_request():
    admission = Admission(requests=1000, candidates=1)
    engine, log = FakeEngine([TEXT]), []
    over = False

    async def newcomers() -> None:
        while not over:
            with admission.admit(engine) as fresh:
                await read(fresh, 0, log, "new")

    with admission.admit(engine) as long:
        crowd = [asyncio.create_task(newcomers()) for _ in range(5)]
        await asyncio.sleep(0.01)
        began = len(log)
        async with asyncio.timeout(10):
            await asyncio.gather(*(read(long, i, log, "long") for i in range(16)))
    over = True
    await asyncio.gather(*crowd)
    served = log[began:]
    assert served.count("long") == 16
    assert served.count("new") <= 16 * 6  # its share, one turn in six, and no less


async def test_an_aborted_or_cancelled_wait_gives_nothing_and_loses_no_slot():
    admission = Admission(requests=9, candidates=1)
    engine = FakeEngine([TEXT], delay=lambda index: 0.01)
    with admission.admit(engine) as search:
        holding = asyncio.create_task(read(search, 0))
        aborted = asyncio.create_task(read(search, 1))
        cancelled = asyncio.create_task(read(search, 2))
        last = asyncio.create_task(read(search, 3))
        await asyncio.sleep(0.001)
        await search.abort([1])
        cancelled.cancel()
        assert await aborted == "abort"
        assert await read(search, 1) == "abort"  # also if it asks again
        assert await holding == "stop"
        assert await last == "stop"
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    assert engine.calls == 2
    assert admission.candidates == 0


async def test_one_request_too_many_is_told_when_to_come_again():
    admission = Admission(requests=1, candidates=1)
    admission.check()
    with admission.admit(FakeEngine([TEXT])):
        with pytest.raises(Busy) as caught:
            admission.check()
        assert 1 <= caught.value.seconds <= 60
    admission.check()


async def test_a_key_with_many_requests_gets_no_more_than_one_with_one():
    admission = Admission(requests=9, candidates=1)
    engine, log = FakeEngine([TEXT]), []
    many, few = Account(), Account()
    key = Key(name="a", digest="0" * 64)
    with ExitStack() as stack:
        asking = [("many", many)] * 4 + [("few", few)]
        tabs = [(name, stack.enter_context(account.enter(key))) for name, account in asking]
        engines = [
            (name, stack.enter_context(admission.admit(engine, None, tab))) for name, tab in tabs
        ]
        await asyncio.gather(*(read(one, i, log, name) for name, one in engines for i in range(5)))
    served = log[:10]  # while both want some
    assert 4 <= served.count("few") <= 6
