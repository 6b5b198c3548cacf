"""Runs on disk: kept if the operator wants it and the client does not mind; training reads them."""

import asyncio
import json
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from finetune import traces
from server.archive import Archive
from server.metrics import UNARCHIVED
from server.run import Selection
from server.trace import Trace
from strategies.best_of_n import BestOfN
from strategies.core.budget import Limits
from strategies.core.types import Candidate, Outcome
from tests.server.conftest import Served
from tests.server.faults import full_disk

QUESTION = "Use the numbers 3, 5, 2 with + - * / to make 16. Use each number once."
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 100,
    "seed": 7,
    "strategy": {"kind": "best_of_n", "n": 12, "verifier": "countdown"},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("traces-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_what_a_server_keeps_is_what_training_reads(
    server: Served, client: httpx.Client, tmp_path: Path
):
    folder = server.log.parent / "traces"
    replies: list[dict[str, Any]] = []
    for more in (
        {},
        {"store": False},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    ):
        reply = client.post("/v1/chat/completions", json=BODY | more)
        assert reply.status_code == 200, reply.text
        replies.append(reply.json())
    wanted = replies[0]["mull"]["run"]
    deadline = time.monotonic() + 10
    while not (kept := [one for one in lines(folder) if one["run"] == wanted]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [run] = kept
    assert run["prompt"] == BODY["messages"]
    assert len(run["candidates"]) == 12
    assert {one["score"] for one in run["candidates"]} == {0.0, 1.0}
    chosen = run["candidates"][run["chosen"]]
    assert chosen["text"] == replies[0]["choices"][0]["message"]["content"]
    unwanted = {one["mull"]["run"] for one in replies[1:]}
    assert not unwanted & {one["run"] for one in lines(folder)}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    out = tmp_path / "rows.jsonl"
    flags = ["--from-traces", str(folder), "--to", "demonstrations", "--out", str(out)]
    traces.main([*flags, "--verifier", "countdown", "--per-prompt", "99"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert chosen["text"] in {row["completion"] for row in rows if row["prompt"] == run["prompt"]}


def test_store_is_true_or_false(client: httpx.Client):
    reply = client.post("/v1/chat/completions", json=BODY | {"store": "no"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "store"


def ended(text: str) -> Any:
    one = Candidate(index=0, text=text, token_ids=(1, 2), finish_reason="stop")
    selection = Selection(
        strategy=BestOfN(), limits=Limits(), verifier=None, conversation="What is 2 + 3?"
    )
    outcome = Outcome(chosen=one, candidates=(one,), stopped="samples", ranked=(one,))
    return SimpleNamespace(id="run-1", selection=selection, trace=Trace(), outcome=outcome)


async def test_the_newest_stay_when_the_directory_is_full(tmp_path: Path):
    archive = Archive(tmp_path, most_bytes=32_000)
    for at in range(60):
        archive.keep(ended(f"{at} {'x' * 700}"))
    await archive.close()
    kept = [int(one["candidates"][0]["text"].split()[0]) for one in lines(tmp_path)]
    assert kept == list(range(60 - len(kept), 60))
    assert 10 < len(kept) < 40
    assert sum(len(json.dumps(one)) + 1 for one in lines(tmp_path)) <= 32_000


async def test_a_clock_that_is_set_back_costs_no_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = Archive(tmp_path, most_bytes=32_000)
    for at in range(60):
        if at == 30:
            await asyncio.get_running_loop().run_in_executor(archive._writer, int)
            yesterday = datetime.now(UTC) - timedelta(days=1)
            monkeypatch.setattr("server.archive.datetime", StoppedClock(yesterday))
        archive.keep(ended(f"{at} {'x' * 700}"))
    await archive.close()
    kept = [int(one["candidates"][0]["text"].split()[0]) for one in lines(tmp_path)]
    assert kept == list(range(60 - len(kept), 60))
    assert 10 < len(kept) < 40


class StoppedClock:
    """A `datetime` whose `now` is always the same."""

    def __init__(self, now: datetime) -> None:
        self._now = now

    def now(self, zone: Any) -> datetime:
        return self._now

    strptime = staticmethod(datetime.strptime)


async def test_a_directory_that_went_away_fails_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "gone"
    archive = Archive(folder, most_bytes=1 << 20)
    folder.rmdir()
    archive.keep(ended("one"))
    archive.keep(ended("two"))
    await archive.close()
    assert [one.message for one in caplog.records].count(caplog.records[0].message) == 1
    assert "traces are not kept" in caplog.records[0].message


async def test_a_full_disk_costs_traces_only_and_they_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    archive = Archive(tmp_path, most_bytes=1 << 20)
    before = UNARCHIVED._value.get()
    with full_disk():
        archive.keep(ended("one"))
        archive.keep(ended("two"))
        await asyncio.get_running_loop().run_in_executor(archive._writer, int)
    archive.keep(ended("three"))
    await archive.close()
    assert [one["candidates"][0]["text"] for one in lines(tmp_path)] == ["three"]
    assert UNARCHIVED._value.get() - before == 2
    assert "traces are not kept" in caplog.text
