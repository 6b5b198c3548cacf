"""What a whole server tells of one search: spans over OTLP, vLLM's among them, and lines of log."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.test_tracing import PARENT, TRACE

BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "What is 12 + 7?"}],
    "max_tokens": 30,
    "strategy": {"kind": "best_of_n", "n": 3},
}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Where spans are sent to, and those that came."""
    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = ExportTraceServiceRequest()
            asked.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in asked.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


def test_spans_reach_from_the_client_to_the_engine_and_the_log_is_json(serve, tmp_path, collector):
    url, spans = collector
    log = tmp_path / "log"
    environment = {
        "MULL_LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "none",
    }
    with serve(log, "--otlp-traces-endpoint", url, **environment) as served:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        reply = httpx.post(
            f"{served.url}/v1/chat/completions", json=BODY, headers=headers, timeout=120
        )
        assert reply.status_code == 200, reply.text
        metrics = httpx.get(f"{served.url}/metrics").text
    ours = [one for one in spans if one.trace_id.hex() == TRACE]
    by_name: dict[str, list[Any]] = {}
    for one in ours:
        by_name.setdefault(one.name, []).append(one)
    [request], [run] = by_name["POST /v1/chat/completions"], by_name["best_of_n"]
    assert request.parent_span_id.hex() == PARENT
    assert run.parent_span_id == request.span_id
    samples = {one.span_id for one in by_name["sample"]}
    assert len(samples) == 3
    assert {one.parent_span_id for one in by_name["llm_request"]} == samples  # vLLM's own
    written = log.read_text().splitlines()
    text = re.compile(r"mull: |(\(.* pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR)\b")
    assert [line for line in written if text.match(line)] == []  # else libraries print on their own
    lines = [json.loads(line) for line in written if line.startswith("{")]
    [told] = [one for one in lines if one["message"] == "a search is over"]
    assert told["run"] == reply.json()["mull"]["run"]
    assert told["request_id"] == "mine"
    assert "12 + 7" not in log.read_text()
    assert 'mull_samples_total{fate="finished",strategy="best_of_n"} 3.0' in metrics
    assert "mull_running_requests 0.0" in metrics
