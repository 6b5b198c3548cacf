"""Who is in the engine: loaded once, kept while in use, dropped when idle, never under a user."""

import asyncio
from pathlib import Path

import pytest

from server.adapters.registry import Version
from server.adapters.residents import Residents
from strategies.core.errors import Busy


def version(id: str) -> Version:
    return Version(id=id, folder=Path(id), manifest=None)


class Loader:
    """An engine that takes its time, and refuses what holds no weights."""

    def __init__(self, most: int = 3) -> None:
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.residents = Residents(self.load, self.unload, most=most, patience_seconds=0.05)

    async def load(self, version: Version) -> None:
        await asyncio.sleep(0.001)
        if version.id == "broken":
            raise ValueError("no weights")
        assert version.id not in self.held
        self.held.add(version.id)
        self.loads.append(version.id)
        assert len(self.held) <= 3

    async def unload(self, id: str) -> None:
        assert id not in self.residents.in_use
        await asyncio.sleep(0.001)
        self.held.remove(id)


async def test_a_version_is_loaded_once_for_many_and_stays():
    loader = Loader()

    async def use() -> None:
        async with loader.residents.hold(version("a")):
            assert "a" in loader.held
            await asyncio.sleep(0.002)

    await asyncio.gather(*(use() for _ in range(20)))
    assert loader.loads == ["a"]
    assert loader.held == {"a"}
    assert loader.residents.in_use == {}


async def test_the_last_used_stay_and_those_in_use_always():
    loader = Loader()
    async with loader.residents.hold(version("used")):
        for id in "abcab":
            async with loader.residents.hold(version(id)):
                pass
        assert loader.held == {"used", "a", "b"}
        async with loader.residents.hold(version("a")), loader.residents.hold(version("b")):
            with pytest.raises(Busy, match="3 adapters are in use or pinned"):
                async with loader.residents.hold(version("c")):
                    pass
    async with loader.residents.hold(version("c")):
        assert loader.held == {"a", "b", "c"}


async def test_pinned_ones_never_make_room():
    loader = Loader()
    for id in "abc":
        async with loader.residents.hold(version(id)):
            pass
    loader.residents.mean({"a", "b", "c", "d"}, "abcd", pinned={"a", "c"})
    async with loader.residents.hold(version("d")):
        assert loader.held == {"a", "c", "d"}
        with pytest.raises(Busy, match="in use or pinned"):
            async with loader.residents.hold(version("b")):
                pass
    loader.residents.mean({"b", "c"}, "abcd", pinned={"a", "c"})  # no name means "a" any more
    await loader.residents.sweep()
    assert loader.held == {"c"}


async def test_a_load_waits_until_one_in_use_is_free():
    loader = Loader()

    async def use(id: str, seconds: float) -> None:
        async with loader.residents.hold(version(id)):
            await asyncio.sleep(seconds)

    await asyncio.gather(*(use(id, 0.02) for id in "abcdef"))
    assert set(loader.loads) == set("abcdef")


async def test_what_no_name_means_any_more_goes_when_drained():
    loader = Loader()
    every = {"old", "new", "direct", "deleted"}
    loader.residents.mean({"old"}, every)
    async with loader.residents.hold(version("old")), loader.residents.hold(version("direct")):
        loader.residents.mean({"new"}, every)
        await loader.residents.sweep()
        assert loader.held == {"old", "direct"}
    await loader.residents.sweep()
    assert loader.held == {"direct"}  # asked for by its own name
    loader.residents.mean({"direct"}, every)
    loader.residents.mean({"new"}, every)
    loader.residents.mean({"direct"}, every)  # rolled back before it was swept
    await loader.residents.sweep()
    assert loader.held == {"direct"}
    async with loader.residents.hold(version("deleted")):
        pass
    loader.residents.mean({"direct"}, every - {"deleted"})  # by another server
    await loader.residents.sweep()
    assert loader.held == {"direct"}


async def test_nobody_waits_for_anothers_load():
    loader = Loader()
    loader.residents.mean({"old"}, {"old"})
    async with loader.residents.hold(version("old")):
        loader.residents.mean(set(), {"old"})

    async def load() -> None:
        async with loader.residents.hold(version("a")):
            pass

    loading = asyncio.ensure_future(load())
    await asyncio.sleep(0)
    async with asyncio.timeout(0.0005):  # less than a load takes
        await loader.residents.sweep()
    await loading
    await loader.residents.sweep()
    assert loader.held == {"a"}


async def test_what_is_deleted_is_not_in_use():
    loader = Loader()
    async with loader.residents.hold(version("a")):
        with pytest.raises(Busy, match="in use by 1"):
            async with loader.residents.without("a"):
                pass
    async with loader.residents.without("a"):
        assert loader.held == set()
    async with loader.residents.without("never"):
        pass


async def test_a_failed_load_leaves_nothing_behind():
    loader = Loader()
    for _ in range(5):
        with pytest.raises(ValueError, match="no weights"):
            async with loader.residents.hold(version("broken")):
                pass
    assert "broken" not in loader.residents
    async with loader.residents.hold(version("a")):
        assert loader.residents.in_use == {"a": 1}


async def test_a_crowd_never_loses_a_version_under_it():
    loader = Loader()

    async def use(number: int) -> int:
        try:
            async with loader.residents.hold(version("abcdef"[number % 6])):
                assert "abcdef"[number % 6] in loader.held
                await asyncio.sleep(0.001 * (number % 3))
                assert "abcdef"[number % 6] in loader.held
        except Busy:
            return 0
        return 1

    served = 0
    for start in range(0, 300, 10):
        loader.residents.mean({"abcdef"[start // 10 % 6]}, "abcdef")
        served += sum(await asyncio.gather(*(use(at * 7) for at in range(start, start + 10))))
        await loader.residents.sweep()
    assert served > 250
    assert len(loader.held) <= 3
