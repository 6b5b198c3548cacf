"""What is shown of the metrics is what there is, and all that there is."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from server import metrics
from server.dashboard import ENGINE, ROWS, dashboard, series, table

ROOT = Path(__file__).parents[2]
OURS = [one for one in vars(metrics).values() if isinstance(one, Counter | Gauge | Histogram)]
EXPORTED = {series(one).exported for one in OURS}


def named(text: str) -> set[str]:
    """The metrics of ours in an expression; of a histogram, without what it is made of."""
    found = re.findall(r"\bmull_\w+", text)
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


def test_the_committed_dashboard_is_what_the_metrics_make():
    text = (ROOT / "deploy/grafana/dashboard.json").read_text()
    assert json.loads(text) == dashboard(), "run: python -m server.dashboard"


def test_every_metric_is_shown_once_and_no_other():
    shown = [series(one).exported for row in ROWS.values() for one in row]
    assert sorted(shown) == sorted(EXPORTED)
    expressions = [
        one["expr"] for panel in dashboard()["panels"] for one in panel.get("targets", ())
    ]
    assert named(" ".join(expressions)) == EXPORTED


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        columns = range(at["x"], at["x"] + at["w"])
        cells = {(x, y) for x in columns for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(columns) < 24
        taken |= cells


def test_the_docs_list_every_metric():
    assert table() in (ROOT / "docs/observability.md").read_text()


def test_alerts_name_metrics_that_are_there():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        assert named(rule["expr"])
        assert named(rule["expr"]) <= EXPORTED


def test_vllm_has_what_is_shown_of_it():
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no engine is installed")
    folder = Path(spec.origin).parent / "v1/metrics"
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    for one in ENGINE:
        kind = rf"_{one.kind}_cls\(\s*name=\"{one.name}\""
        assert re.search(kind, source), f"vLLM has no {one.kind} {one.name}"
