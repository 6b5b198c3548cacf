"""`mull serve --api-server-count 2`: two processes serve the API of one engine."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.keys.keyring import Keyring, digest
from server.local import several
from server.settings import Settings
from strategies.core.errors import Unauthorized
from tests.server.test_gateway_replicas import CHAT, asked
from tests.server.test_lifecycle import running

VOTE = {"kind": "self_consistency", "n": 8, "early_stop": "never"}
BEAM = {"kind": "beam_search", "width": 3, "branch": 2}


def by_process(served: Any) -> list[int]:
    """Connections that each of the processes holds to its clients."""
    port = int(served.url.rsplit(":", 1)[1])
    servers = [one for one in served.family() if "APIServer" in " ".join(one.cmdline())]
    assert len(servers) == 2
    return [
        sum(
            one.laddr.port == port and one.status == "ESTABLISHED"
            for one in server.net_connections("tcp")
        )
        for server in servers
    ]


@pytest.mark.slow
def test_two_processes_serve_one_engine(serve: Any, tmp_path: Path):
    keys, traces = tmp_path / "keys.json", tmp_path / "traces"
    keys.write_text(json.dumps({"keys": [{"name": "amy", "digest": digest("secret")}]}))
    environment = {"MULL_KEYS": str(keys), "MULL_TRACES": str(traces)}
    headers = {"Authorization": "Bearer secret"}
    flags = ("--api-server-count", "2")
    environment |= {"MULL_OPEN_METRICS": "true"}
    with serve(tmp_path / "log", *flags, **environment) as served, ExitStack() as stack:
        clients = [
            stack.enter_context(httpx.Client(base_url=served.url, timeout=120, headers=headers))
            for _ in range(8)
        ]

        def ask(at: int) -> dict[str, Any]:
            strategy = VOTE if at % 2 else BEAM
            reply = clients[at % 8].post(CHAT, json=asked(at, strategy=strategy))
            assert reply.status_code == 200, reply.text
            return reply.json()

        with ThreadPoolExecutor(8) as pool:
            replies = [*pool.map(ask, range(16))]
        assert min(by_process(served)) >= 2
        for at, reply in enumerate(replies):
            usage = reply["mull"]["usage"]
            assert usage["engine_calls"] == 8 if at % 2 else usage["continuation_cached_tokens"] > 0
        assert httpx.post(f"{served.url}{CHAT}", json=asked(0)).status_code == 401
        # What they count in common, and keep in common, is of both.
        told = httpx.get(f"{served.url}/metrics").text.splitlines()
        runs = [line for line in told if line.startswith("mull_runs_total{")]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in runs) == 16
        lines = [line for file in traces.glob("*.jsonl") for line in file.read_text().splitlines()]
        assert len(lines) == 16
        # What one knows alone is not told by chance.
        for client in clients:
            missing = client.get(f"/v1/traces/{replies[0]['mull']['run']}")
            assert missing.status_code == 404
            assert "--api-server-count 1" in missing.json()["error"]["message"]
        # A signal lets them finish.
        with ThreadPoolExecutor(4) as pool:
            late = [pool.submit(ask, at) for at in range(1, 8, 2)]
            while running(clients[0]) == 0:
                assert not all(one.done() for one in late)
            served.process.send_signal(signal.SIGTERM)
            assert all(one.result()["mull"]["usage"]["engine_calls"] == 8 for one in late)
        assert served.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "launcher"])
def test_a_dead_engine_or_launcher_ends_them_all(serve: Any, tmp_path: Path, victim: str):
    with serve(tmp_path / "log", "--api-server-count", "2") as served:
        family = served.family()
        engine = next(one for one in family if "EngineCore" in " ".join(one.cmdline()))
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=served.url, timeout=60) as client:
            body = asked(0, strategy=VOTE) | {"max_tokens": 400, "min_tokens": 400}
            waiting = pool.submit(client.post, CHAT, json=body)
            while running(client) == 0:
                assert not waiting.done()
            (engine if victim == "engine" else family[0]).send_signal(signal.SIGKILL)
            assert waiting.result().status_code == 503
        assert served.process.wait(30) == (1 if victim == "engine" else -signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def test_what_each_would_count_for_itself_is_refused(tmp_path: Path):
    keys = tmp_path / "keys.json"
    with pytest.raises(ValueError, match="MULL_ADAPTERS"):
        several.check(Settings(adapters=tmp_path))
    key = {"name": "amy", "digest": digest("secret")}
    keys.write_text(json.dumps({"keys": [key]}))
    several.check(Settings(keys=keys))
    for limit in ("requests_per_minute", "tokens_per_minute", "concurrent"):
        keys.write_text(json.dumps({"keys": [key | {limit: 5}]}))
        with pytest.raises(ValueError, match="--api-server-count 1"):
            several.check(Settings(keys=keys))


async def test_keys_that_get_limits_later_are_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "keys.json"
    key = {"name": "amy", "digest": digest("secret"), "concurrent": 5}
    other = {"name": "bob", "digest": digest("other")}
    file.write_text(json.dumps({"keys": [key, other]}))
    for limits in (True, False):
        keys = Keyring(file, limits=limits)
        await keys.look()
        assert keys.admit({"x-api-key": "other"}, "client").name == "bob"
        said = {"x-api-key": "secret"}
        if limits:
            assert keys.admit(said, "client").concurrent == 5
        else:
            with pytest.raises(Unauthorized):
                keys.admit(said, "client")
    assert "--api-server-count 1" in caplog.text
