"""Names of adapters before a fleet: an alias flip reaches all, and no request mixes versions."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.adapters.registry import Registry
from server.settings import Settings
from strategies.core.testing import FakeEngine
from tests.server.fake_upstream import MODEL, FakeUpstream
from tests.server.test_gateway_fleet import BODY, CHAT, TEXTS, before


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "registry")
    for digest in ("a" * 64, "b" * 64):
        with found.incoming() as folder:
            (folder / "adapter_config.json").write_text("{}")
            found.publish("math", folder, digest)
    found.point("prod", {OLD: 1.0}, {})
    return found


OLD, NEW = f"math@{'a' * 12}", f"math@{'b' * 12}"


def drawn(one: FakeUpstream) -> list[str]:
    return [body["model"] for body in one.bodies("/v1/completions") if body.get("stream")]


async def test_a_search_ends_on_the_version_that_it_began_with(registry: Registry):
    one = FakeUpstream(FakeEngine(TEXTS, delay=lambda index: 0.1))
    settings = Settings(adapters=registry.root, max_running_candidates=1)  # one after the other
    async with before([one], settings) as (client, _), asyncio.timeout(20):
        first = asyncio.ensure_future(client.post(CHAT, json=BODY | {"model": "prod"}))
        while not drawn(one):
            await asyncio.sleep(0.01)
        registry.point("prod", {NEW: 1.0}, {})
        await asyncio.sleep(0.3)
        second = await client.post(CHAT, json=BODY | {"model": "prod"})
        done = await first
        assert (done.json()["model"], second.json()["model"]) == (OLD, NEW)
        assert done.json()["mull"]["adapter"] == OLD
        assert drawn(one).count(OLD) == 4
        assert drawn(one).count(NEW) == 4


async def test_a_request_without_a_strategy_names_the_version_too(registry: Registry):
    one = FakeUpstream(FakeEngine(TEXTS))
    async with before([one], Settings(adapters=registry.root)) as (client, _):
        plain = {name: BODY[name] for name in ("messages", "max_tokens")} | {"model": "prod"}
        await client.post(CHAT, json=plain)
        assert [body["model"] for body in one.bodies(CHAT)] == [OLD]
        listed = (await client.get("/v1/models")).json()["data"]
        assert {card["id"] for card in listed} == {MODEL, "prod", OLD, NEW}


async def test_samples_of_several_adapters_keep_their_versions(registry: Registry):
    one = FakeUpstream(FakeEngine(TEXTS))
    strategy: dict[str, Any] = {"kind": "best_of_n", "n": 4, "models": ["prod", MODEL]}
    strategy["verifier"] = {"kind": "regex", "pattern": "5"}
    async with before([one], Settings(adapters=registry.root)) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"strategy": strategy})
        assert reply.status_code == 200, reply.text
        assert set(drawn(one)) == {OLD, MODEL}
        strategy["models"] = ["prud", MODEL]
        reply = await client.post(CHAT, json=BODY | {"strategy": strategy})
        assert reply.status_code == 400
        assert "did you mean 'prod'" in reply.json()["error"]["message"]


async def test_what_judges_says_how_in_the_registry(registry: Registry):
    one = FakeUpstream(FakeEngine(TEXTS))
    strategy = {"kind": "best_of_n", "n": 4, "verifier": {"kind": "adapter", "adapter": "prod"}}
    async with before([one], Settings(adapters=registry.root)) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"strategy": strategy})
        assert reply.status_code == 400
        assert "does not judge" in reply.json()["error"]["message"]
    async with before([one]) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"strategy": strategy})
        assert reply.status_code == 400
        assert "MULL_ADAPTERS" in reply.json()["error"]["message"]
