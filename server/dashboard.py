"""What is shown of the metrics: `python -m server.dashboard` prints Grafana's JSON.

With `table`, it prints the table of docs/observability.md. Both are made of the metrics themselves,
so that neither can name one that is not there.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from prometheus_client import Counter, Gauge, Histogram

from server import metrics
from server.wire import JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A metric as Prometheus knows it; a counter's name has no `_total` here."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Sequence[str] = ()

    @property
    def exported(self) -> str:
        """The name on `/metrics`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def series(metric: Counter | Gauge | Histogram) -> Series:
    """One of ours."""
    [told] = metric.describe()
    labels = cast(Any, metric)._labelnames  # the client library shows them nowhere else
    kind = cast(Literal["counter", "gauge", "histogram"], told.type)
    return Series(name=told.name, kind=kind, help=told.documentation, labels=labels)


ROWS: dict[str, tuple[Counter | Gauge | Histogram, ...]] = {
    "Searches": (
        metrics.RUNS,
        metrics.SECONDS,
        metrics.SAMPLES,
        metrics.TOKENS,
        metrics.SAVED,
        metrics.PROMPT_TOKENS,
        metrics.CACHED_TOKENS,
        metrics.CALLS,
    ),
    "Queue and refusals": (
        metrics.RUNNING,
        metrics.UNBEGUN,
        metrics.CANDIDATES,
        metrics.WAITING,
        metrics.REFUSED,
        metrics.UNARCHIVED,
    ),
    "Verifiers": (metrics.VERIFIED, metrics.VERIFYING, metrics.QUESTIONS),
    "Adapters": (
        metrics.ALIASED,
        metrics.RESIDENT,
        metrics.LOADING,
        metrics.LOAD_FAILED,
        metrics.FLIPS,
    ),
    "Upstreams of a gateway": (
        metrics.OPEN,
        metrics.ASKED,
        metrics.FAILED,
        metrics.RETRIED,
        metrics.PASSED,
    ),
}
"""Every metric of ours, by what it is about."""

ENGINE = (
    Series(name="vllm:num_requests_running", kind="gauge", help="Sequences in the batch."),
    Series(name="vllm:num_requests_waiting", kind="gauge", help="Sequences before it."),
    Series(name="vllm:kv_cache_usage_perc", kind="gauge", help="Of the KV cache; 1 is all."),
    Series(name="vllm:generation_tokens", kind="counter", help="Everything that was generated."),
    Series(name="vllm:prompt_tokens", kind="counter", help="Everything that was read."),
    Series(name="vllm:prefix_cache_hits", kind="counter", help="Tokens found in the prefix cache."),
    Series(name="vllm:prefix_cache_queries", kind="counter", help="Tokens looked for in it."),
    Series(name="vllm:num_preemptions", kind="counter", help="Sequences put off for lack of room."),
    Series(name="vllm:time_to_first_token_seconds", kind="histogram", help="Of sequences."),
    Series(name="vllm:inter_token_latency_seconds", kind="histogram", help="Within sequences."),
)
"""Of vLLM's own, those that say why a search waits."""

_WIDTH, _HEIGHT = 8, 7
"""Of a panel; three are beside each other."""

_SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> JSON:
    """All rows, as Grafana imports them."""
    panels: list[JSON] = []
    top = 0
    rows: dict[str, Sequence[Series]] = {title: [*map(series, row)] for title, row in ROWS.items()}
    for title, row in (rows | {"Engine (vLLM)": ENGINE}).items():
        place = {"x": 0, "y": top, "w": 3 * _WIDTH, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        for at, one in enumerate(row):
            place = {
                "x": at % 3 * _WIDTH,
                "y": top + 1 + at // 3 * _HEIGHT,
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            panels.append(_panel(one) | {"gridPos": place})
        top += 1 + -(-len(row) // 3) * _HEIGHT
    return {
        "title": "Mull",
        "uid": "mull",
        "schemaVersion": 39,
        "tags": ["mull", "vllm"],
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"type": "datasource", "name": "source", "label": "Source", "query": "prometheus"},
                {
                    "type": "query",
                    "name": "instance",
                    "label": "Server",
                    "datasource": _SOURCE,
                    "query": "label_values(mull_running_requests, instance)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                },
            ]
        },
        "panels": [{"id": number} | panel for number, panel in enumerate(panels, start=1)],
    }


def _panel(one: Series) -> JSON:
    seconds = one.name.endswith("_seconds")
    targets = [
        {"refId": chr(ord("A") + at), "expr": expression, "legendFormat": legend}
        for at, (expression, legend) in enumerate(_expressions(one))
    ]
    return {
        "type": "timeseries",
        "title": one.exported,
        "description": one.help,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": "s" if seconds else "cps" if one.kind == "counter" else "short",
                "min": 0,
            },
            "overrides": list[JSON](),
        },
        "targets": targets,
    }


def _expressions(one: Series) -> list[tuple[str, str]]:
    """What is asked of Prometheus, and how each line is called."""
    chosen, legend = '{instance=~"$instance"}', " ".join(f"{{{{{name}}}}}" for name in one.labels)
    by = f" by ({', '.join(one.labels)})" if one.labels else ""
    match one.kind:
        case "counter":
            rate = f"rate({one.exported}{chosen}[$__rate_interval])"
            return [(f"sum{by} ({rate})", legend or "all")]
        case "gauge":
            return [(f"sum{by} ({one.exported}{chosen})", legend or "all")]
        case "histogram":
            rate = f"rate({one.exported}_bucket{chosen}[$__rate_interval])"
            summed = f"sum by ({', '.join(['le', *one.labels])}) ({rate})"
            return [
                (f"histogram_quantile({share}, {summed})", f"{legend} p{share * 100:g}".strip())
                for share in (0.5, 0.95, 0.99)
            ]


def table() -> str:
    """Ours as the docs list them."""
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for row in ROWS.values():
        for one in map(series, row):
            labels = ", ".join(f"`{name}`" for name in one.labels)
            lines.append(f"| `{one.exported}` | {one.kind} | {labels} | {one.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    told = table() if sys.argv[1:] == ["table"] else json.dumps(dashboard(), indent=1) + "\n"
    sys.stdout.write(told)
