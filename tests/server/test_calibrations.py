"""Calibrations: made from a server's answers, refused for other weights, and planned by."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.tiny.problems import exam
from server.calibration.command import arguments, run
from server.calibration.shelf import Shelf
from server.cli import main
from tests.server.conftest import Served

BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Use the numbers 3, 5, 2 with + - * / to make 16."}],
    "max_tokens": 100,
    "seed": 7,
}


def ask(client: httpx.Client, **strategy: Any) -> httpx.Response:
    named = {"kind": "compute_optimal"} | strategy
    return client.post("/v1/chat/completions", json=BODY | {"strategy": named})


def test_the_plan_stands_in_the_reply(client: httpx.Client):
    reply = ask(client)
    assert reply.status_code == 200, reply.text
    mull = reply.json()["mull"]
    assert mull["plan"][0]["samples"] == 2
    assert mull["plan"][-1]["option"] is None or mull["plan"][-1]["samples"] > 2
    assert sum(mull["plan"][0]["difficulty"]) == pytest.approx(1)
    assert mull["confidence"] == mull["plan"][-1]["confidence"]
    assert mull["usage"]["engine_calls"] >= 2
    again = ask(client).json()["mull"]
    assert (again["plan"], again["answer"]) == (mull["plan"], mull["answer"])


def test_abstaining_is_told(client: httpx.Client):
    mull = ask(client, n=2, min_confidence=0.999).json()["mull"]
    assert mull["abstained"] is True
    assert mull["confidence"] < 0.999


def test_what_needs_a_calibration_is_refused_without_one(client: httpx.Client):
    reply = ask(client, verifier="self_certainty")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "strategy.verifier"


def test_another_temperature_is_another_thing(client: httpx.Client):
    named = {"kind": "compute_optimal", "n": 2}
    warm = BODY | {"temperature": 0.9}
    reply = client.post("/v1/chat/completions", json=warm | {"strategy": named})
    [plan] = reply.json()["mull"]["plan"]
    assert "no calibration of this model, verifier and temperature" in plan["why"]
    named["mean_tokens"] = 100
    reply = client.post("/v1/chat/completions", json=warm | {"strategy": named})
    assert reply.status_code == 400
    assert "temperature" in reply.json()["error"]["message"]


def test_those_of_other_weights_are_shown_and_refused(client: httpx.Client):
    found = {one["id"]: one for one in client.get("/v1/calibrations").json()["data"]}
    assert found["small"]["usable"]
    assert not found["foreign"]["usable"]
    assert "other weights" in found["foreign"]["refused"]


def test_calibrate_makes_what_a_server_takes(
    server: Served,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": one.prompt, "answer": one.answer} for one in exam(5, 24, ("word",))]
    problems.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "shelf" / "tiny.json"
    out.parent.mkdir()
    flags = ["calibrate", "--problems", str(problems), "--out", str(out), "--url", server.url]
    flags += ["--model", "mull-tiny", "--samples", "4", "--max-tokens", "200", "--bins", "3"]
    monkeypatch.setattr("sys.argv", ["mull", *flags])
    for _ in range(2):  # the second time, nothing is asked again
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().out
    pool = out.with_suffix(".pool.jsonl").read_text().splitlines()
    assert len(pool) == 24
    sampled = [one for line in pool for one in json.loads(line)["pooled"]["samples"]]
    assert all(0 < one["likelihood"] <= 1 for one in sampled)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    [card] = Shelf(out.parent).cards()
    assert card["usable"]
    assert card["verifier"] == {"kind": "likelihood"}
    assert sum(one["problems"] for one in card["bins"]) == 24
    assert 0 <= card["evaluation"]["calibration_error"] <= 1
    known = Shelf(out.parent)
    known.check(httpx.get(f"{server.url}/v1/calibrations").json()["weights"])
    found = known.find("mull-tiny")
    assert found is not None
    assert found.reads_likelihood


def test_too_few_problems_are_refused(tmp_path: Path):
    import argparse

    problems = tmp_path / "few.jsonl"
    problems.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}))
    parser = argparse.ArgumentParser()
    arguments(parser)
    flags = ["--problems", str(problems), "--out", str(tmp_path / "x.json"), "--model", "m"]
    assert run(parser.parse_args(flags)) == 2
