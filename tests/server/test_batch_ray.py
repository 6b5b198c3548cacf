"""Batches over several servers: who is asked when one dies, and all of it on a Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.batch.file import Row
from server.batch.spread import answered
from server.batch.stretch import Stretch, Terms
from tests.server.conftest import Served
from tests.server.fake_upstream import Stream
from tests.server.test_batch import generated, lines

ROWS = [Row(custom_id=name, body={"messages": []}) for name in "abcd"]


def event(name: str, said: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(said)}\n\n".encode()


def result(name: str, status: int = 200) -> bytes:
    error = None if status == 200 else {"code": str(status), "message": "no"}
    said = {"custom_id": name, "response": {"status_code": status}, "error": error}
    return event("result", said)


def account(tokens: int, leased: int = 0) -> dict[str, Any]:
    return {"spent": {"tokens": tokens, "samples": tokens // 10}, "leased": leased}


def before(
    monkeypatch: pytest.MonkeyPatch, **servers: Callable[[dict[str, Any]], Any]
) -> dict[str, list[dict[str, Any]]]:
    """What each of these servers, by name, has been asked."""
    asked: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}

    async def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        asked[request.url.host].append(body | {"name": request.headers["x-request-id"]})
        said = servers[request.url.host](body)
        return (
            said if isinstance(said, httpx.Response) else httpx.Response(200, stream=Stream(said))
        )

    monkeypatch.setattr(
        Terms,
        "client",
        lambda self, url: httpx.AsyncClient(
            base_url=url, transport=httpx.MockTransport(reply), timeout=5
        ),
    )
    return asked


async def whole(body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    yield event("progress", account(0))
    for one in body["requests"]:
        yield result(one["custom_id"])
    yield event("done", account(40))


async def dying(body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    yield event("progress", account(0))
    yield result("a")
    yield event("progress", account(30, leased=20))
    raise httpx.ReadError("gone")


TERMS = Terms(kind="best_of_n", fields={"model": "m"})
STRETCH = Stretch(name="s", rows=ROWS, budget={"tokens": 200, "seconds": 9})


async def test_the_rest_of_a_stretch_goes_to_the_next_with_the_rest_of_its_budget(
    monkeypatch: pytest.MonkeyPatch,
):
    asked = before(monkeypatch, one=dying, two=whole)
    done = await answered(STRETCH, TERMS, ["http://one", "http://two"])
    assert [one["custom_id"] for one in done["results"]] == list("abcd")
    assert done["error"] is None
    assert done["account"]["spent"] == {"tokens": 30 + 20 + 40, "samples": 7}
    [second] = asked["two"]
    assert [one["custom_id"] for one in second["requests"]] == list("bcd")
    assert second["budget"]["tokens"] == 200 - 30 - 20
    assert (asked["one"][0]["name"], second["name"]) == ("s.0", "s.1")


async def test_answers_of_a_server_whose_engine_died_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
):
    async def engineless(body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        yield result("a")
        for name in "bcd":
            yield result(name, 503)
        yield event("done", account(10))

    before(monkeypatch, one=engineless, two=whole)
    done = await answered(STRETCH, TERMS, ["http://one", "http://two"])
    assert {one["response"]["status_code"] for one in done["results"]} == {200}
    assert done["account"]["spent"]["tokens"] == 50


async def test_what_one_refuses_no_other_is_asked_unless_it_is_busy(
    monkeypatch: pytest.MonkeyPatch,
):
    def refusing(status: int):
        said = {"error": {"message": "there is no model 'm'", "param": "model"}}
        return lambda body: httpx.Response(status, json=said)

    asked = before(monkeypatch, one=refusing(404), two=whole)
    done = await answered(STRETCH, TERMS, ["http://one", "http://two"])
    assert "there is no model 'm' (model)" in done["error"]
    assert asked["two"] == done["results"] == []
    for status in (429, 503):
        before(monkeypatch, one=refusing(status), two=whole)
        done = await answered(STRETCH, TERMS, ["http://one", "http://two"])
        assert len(done["results"]) == 4


async def test_a_spent_budget_is_not_given_out_again(monkeypatch: pytest.MonkeyPatch):
    asked = before(monkeypatch, one=dying, two=whole)
    stretch = Stretch(name="s", rows=ROWS, budget={"tokens": 52})
    done = await answered(stretch, TERMS, ["http://one", "http://two"])
    assert [one["custom_id"] for one in done["results"]] == ["a"]
    assert asked["two"] == []
    assert "gone" in done["error"]


def test_a_key_is_in_no_text(monkeypatch: pytest.MonkeyPatch):
    assert "secret" not in repr(Terms(kind="best_of_n", fields={}, key="secret"))


@pytest.mark.slow
def test_on_a_cluster_a_server_that_dies_half_way_loses_no_prompt_and_no_account(
    server: Served, client: httpx.Client, serve: Any, tmp_path: Path
):
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(json.dumps(line) for line in lines(24)))
    budget = 24 * 16 * 200  # a dead server's leases are lost, and must leave room for all
    with serve(tmp_path / "log") as other, httpx.Client(base_url=other.url) as dies:
        flags = [str(asked), str(out), "--url", server.url, other.url, "--ray", "local"]
        flags += ["--model", "mull-tiny", "--tokens", str(budget), "--together", "4"]
        flags += ["--strategy", '{"kind": "best_of_n", "n": 16}']
        flags += ["--fields", '{"max_tokens": 200, "temperature": 1.0}']
        command = [str(Path(sys.executable).parent / "mull"), "batch", *flags]
        before_it = generated(client)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        )
        deadline = time.monotonic() + 100
        while generated(dies) < 200:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        for one in other.family():
            one.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "24 of 24 answered" in said
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(one["custom_id"] for one in results) == sorted(f"p{at}" for at in range(24))
    assert {one["response"]["status_code"] for one in results} == {200}
    journal = out.with_name("out.jsonl.journal").read_text().splitlines()
    over = {one["stretch"]: one for one in map(json.loads, journal[1:])}
    assert len(over) >= 6
    assert all(one["over"] for one in over.values())
    assert generated(client) - before_it <= sum(one["tokens"] for one in over.values()) <= budget
