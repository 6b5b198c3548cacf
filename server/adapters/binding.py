"""A request's names of adapters become the versions that serve it, to its end."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

from server import metrics
from server.run import Selection
from server.verifiers.catalogue import adapters, talkers
from server.wire import JSON
from strategies.core.errors import InvalidRequest, NotFound


class Names(Protocol):
    """What names mean."""

    @property
    def most(self) -> int:
        """Versions that the engine holds at once."""
        ...

    async def look(self, *, at_once: bool = False) -> None:
        """See what others have changed, now or where that was not seen lately."""
        ...

    def meant(self, name: str) -> str | None:
        """A version that a name means; None for a name that is none of ours."""
        ...

    def held(self, version: str) -> AbstractAsyncContextManager[None]:
        """Have a version in the engine while the block lasts."""
        ...


@asynccontextmanager
async def bound(
    names: Names | None, body: JSON, selection: Selection | None, *, counted: bool = True
) -> AsyncGenerator[JSON]:
    """The body with versions in place of names; they stay in the engine while the block lasts.

    The same object comes back if nothing in it is a name. A name means one version in all of a
    request.

    Raises:
        InvalidRequest: It needs more versions than the engine holds, or one cannot be served.
        NotFound: A version is no longer there.
        Busy: As many others are in use as there may be.
    """
    if names is None:
        yield body
        return
    await names.look()
    asked, inner = body.get("model"), list[str]()
    if selection is not None:
        judges = (*adapters(selection.verifier), *talkers(selection.verifier))
        inner = [*selection.strategy.drawn_from(), *judges]
    every = [asked, *inner] if isinstance(asked, str) else inner
    async with AsyncExitStack() as stack:
        try:
            meant = await _held(names, every, stack)
        except NotFound:  # it was moved and deleted since the last look
            await names.look(at_once=True)
            meant = await _held(names, every, stack)
        for name, version in meant.items():
            if counted and name != version:
                metrics.aliased(name, version)
        if selection is not None:
            own = {name: meant[name] for name in inner if name in meant}
            selection.versions = {name: version for name, version in own.items() if version != name}
        if isinstance(asked, str) and meant.get(asked, asked) != asked:
            body = body | {"model": meant[asked]}
        yield body


async def _held(names: Names, every: Iterable[str], stack: AsyncExitStack) -> dict[str, str]:
    """By name, the version that it means, held by the stack."""
    meant = {name: names.meant(name) for name in every}
    found = {name: version for name, version in meant.items() if version is not None}
    versions = sorted(set(found.values()))
    if len(versions) > names.most:
        raise InvalidRequest(
            f"the request needs {len(versions)} adapters, and the engine holds {names.most} "
            "(--max-cpu-loras)",
            field="strategy",
        )
    for version in versions:
        await stack.enter_async_context(names.held(version))
    return found
