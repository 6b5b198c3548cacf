"""A server's life: clients that hang up, an engine that dies, a signal to end."""

import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

# At temperature 2 with a banned end token the model rambles to the limit, so there is time to
# interfere.
LONG: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Tom has 5 apples."}],
    "max_tokens": 900,
    "min_tokens": 900,
    "temperature": 1.5,
    "strategy": {"kind": "self_consistency", "n": 32, "early_stop": "never"},
}
CHAT = "/v1/chat/completions"


def running(client: httpx.Client) -> float:
    """Requests that the engine is working on or has queued."""
    lines = client.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def test_a_client_that_hangs_up_has_its_candidates_aborted(client: httpx.Client):
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=LONG, timeout=2.0)
    deadline = time.monotonic() + 5
    while running(client) > 0:
        assert time.monotonic() < deadline, "candidates still run 5 s after the client left"
        time.sleep(0.1)


def engine_of(family: list[psutil.Process]) -> psutil.Process:
    """The process that runs the engine: the biggest descendant."""
    return max(family[1:], key=lambda one: one.memory_info().rss)


def test_a_dead_engine_is_replaced_and_a_signal_leaves_no_process(serve: Any, tmp_path: Path):
    key = {"Authorization": "Bearer secret"}
    with (
        serve(tmp_path / "log", "--api-key", "secret", MULL_ENGINE_RESTARTS="1") as served,
        httpx.Client(base_url=served.url, headers=key) as client,
    ):
        for path in ("/v1/strategies", "/v1/models"):  # the key guards our routes as vLLM's
            assert httpx.get(f"{served.url}{path}").status_code == 401
            assert client.get(path).status_code == 200
        assert httpx.post(f"{served.url}/v1/strategies/best_of_n", json=LONG).status_code == 401
        assert "secret" not in served.log.read_text()
        statuses: list[int] = []
        waiting = [
            threading.Thread(
                target=lambda body=body: statuses.append(
                    client.post(CHAT, json=body, timeout=60).status_code
                )
            )
            for body in (LONG, {key: value for key, value in LONG.items() if key != "strategy"})
        ]
        for thread in waiting:
            thread.start()
        time.sleep(2)
        engine_of(served.family()).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for thread in waiting:
            thread.join(20)
        assert statuses == [503, 503]
        assert time.monotonic() - killed < 5
        assert client.get("/health").status_code == 503
        served.wait_healthy(60)
        short = LONG | {"max_tokens": 20, "min_tokens": 0}
        assert client.post(CHAT, json=short, timeout=60).status_code == 200

        family = served.family()
        assert asked_at_a_signal(served, client) == (200, 503)
        assert served.process.wait(30) == 0
        _, alive = psutil.wait_procs(family[1:], timeout=10)
        assert not alive


def asked_at_a_signal(served: Any, engine: httpx.Client) -> tuple[int, int]:
    """The statuses of a search that ran already, and of a request that came later."""
    ask = partial(
        httpx.post,
        f"{served.url}{CHAT}",
        json=LONG | {"max_tokens": 400, "min_tokens": 400},
        headers=engine.headers,
        timeout=60,
    )
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(ask().status_code))
    thread.start()
    while running(engine) == 0:
        time.sleep(0.05)
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    late = ask().status_code
    thread.join(60)
    return statuses[0], late


def test_a_gateway_finishes_its_searches_at_a_signal(
    client: httpx.Client, server: Any, stand_before: Any, tmp_path: Path
):
    with stand_before(tmp_path / "gateway", server.url) as gateway:
        assert asked_at_a_signal(gateway, client) == (200, 503)
        assert gateway.process.wait(30) == 0


def test_an_engine_that_keeps_dying_ends_the_server_with_an_error(serve: Any, tmp_path: Path):
    with serve(tmp_path / "log", MULL_ENGINE_RESTARTS="0") as served:
        family = served.family()
        engine_of(family).send_signal(signal.SIGKILL)
        assert served.process.wait(30) == 1
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
        assert "giving up" in served.log.read_text()
