"""The only place that starts tasks."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Group:
    """A task group whose failure is the first task's own exception.

    So errors keep their HTTP status. Leaving the block cancels whatever still runs: what is
    wanted is awaited inside.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], done: Callable[[asyncio.Task[T]], None]) -> None:
        """Run `work` beside the block; `done` is called with the task once it has ended."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def finished(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # retrieved, so that it is not reported as lost
            done(task)

        task.add_done_callback(finished)

    async def over(self, seconds: float) -> None:
        """Wait until all work has ended by itself, `seconds` at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _cancel(*self._tasks)


class Arrivals(Generic[T]):
    """Results of work started together, in the order in which they arrive; an async iterator.

    Iterating raises the first failure. Leaving the block cancels what has not arrived and waits for
    its end.
    """

    def __init__(self) -> None:
        self._group = Group()
        self._queue: asyncio.Queue[asyncio.Task[T]] = asyncio.Queue()
        self.pending = 0
        """Results that are still to be iterated over."""

    @property
    def ready(self) -> bool:
        """Whether the next result is there already."""
        return not self._queue.empty()

    def start(self, work: Coroutine[Any, Any, T]) -> None:
        """Add work, also while iterating."""
        self.pending += 1
        self._group.start(work, self._queue.put_nowait)

    async def over(self, seconds: float) -> None:
        """Wait until all work has ended by itself, `seconds` at most."""
        await self._group.over(seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._group.__aexit__(kind, error, trace)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self.pending == 0:
            raise StopAsyncIteration
        task = await self._queue.get()
        self.pending -= 1
        if task.cancelled():  # not by us, and not to be taken for a client that went away
            raise RuntimeError("the work was cancelled from inside")
        return task.result()


class Background(Generic[T]):
    """One coroutine run beside the block; leaving the block cancels it and waits for its end."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work

    async def __aenter__(self) -> asyncio.Task[T]:
        self._task = asyncio.create_task(self._work)
        return self._task

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _cancel(self._task)


async def unbroken(
    work: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, None]] | None = None
) -> T:
    """Wait for `work` to its end, also when this very wait is cancelled; the cancellation follows.

    For what is short, and settles accounts or begins what must be ended: then `undo` is called
    with the result that nobody gets.
    """
    task = asyncio.create_task(work)
    try:
        await _ended(task)
    except asyncio.CancelledError:
        if undo is not None and not task.cancelled() and task.exception() is None:
            await unbroken(undo(task.result()))
        raise
    return task.result()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait until each task has really ended, also when this very wait is cancelled."""
    for task in tasks:
        task.cancel()
    await _ended(*tasks)


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    interrupted: asyncio.CancelledError | None = None
    for task in tasks:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                interrupted = error
        if not task.cancelled():
            with suppress(BaseException):
                task.exception()  # retrieved, so that it is not reported as lost
    if interrupted is not None:
        raise interrupted
