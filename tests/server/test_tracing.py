"""A request, its run and its calls as spans of one trace, also over other servers."""

import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.otel import Tracing
from server.settings import Settings, exporters
from server.tracing import below, span_id, tracing
from tests.server.fake_upstream import FakeUpstream
from tests.server.test_gateway_fleet import BODY, CHAT, before, only, upstream

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}


async def followed(
    ups: Sequence[FakeUpstream],
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    path: str = CHAT,
    **settings: Any,
) -> tuple[httpx.Response, list[Any]]:
    """The reply to one request, and its spans."""
    memory = InMemorySpanExporter()
    async with before(ups, Settings(**settings), Tracing(memory), traced=True) as (client, _):
        reply = await client.post(path, json=body, headers=headers)
    return reply, list(memory.get_finished_spans())


def own(span: Any) -> str:
    return f"{span.context.span_id:016x}"


def parent(span: Any) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def named(spans: Sequence[Any], name: str) -> list[Any]:
    return [one for one in spans if one.name == name]


async def test_a_trace_comes_in_goes_down_to_the_samples_and_out_to_the_upstream():
    up = upstream()
    reply, spans = await followed([up], BODY, HEADERS)
    assert reply.status_code == 200, reply.text
    assert {f"{one.context.trace_id:032x}" for one in spans} == {TRACE}
    [request], [run] = named(spans, f"POST {CHAT}"), named(spans, "self_consistency")
    samples = named(spans, "sample")
    assert (parent(request), parent(run)) == (PARENT, own(request))
    assert {parent(one) for one in samples} == {own(run)}
    assert len(samples) == 4
    asked = [one for one in up.requests if "X-Request-Id" in one.headers]
    assert {one.headers["traceparent"] for one in asked} == {
        f"00-{TRACE}-{own(one)}-01" for one in samples
    }
    assert (request.kind, run.kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert {one.kind for one in samples} == {SpanKind.CLIENT}
    assert request.attributes["http.response.status_code"] == 200
    assert run.attributes["mull.run"] == reply.json()["mull"]["run"]
    assert run.attributes["mull.request_id"] == "mine"
    assert run.attributes["gen_ai.usage.output_tokens"] == 10
    assert sum(one.attributes["gen_ai.usage.output_tokens"] for one in samples) == 10
    for one in (run, *samples):
        assert request.start_time <= one.start_time + 2e6  # the clocks are two
        assert one.start_time <= one.end_time <= request.end_time + 2e6
    assert run.resource.attributes["service.name"] == "mull"


async def test_spans_hold_no_words_and_no_keys():
    body = BODY | {"messages": [{"role": "user", "content": "a secret question"}]}
    _, spans = await followed([upstream()], body, {"Authorization": "Bearer sk-secret"})
    text = " ".join(one.to_json() for one in spans)
    assert "secret" not in text
    assert "boxed" not in text


async def test_a_verifier_elsewhere_hears_of_the_trace(monkeypatch: pytest.MonkeyPatch):
    heard: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers["traceparent"])
        return httpx.Response(200, json={"data": [{"index": 0, "probs": [0.1, 0.9]}]})

    there = partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("server.endpoints.httpx.AsyncClient", there)
    judge = {"kind": "reward_model", "name": "rm"}
    reply, spans = await followed(
        [upstream()],
        BODY | {"strategy": {"kind": "best_of_n", "n": 2, "verifier": judge}},
        HEADERS,
        endpoints={"rm": {"api": "classify", "url": "http://rm", "model": "m"}},
    )
    assert reply.status_code == 200, reply.text
    consulted = named(spans, "consult")
    assert heard
    assert {*heard} == {f"00-{TRACE}-{own(one)}-01" for one in consulted}
    [verify] = named(spans, "verify")
    assert verify.attributes["mull.verifier"] == "reward_model"
    assert parent(verify) == own(named(spans, "best_of_n")[0])


async def test_what_names_no_strategy_is_passed_on_below_its_request():
    async def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={})

    up = upstream(before=only(CHAT, reply))
    body = {name: of for name, of in BODY.items() if name != "strategy"}
    _, [request] = await followed([up], body, HEADERS)
    passed = next(one for one in up.requests if one.url.path == CHAT)
    assert passed.headers["traceparent"] == f"00-{TRACE}-{own(request)}-01"


@pytest.mark.parametrize("said", [None, "", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
async def test_without_a_trace_one_begins(said: str | None):
    headers = {} if said is None else {"traceparent": said}
    _, spans = await followed([upstream()], BODY, headers)
    [request] = named(spans, f"POST {CHAT}")
    assert request.parent is None
    assert len({one.context.trace_id for one in spans}) == 1


async def test_what_is_not_sampled_is_not_exported_and_says_so():
    up = upstream()
    _, spans = await followed([up], BODY, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans == []
    asked = [one for one in up.requests if "X-Request-Id" in one.headers]
    assert all(re.fullmatch(rf"00-{TRACE}-\w+-00", one.headers["traceparent"]) for one in asked)


async def test_a_failure_is_one_in_its_spans():
    async def breaks(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    reply, spans = await followed([upstream(before=only("/v1/completions", breaks))], BODY, HEADERS)
    assert reply.status_code == 503
    failed = [one.name for one in spans if one.status.status_code is StatusCode.ERROR]
    assert f"POST {CHAT}" in failed


async def test_with_no_exporter_a_trace_is_handed_on_as_it_came():
    up = upstream()
    async with before([up]) as (client, _):
        await client.post(CHAT, json=BODY, headers=HEADERS)
    asked = [one for one in up.requests if "X-Request-Id" in one.headers]
    assert {one.headers["traceparent"] for one in asked} == {HEADERS["traceparent"]}


def test_the_header_of_a_call_needs_a_trace():
    assert below(HEADERS["traceparent"], "run-1-0") == {
        "traceparent": f"00-{TRACE}-{span_id('run-1-0')}-01"
    }
    assert below("nonsense", "run-1-0") == {}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, ()),
        ({"OTLP_ENDPOINT": "http://c:4317"}, ("otlp_proto_grpc",)),
        ({"OTLP_TRACES_ENDPOINT": "http://c:4317"}, ("otlp_proto_grpc",)),
        (
            {"OTLP_ENDPOINT": "http://c:4318", "OTLP_PROTOCOL": "http/protobuf"},
            ("otlp_proto_http",),
        ),
    ],
)
def test_otels_own_variables_choose_the_exporter(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], found: tuple[str, ...]
):
    for name, value in said.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_{name}", value)
    assert exporters() == found
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console, otlp")
    assert exporters()[0] == "console"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert exporters() == ()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin-of-mine")
    with pytest.raises(ValueError, match="zipkin-of-mine"):
        tracing()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing() is None


def test_nothing_is_imported_unless_asked_for():
    script = "import sys, server.gateway.app, server.gateway.command as c; c.tracing();"
    script += "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", script], check=True, env={}, cwd=ROOT)
