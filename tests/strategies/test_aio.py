"""Work started together ends together: nothing outlives its block, and failures keep their type."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core.aio import Arrivals, Background


class Broken(Exception):
    pass


async def after(turns: int, value: int) -> int:
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


async def fail(turns: int, error: BaseException) -> int:
    await after(turns, 0)
    raise error


class Stubborn:
    """Work that needs some turns to clean up after it was cancelled."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0

    async def work(self, turns: int = 5) -> int:
        self.begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            await after(turns, 0)
            self.ended += 1
        raise AssertionError("unreachable")


def others() -> set[asyncio.Task[object]]:
    """Tasks besides the test's own."""
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def test_results_come_in_the_order_of_arrival():
    async with Arrivals[int]() as arrivals:
        for turns in (9, 1, 5):
            arrivals.start(after(turns, turns))
        assert [turns async for turns in arrivals] == [1, 5, 9]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12))
def test_every_result_arrives_once(turns: list[int]):
    async def main() -> list[int]:
        async with Arrivals[int]() as arrivals:
            for number, wait in enumerate(turns):
                arrivals.start(after(wait, number))
            return [number async for number in arrivals]

    assert sorted(asyncio.run(main())) == list(range(len(turns)))


async def test_work_added_while_iterating_arrives_too():
    async with Arrivals[int]() as arrivals:
        arrivals.start(after(1, 3))
        seen: list[int] = []
        async for value in arrivals:
            seen.append(value)
            if value:
                arrivals.start(after(0, value - 1))
    assert seen == [3, 2, 1, 0]


async def test_pending_counts_what_is_still_to_be_iterated_over():
    async with Arrivals[int]() as arrivals:
        arrivals.start(after(0, 1))
        arrivals.start(after(2, 2))
        assert arrivals.pending == 2
        await asyncio.sleep(0.01)  # both are done, none is taken
        assert arrivals.pending == 2
        await anext(arrivals)
        assert arrivals.pending == 1
        await anext(arrivals)
        assert arrivals.pending == 0
        with pytest.raises(StopAsyncIteration):
            await anext(arrivals)


async def test_leaving_the_block_cancels_and_waits_for_the_very_end():
    stubborn = Stubborn()
    async with Arrivals[int]() as arrivals:
        for _ in range(3):
            arrivals.start(stubborn.work())
        arrivals.start(after(1, 1))
        await anext(arrivals)
    assert (stubborn.begun, stubborn.ended) == (3, 3)
    assert not others()


async def started(*works: Coroutine[object, object, int]) -> list[int]:
    """The results of all of them."""
    async with Arrivals[int]() as arrivals:
        for work in works:
            arrivals.start(work)
        return [result async for result in arrivals]


async def test_the_first_failure_is_raised_as_itself_and_ends_the_rest():
    stubborn = Stubborn()
    broken = Broken("first")
    with pytest.raises(Broken) as caught:
        await started(stubborn.work(), fail(4, Broken("second")), fail(1, broken))
    assert caught.value is broken
    assert stubborn.ended == 1
    assert not others()


async def test_a_second_failure_that_nobody_asks_for_is_not_reported_as_lost():
    lost: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, report: lost.append(report))
    with pytest.raises(Broken, match="first"):
        await started(fail(0, Broken("first")), fail(0, Broken("second")))
    gc.collect()
    assert lost == []


async def test_an_error_of_the_block_itself_ends_the_rest_and_stays_what_it_is():
    stubborn = Stubborn()

    async def consume() -> None:
        async with Arrivals[int]() as arrivals:
            arrivals.start(stubborn.work())
            await asyncio.sleep(0)
            raise Broken

    with pytest.raises(Broken):
        await consume()
    assert stubborn.ended == 1


async def test_work_that_cancels_itself_fails_instead_of_hanging_whoever_waits_for_it():
    with pytest.raises(RuntimeError, match="cancelled from inside"):
        await asyncio.wait_for(started(fail(1, asyncio.CancelledError())), timeout=5)


@settings(deadline=None)
@given(
    turns=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    moments=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_cancelled_at_any_moment_even_twice_it_ends_all_that_began(
    turns: list[int], moments: list[int]
):
    async def main() -> None:
        stubborn = Stubborn()

        async def consume() -> None:
            async with Arrivals[int]() as arrivals:
                for wait in turns:
                    arrivals.start(stubborn.work(wait))
                async for _ in arrivals:
                    pass

        task = asyncio.create_task(consume())
        for moment in moments:
            await after(moment, 0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stubborn.ended == stubborn.begun
        assert not others()

    asyncio.run(main())


async def test_a_failure_while_being_cancelled_does_not_replace_the_cancellation():
    async def clumsy() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            raise Broken

    async def consume() -> None:
        async with Arrivals[int]() as arrivals:
            arrivals.start(clumsy())
            await anext(arrivals)

    task = asyncio.create_task(consume())
    await after(3, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [after, fail])
async def test_background_work_ends_with_its_block(
    leave: Callable[[int, BaseException], Awaitable[int]],
):
    stubborn = Stubborn()
    try:
        async with Background(stubborn.work()) as task:
            await asyncio.sleep(0)
            await leave(0, Broken())
    except Broken:
        pass
    assert task.done()
    assert (stubborn.begun, stubborn.ended) == (1, 1)


async def test_background_work_can_be_awaited():
    async with Background(after(2, 7)) as task:
        assert await task == 7
