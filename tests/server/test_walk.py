"""Schemathesis asks all routes of Mull's, also one after another with what replies said.

Those of vLLM it finds wanting without us: a stream of /v1/responses with an empty input breaks off.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

OURS = r"^/v1/(strategies|verifiers|verify|traces|calibrations|adapters)"
KEY = "walks-everywhere"
STATEFUL = {"DELETE /v1/adapters/{name}", "POST /v1/strategies/{kind}/batch"}


@pytest.mark.slow
def test_no_route_of_ours_meets_with_a_server_error(serve: Any, tmp_path: Path):
    folders = {f"MULL_{name}": tmp_path / name.lower() for name in ("ADAPTERS", "TRACES")}
    told = {name: str(folder) for name, folder in folders.items()} | {"MULL_ADMIN_KEY": KEY}
    with serve(tmp_path / "log", "--enable-scale-out", **told) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json").include(
            path_regex=OURS
        )
        asked: Counter[tuple[str, int]] = Counter()

        class Walk(schema.as_state_machine()):
            def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
                return {"headers": {"X-Mull-Admin-Key": KEY}, "timeout": 120}

            def validate_response(self, response: Any, case: schemathesis.Case, **_: Any) -> None:
                asked[case.operation.label, response.status_code] += 1
                assert response.status_code < 500, (case.operation.label, response.text)

        held = settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        Walk.run(settings=held)
        assert {route for route, _ in asked} >= STATEFUL, asked

        def probe(case: schemathesis.Case) -> None:
            reply = case.call(headers={"X-Mull-Admin-Key": KEY}, timeout=120)
            asked[case.operation.label, reply.status_code] += 1
            assert reply.status_code < 500, (case.operation.label, reply.text)

        operations = [cast(Any, one).ok() for one in schema.get_all_operations()]
        for operation in operations:
            for mode in GenerationMode:
                with suppress(Unsatisfiable):  # one without parameters has no wrong ones
                    asking = operation.as_strategy(generation_mode=mode)
                    held(given(case=asking)(probe))()
        assert {route for route, _ in asked} == {one.label for one in operations}
        assert httpx.get(f"{served.url}/health").status_code == 200
