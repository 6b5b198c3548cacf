"""Two real servers behind the gateway: one that aborts less, a router before both, one killed."""

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
VOTE = {"kind": "self_consistency", "n": 4, "early_stop": "never", "start": "all"}


def asked(at: int, **more: Any) -> dict[str, Any]:
    question = f"Tom has {at + 10} apples. At the park he finds 7. How many apples has Tom now?"
    return {
        "model": "mull-tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 120,
        "seed": at,
        "strategy": VOTE,
        **more,
    }


@pytest.fixture(scope="module")
def second(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server without the route that aborts by name."""
    with serve(tmp_path_factory.mktemp("second") / "log") as served:
        yield served


@pytest.fixture
def router(server, second, tmp_path) -> Iterator[str]:
    """vllm-router before both, by session."""
    if importlib.util.find_spec("vllm_router") is None:
        pytest.skip("vllm-router is not installed")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], two.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm_router.launch_router", "--policy", "consistent_hash"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
        *("--worker-urls", server.url, second.url),
    ]
    with (tmp_path / "router").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not _models(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, (tmp_path / "router").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "router").read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _models(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


async def test_a_replica_that_aborts_by_closing_loses_little(second, stand_before, tmp_path):
    """What it generated until it saw that nobody listens is not known to the gateway."""

    async def generated(client: httpx.AsyncClient) -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        found = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    with stand_before(tmp_path / "gateway", second.url) as gateway:
        async with (
            httpx.AsyncClient(base_url=gateway.url, timeout=120) as client,
            httpx.AsyncClient(base_url=second.url, timeout=120) as engine,
        ):
            await client.post(CHAT, json=asked(0))
            start = await generated(engine)
            more = {"budget": {"seconds": 1.0}, "max_tokens": 900, "min_tokens": 900}
            reply = await client.post(CHAT, json=asked(1, **more))
            assert reply.json()["mull"]["stopped"] == "deadline"
            await asyncio.sleep(1.0)
            told = reply.json()["usage"]["completion_tokens"]
            assert told <= await generated(engine) - start <= told + 4 * 64


async def test_siblings_share_a_prefix_cache_behind_a_router(router, stand_before, tmp_path):
    with stand_before(tmp_path / "gateway", router) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as client:
            steps = {"kind": "beam_search", "width": 2, "branch": 2, "verifier": "likelihood"}
            found = []
            for at in range(6):
                reply = await client.post(CHAT, json=asked(at + 100, strategy=steps))
                assert reply.status_code == 200, reply.text
                usage = reply.json()["mull"]["usage"]
                cached, all_ = (
                    usage[f"continuation_{which}_tokens"] for which in ("cached", "prompt")
                )
                found.append(cached / all_)
            assert min(found) > 0.3, found


async def test_a_killed_replica_costs_what_it_had_begun_and_no_more(
    server, second, stand_before, tmp_path
):
    with stand_before(tmp_path / "gateway", server.url, second.url) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as client:
            alone = [(await client.post(CHAT, json=asked(at))).json() for at in range(8)]
            long = {"max_tokens": 700, "min_tokens": 700}
            begun = [
                asyncio.ensure_future(client.post(CHAT, json=asked(at, **long))) for at in range(8)
            ]
            await asyncio.sleep(1.0)
            for one in second.family():
                one.kill()
            # These come while nobody knows yet that it is dead.
            fresh = await asyncio.gather(*(client.post(CHAT, json=asked(at)) for at in range(24)))
            assert [one.status_code for one in fresh] == [200] * 24
            for before, after in zip(alone, fresh, strict=False):
                assert after.json()["mull"]["answer"] == before["mull"]["answer"]
            ended = [await one for one in begun]
            assert set(Counter(one.status_code for one in ended)) == {200, 503}
            for one in ended:
                if one.status_code == 503:
                    assert one.json()["error"]["type"] == "service_unavailable"
            assert (await client.get("/health")).status_code == 200
