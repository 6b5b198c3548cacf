"""Names become versions: looked up for every caller, the same for all of a request."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from server.adapters.binding import bound
from strategies.core.errors import NotFound


class Moving:
    """An alias that means the newest version once somebody looks; the older ones are gone."""

    most = 2

    def __init__(self) -> None:
        self.looks = 0
        self.holding: list[str] = []

    async def look(self, *, at_once: bool = False) -> None:
        self.looks += 2 if at_once else 1

    def meant(self, name: str) -> str | None:
        return f"a@{self.looks}" if name == "prod" else None

    @asynccontextmanager
    async def held(self, version: str) -> AsyncGenerator[None]:
        if version == "a@1":
            raise NotFound("it was deleted")
        self.holding.append(version)
        yield
        self.holding.remove(version)


async def test_names_are_looked_up_and_again_where_one_was_moved_meanwhile():
    names = Moving()
    async with bound(names, {"model": "prod", "n": 1}, None) as body:
        assert body == {"model": "a@3", "n": 1}
        assert names.holding == ["a@3"]
    assert names.holding == []


@pytest.mark.parametrize("body", [{"model": "base"}, {"model": 5}, {}])
async def test_what_is_no_name_passes_as_it_is(body):
    async with bound(Moving(), body, None) as same:
        assert same is body
    async with bound(None, body, None) as same:
        assert same is body
