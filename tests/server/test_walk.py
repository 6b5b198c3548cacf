"""Schemathesis walks over all routes, each step with what earlier replies said."""

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

KEY = "walks-everywhere"


@pytest.mark.slow
def test_a_walk_over_all_routes_meets_no_server_error(serve: Any, tmp_path: Path):
    folders = {f"MULL_{name}": tmp_path / name.lower() for name in ("ADAPTERS", "TRACES")}
    told = {name: str(folder) for name, folder in folders.items()} | {"MULL_ADMIN_KEY": KEY}
    with serve(tmp_path / "log", "--enable-scale-out", **told) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        asked: Counter[tuple[str, int]] = Counter()

        class Walk(schema.as_state_machine()):
            def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
                return {"headers": {"X-Mull-Admin-Key": KEY}, "timeout": 120}

            def validate_response(self, response: Any, case: schemathesis.Case, **_: Any) -> None:
                asked[case.operation.label, response.status_code] += 1
                assert response.status_code < 500, (case.operation.label, response.text)

        Walk.run(
            settings=settings(
                max_examples=40,
                stateful_step_count=12,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
        )
        assert httpx.get(f"{served.url}/health").status_code == 200
        routes = {one.ok().label for one in schema.get_all_operations()}
    print(asked)
    assert {route for route, _ in asked} == routes
