"""What metrics say of runs, and that nobody outside can make them grow."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from server import errors, metrics
from server.adapters.names import Watched
from server.admission import Admission
from server.settings import Settings
from server.verifiers.catalogue import VERIFIERS
from strategies.core.aio import Background
from strategies.core.testing import FakeEngine
from strategies.core.types import Generation, StopReason
from strategies.registry import STRATEGIES
from tests.server.fake_upstream import FakeUpstream
from tests.server.test_gateway_fleet import BODY, CHAT, before, only, refused, upstream
from tests.server.test_residents import Loader, version

ROOT = Path(__file__).parents[2]

ALLOWED: dict[str, set[str]] = {
    "strategy": {*STRATEGIES, "given"},
    "stopped": {*get_args(StopReason), "error"},
    "fate": {"kept", "discarded", "aborted", "verifier", "finished", "undrawn"},
    "verifier": {*VERIFIERS},
    "result": {"judged", "failed"},
    "of": {"engine", "endpoint"},
    "reason": {
        *(kind for _, kind in errors._STATUS.values()),
        *("internal_error", "requests", "adapters", "upstreams", "key"),
    },
    "status": {f"{first}xx" for first in range(1, 10)},
    "upstream": {"up0", "up1"},
}
"""Everything that a label may say in these tests; aliases have a bound of their own."""


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def told() -> list[tuple[str, dict[str, str]]]:
    """Every sample of ours, with its labels."""
    return [
        (sample.name, sample.labels)
        for metric in REGISTRY.collect()
        if metric.name.startswith("mull_")
        for sample in metric.samples
    ]


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, BODY | {"strategy": {"kind": "x" * 50}}),
    (CHAT, BODY | {"strategy": "evil", "model": "evil:evil"}),
    (CHAT, BODY | {"strategy": {"kind": "best_of_n", "n": 2, "verifier": "evil"}}),
    (CHAT, BODY | {"strategy": {"kind": "best_of_n", "n": 2, "verifier": {"kind": "regex"}}}),
    (
        CHAT,
        BODY
        | {
            "strategy": {
                "kind": "best_of_n",
                "n": 2,
                "verifier": {"kind": "regex", "pattern": "evil"},
            }
        },
    ),
    (CHAT, BODY | {"strategy": {"kind": "ensemble"}}),
    (CHAT, BODY | {"model": "evil"}),
    (CHAT, {"model": "evil", "messages": [], "strategy": None}),
    ("/v1/strategies/evil", BODY),
    ("/v1/strategies/best_of_n", {"model": "fake", "messages": BODY["messages"], "evil": 1}),
    ("/v1/responses", BODY),
    ("/v1/traces/evil", {}),
    ("/evil/evil", BODY),
    (
        "/v1/verify",
        {"model": "fake", "messages": BODY["messages"], "candidates": ["4"], "verifier": "evil"},
    ),
    (CHAT, BODY | {"budget": {"tokens": 3}}),
    (
        CHAT,
        BODY
        | {"user": "evil", "strategy": {"kind": "best_of_n", "n": 2, "verifier": "arithmetic"}},
    ),
]


async def test_no_client_makes_a_label(monkeypatch: pytest.MonkeyPatch):
    headers = {"X-Request-Id": "evil", "X-Session-ID": "evil", "traceparent": "evil"}
    async with before([upstream(), upstream()]) as (client, _):
        for path, body in HOSTILE:
            await client.post(path, json=body, headers=headers)
            await client.get(f"{path}?evil=evil", headers=headers)
    said = told()
    for name, labels in said:
        for label, is_now in labels.items():
            if label in ("le", "alias", "version") or "upstream" in label:
                continue
            assert is_now in ALLOWED[label], f"{name} has {label}={is_now}"
    assert "evil" not in str(said)
    labels = {label for _, labels in said for label in labels}
    assert labels <= ALLOWED.keys() | {"le", "alias", "version"}


def test_aliases_and_versions_have_a_bound():
    for number in range(1000):
        metrics.aliased(f"alias-{number % 7}", f"version@{number}")
    pairs = [labels for name, labels in told() if name == "mull_adapter_requests_total"]
    assert len(pairs) <= 256
    assert {"alias": f"alias-{999 % 7}", "version": "version@999"} in pairs


async def test_a_run_is_counted_once_with_what_it_saved():
    """Six samples would decide nothing that four of them, which agree, have not."""
    names = ("mull_samples_total", "mull_saved_tokens_estimate_total", "mull_runs_total")

    def now() -> list[float]:
        samples, saved, runs = names
        strategy = {"strategy": "self_consistency"}
        return [
            *(value(samples, fate=one, **strategy) for one in ("finished", "aborted", "undrawn")),
            value(saved, **strategy),
            value(runs, stopped="decided", **strategy),
        ]

    engine = FakeEngine([r"it is \boxed{4}"])
    earlier = now()
    async with before([FakeUpstream(engine)]) as (client, _):
        body = BODY | {"strategy": {"kind": "self_consistency", "n": 6}}
        reply = await client.post(CHAT, json=body)
        assert reply.json()["mull"]["stopped"] == "decided"
    finished, aborted, undrawn, saved, runs = (
        one - other for one, other in zip(now(), earlier, strict=True)
    )
    assert (finished, aborted, undrawn, runs) == (4, 0, 2, 1)
    assert saved == 2 * 3  # tokens a sample


async def test_verifiers_and_refusals_are_counted():
    def now() -> list[float]:
        return [
            value("mull_verified_candidates_total", verifier="regex", result="judged"),
            value("mull_verified_candidates_total", verifier="arithmetic", result="failed"),
            value("mull_refusals_total", reason="verifier_failed"),
            value("mull_refusals_total", reason="invalid_request_error"),
            value("mull_refusals_total", reason="requests"),
        ]

    def asked(verifier: object) -> dict[str, Any]:
        return BODY | {"strategy": {"kind": "best_of_n", "n": 2, "verifier": verifier}}

    earlier = now()
    up = FakeUpstream(FakeEngine([r"it is \boxed{4}"], delay=lambda index: 0.2))
    async with before([up], Settings(max_running_requests=1)) as (client, _):
        regex = asked({"kind": "regex", "pattern": "4"})
        async with Background(client.post(CHAT, json=regex)) as first:
            while value("mull_running_candidates") < 2:
                await asyncio.sleep(0.01)
            assert value("mull_running_requests") == 1
            assert (await client.post(CHAT, json=regex)).status_code == 429
            assert (await first).status_code == 200
        assert (await client.post(CHAT, json=asked("arithmetic"))).status_code == 422
        assert (await client.post(CHAT, json=asked("evil"))).status_code == 400
    assert [one - other for one, other in zip(now(), earlier, strict=True)] == [2, 2, 1, 1, 1]
    assert value("mull_running_requests") == value("mull_running_candidates") == 0


async def test_who_waits_is_seen():
    admission, engine = Admission(requests=9, candidates=1), FakeEngine(["a b"])

    def waiting() -> tuple[float, float]:
        return value("mull_waiting_requests"), value("mull_waiting_candidates")

    async def drawn(one: Any, index: int) -> None:
        async for _ in one.generate(Generation(index=index, token_ids=(1,), max_tokens=9)):
            pass

    with admission.admit(engine) as first, admission.admit(engine) as second:
        holding = first.generate(Generation(index=0, token_ids=(1,), max_tokens=9))
        await anext(holding)
        assert waiting() == (0, 0)
        async with Background(drawn(first, 1)) as one, Background(drawn(second, 0)) as other:
            await asyncio.sleep(0.01)
            assert waiting() == (1, 2)  # the first has begun already
            await holding.aclose()
            await asyncio.gather(one, other)
    assert waiting() == (0, 0)
    assert value("mull_running_requests") == value("mull_running_candidates") == 0


async def test_an_upstream_that_fails_is_seen_to_be_left_alone():
    failures = value("mull_upstream_failures_total", upstream="up0")
    retries = value("mull_upstream_retries_total")
    failing = upstream()
    async with before([failing, upstream()]) as (client, _):
        assert value("mull_upstream_open", upstream="up0") == 0
        failing.before = only("/v1/completions", refused)
        for at in range(8):
            asked = BODY | {"messages": [{"role": "user", "content": f"How many? {at}"}]}
            assert (await client.post(CHAT, json=asked)).status_code == 200
        assert value("mull_upstream_open", upstream="up0") == 1
    assert value("mull_upstream_failures_total", upstream="up0") >= failures + 3
    assert value("mull_upstream_retries_total") > retries


COUNTS = """
from server import metrics
metrics.RUNNING.inc(2)
metrics.RUNS.labels("best_of_n", "samples").inc()
metrics.SECONDS.labels("best_of_n").observe(3)
metrics.OPEN.labels("up").set(1)
"""


def test_several_processes_are_summed(tmp_path: Path):
    """As vLLM does it with --api-server-count."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COUNTS], check=True, env=environment, cwd=ROOT)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert registry.get_sample_value("mull_running_requests") == 4
    labels = {"strategy": "best_of_n", "stopped": "samples"}
    assert registry.get_sample_value("mull_runs_total", labels) == 2
    assert registry.get_sample_value("mull_run_seconds_sum", {"strategy": "best_of_n"}) == 6


def test_no_gauge_asks_a_function():
    """Where numbers come from files, what a function would say is lost."""
    sources = [file.read_text() for file in (ROOT / "server").rglob("*.py")]
    assert not any("set_function" in source for source in sources)


async def test_adapters_in_the_engine_are_counted():
    names = ("mull_adapter_load_failures_total", "mull_adapter_load_seconds_count")
    earlier = [value(name) for name in names]
    residents = Loader(most=2).residents
    for id in ("one", "two", "three"):
        async with residents.hold(version(id)):
            pass
    assert value("mull_adapters_resident") == 2
    with pytest.raises(ValueError, match="no weights"):
        async with residents.hold(version("broken")):
            pass
    assert value("mull_adapters_resident") == 1  # another had made room for it
    assert [value(name) - was for name, was in zip(names, earlier, strict=True)] == [1, 4]


class Flipping:
    """A registry in which an alias means another version at each look, and a second never does."""

    def __init__(self) -> None:
        self.looks = 0

    def stamp(self) -> int:
        self.looks += 1
        return self.looks

    def aliases(self) -> dict[str, Any]:
        return {
            "prod": SimpleNamespace(shares={f"a@{self.looks}": 1.0}),
            "still": SimpleNamespace(shares={"a@0": 1.0}),
        }

    def ids(self) -> list[str]:
        return []


async def test_aliases_that_move_are_counted():
    flips = value("mull_adapter_flips_total")
    registry: Any = Flipping()
    watched = Watched(registry)
    for _ in range(3):
        await watched.look(at_once=True)
    assert value("mull_adapter_flips_total") == flips + 2  # the first look sees no change
