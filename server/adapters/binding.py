"""A request's names of adapters become the versions that serve it, to its end."""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

from server.run import Selection
from server.verifiers.catalogue import adapters, talkers
from server.wire import JSON


class Names(Protocol):
    """What names mean."""

    async def look(self) -> None:
        """See what others have changed."""
        ...

    def bound(self, name: str) -> AbstractAsyncContextManager[str]:
        """The version that a name means, ready while the block lasts; any other name is itself."""
        ...


@asynccontextmanager
async def bound(
    names: Names | None, body: JSON, selection: Selection | None
) -> AsyncGenerator[JSON]:
    """The body with versions in place of names; they stay in the engine while the block lasts.

    The same object comes back if nothing in it is a name.
    """
    async with AsyncExitStack() as stack:
        if names is not None:
            asked = body.get("model")
            if isinstance(asked, str):
                version = await stack.enter_async_context(names.bound(asked))
                body = body if version == asked else body | {"model": version}
            if selection is not None:
                judges = (*adapters(selection.verifier), *talkers(selection.verifier))
                for name in {*selection.strategy.drawn_from(), *judges}:
                    version = await stack.enter_async_context(names.bound(name))
                    if version != name:
                        selection.versions[name] = version
        yield body
