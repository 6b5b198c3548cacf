"""Batches over the real engine: one budget, each prompt answered once, also after a kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.tiny.problems import exam
from tests.server.conftest import Served

PATH = "/v1/strategies/compute_optimal/batch"
PROMPTS = [one.prompt for one in exam(11, 24, ("word",))]


def lines(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"p{at}",
            "body": {"messages": [{"role": "user", "content": PROMPTS[at]}]} | more,
        }
        for at in range(count)
    ]


def body(n: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "mull-tiny",
        "requests": lines(n),
        "budget": {"tokens": tokens},
        "max_tokens": 200,
        "seed": 3,
    } | more


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for block in text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n", 1)
            found.append((name[len("event: ") :], json.loads(data[len("data: ") :])))
    return found


def generated(client: httpx.Client) -> int:
    """By the engine's own counter."""
    return sum(
        int(float(line.rsplit(" ", 1)[1]))
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("vllm:generation_tokens_total")
    )


@pytest.mark.parametrize("allocation", ["marginal", "equal"])
@pytest.mark.parametrize("tokens", [6, 300, 2000, 20_000])
def test_a_batch_keeps_to_one_budget_and_every_prompt_has_an_answer(
    client: httpx.Client, allocation: str, tokens: int
):
    before = generated(client)
    reply = client.post(PATH, json=body(6, tokens, allocation=allocation))
    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert (said["object"], said["allocation"]) == ("list", allocation)
    assert [one["custom_id"] for one in said["data"]] == [f"p{at}" for at in range(6)]
    spent = [one["response"]["body"]["usage"]["completion_tokens"] for one in said["data"]]
    assert sum(spent) == said["usage"]["completion_tokens"] == said["spent"]["tokens"] <= tokens
    assert generated(client) - before == sum(spent)
    assert said["usage"]["prompt_tokens"] > 100
    assert (said["decided"], said["failed"], said["leased"]) == (6, 0, 0)
    for one in said["data"]:
        assert one["error"] is None
        assert one["response"]["body"]["choices"][0]["message"]["content"]
        assert one["response"]["body"]["mull"]["plan"]
    if allocation == "equal":
        assert max(spent) <= tokens // 6


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("chain_of_thought", {}),
        ("best_of_n", {"n": 4}),
        ("self_consistency", {"n": 8}),
        ("beam_search", {"width": 2, "branch": 2}),
        ("tree_of_thoughts", {"width": 2}),
    ],
)
def test_any_strategy_takes_a_batch_in_equal_parts(
    client: httpx.Client, kind: str, fields: dict[str, Any]
):
    before = generated(client)
    path = f"/v1/strategies/{kind}/batch"
    reply = client.post(path, json=body(4, 1200) | fields, headers={"X-Request-Id": f"all-{kind}"})
    assert reply.status_code == 200, reply.text
    said = reply.json()
    spent = [one["response"]["body"]["usage"]["completion_tokens"] for one in said["data"]]
    assert said["allocation"] == "equal"
    assert max(spent) <= 300
    assert sum(spent) == said["spent"]["tokens"] == generated(client) - before
    assert all(one["response"]["body"]["mull"] for one in said["data"])
    told = client.get(f"{path}/all-{kind}").json()
    assert told["over"]
    assert told["spent"]["samples"] >= 4
    assert client.get(f"/v1/strategies/given/batch/all-{kind}").status_code == 404


def test_a_stream_tells_each_result_as_it_is_decided_and_how_far_it_is(client: httpx.Client):
    reply = client.post(PATH, json=body(8, 4000, stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    happened = events(reply.text)
    names = [name for name, _ in happened]
    assert names[0] == "progress"
    assert names[-1] == "done"
    assert names.count("result") == 8
    results = {said["custom_id"]: said for name, said in happened if name == "result"}
    assert {said["index"] for said in results.values()} == set(range(8))
    done = happened[-1][1]
    assert done["over"]
    assert done["spent"]["tokens"] == sum(
        one["response"]["body"]["usage"]["completion_tokens"] for one in results.values()
    )
    amounts = [said["spent"]["tokens"] for name, said in happened if name != "result"]
    assert amounts == sorted(amounts)


def test_one_prompt_fails_alone(client: httpx.Client):
    asked = body(4, 2000)
    asked["requests"][2]["body"]["messages"][0]["content"] = "word " * 20_000
    asked["requests"][3]["body"]["temperature"] = -1  # which vLLM finds out late
    said = client.post(PATH, json=asked).json()
    assert [one["response"]["status_code"] for one in said["data"]] == [200, 200, 400, 400]
    assert said["data"][2]["error"]["message"]
    assert "error" in said["data"][2]["response"]["body"]
    assert said["failed"] == 2


def test_samples_may_be_the_budget(client: httpx.Client):
    said = client.post(PATH, json=body(4, 1) | {"budget": {"samples": 13}}).json()
    calls = [
        one["response"]["body"]["mull"]["usage"]["engine_calls"]
        - one["response"]["body"]["mull"]["usage"]["verifier_calls"]
        for one in said["data"]
    ]
    assert sum(calls) == said["spent"]["samples"] <= 13


def test_a_deadline_ends_it_with_what_there_is(client: httpx.Client):
    asked = body(24, 1_000_000) | {"budget": {"tokens": 1_000_000, "seconds": 0.6}}
    began = time.monotonic()
    said = client.post(PATH, json=asked | {"max_tokens": 900, "temperature": 1.5}).json()
    assert time.monotonic() - began < 10
    assert said["decided"] == 24
    kinds = {one["error"]["code"] if one["error"] else "answered" for one in said["data"]}
    assert kinds <= {"answered", "budget_exhausted"}


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"requests": []}, "requests", "list"),
        ({"requests": None}, "requests", "list"),
        ({"requests": [7]}, "requests.0", "object"),
        ({"requests": lines(1) * 2}, "requests.1.custom_id", "twice"),
        ({"requests": [{"body": {"messages": []}}]}, "requests.0.custom_id", "characters"),
        ({"requests": [{"custom_id": "a"}]}, "requests.0.body", "chat request"),
        ({"requests": [lines(1)[0] | {"urll": ""}]}, "requests.0.urll", "url"),
        ({"requests": [lines(1)[0] | {"url": "/v1/embeddings"}]}, "requests.0.url", "chat"),
        ({"requests": lines(2, temprature=1)}, "requests.0.body.temprature", "temperature"),
        ({"requests": lines(2, temperature="hot")}, "requests.0.body.temperature", ""),
        ({"requests": lines(2, model="other")}, "requests.0.body.model", "batch"),
        ({"requests": lines(2, stream=True)}, "requests.0.body.stream", "batch"),
        ({"requests": lines(2, n=1000)}, "requests.0.body.n", "distinct"),
        ({"requests": lines(2, messages=7)}, "requests.0.body.messages", "list"),
        ({"requests": lines(1) * 1001}, "requests", "1000"),
        ({"budget": None}, "budget", "tokens or samples"),
        ({"budget": {"seconds": 3}}, "budget", "tokens or samples"),
        ({"budget": {"tokens": 3}}, "budget.tokens", "too few"),
        ({"budget": {"dollars": 3}}, "budget.dollars", ""),
        ({"allocation": "greedy"}, "allocation", "marginal"),
        (
            {
                "allocation": "marginal",
                "requests": [lines(2)[0], lines(2, temperature=0.9)[1]],
            },
            "allocation",
            "temperature of every line",
        ),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"model": None}, "model", "served"),
        ({"messages": []}, "messages", "its own"),
        ({"requets": []}, "requets", "requests"),
        ({"n": 0}, "n", "greater"),
        ({"use_beam_search": True}, "use_beam_search", "search"),
    ],
)
def test_refused_whole_and_by_name(
    client: httpx.Client, change: dict[str, Any], field: str, says: str
):
    reply = client.post(PATH, json=body(4, 2000) | change)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field
    assert says in reply.json()["error"]["message"]


def test_an_unknown_model_is_not_found_and_bad_bodies_are_refused(client: httpx.Client):
    assert client.post(PATH, json=body(2, 200, model="mull-tini")).status_code == 404
    for raw in (b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 5000):
        reply = client.post(PATH, content=raw, headers={"content-type": "application/json"})
        assert reply.status_code == 400, (raw[:10], reply.text)


def test_the_account_of_a_batch_is_for_its_own_key(client: httpx.Client):
    headers = {"X-Request-Id": "my-batch", "Authorization": "Bearer mine"}
    done = client.post(PATH, json=body(3, 900), headers=headers).json()
    account = client.get(f"{PATH}/my-batch", headers=headers).json()
    assert account["over"]
    assert account["spent"] == done["spent"]
    assert client.get(f"{PATH}/my-batch").status_code == 404
    assert client.get(f"{PATH}/nobody", headers=headers).status_code == 404


async def test_hanging_up_aborts_all_of_it(server: Served, running: Any):
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for stream in (False, True):
            name = f"gone-{stream}"
            asked = body(20, 1_000_000, stream=stream, max_tokens=900, temperature=1.5)
            asking = asyncio.create_task(
                client.post(PATH, json=asked, headers={"X-Request-Id": name})
            )
            async with asyncio.timeout(20):
                while await running(client) == 0:
                    await asyncio.sleep(0.02)
            asking.cancel()
            async with asyncio.timeout(3):
                while await running(client) > 0:
                    await asyncio.sleep(0.02)
            account = (await client.get(f"{PATH}/{name}")).json()
            assert account["over"]
            assert account["leased"] == 0


# --- files


def mull(*flags: str, **options: Any) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).parent / "mull"), "batch", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finished(process: "subprocess.Popen[str]", status: int) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said
    return said


def test_a_killed_run_goes_on_with_nothing_lost_done_twice_or_overspent(
    server: Served, client: httpx.Client, tmp_path: Path
):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        json.dumps(line | {"method": "POST", "url": "/v1/chat/completions"}) for line in lines(24)
    ]
    asked.write_text("\n".join(rows))
    flags = [str(asked), str(answered), "--url", server.url, "--model", "mull-tiny"]
    flags += ["--tokens", "12000", "--fields", '{"max_tokens": 200, "n": 16}', "--together", "8"]
    before = generated(client)
    first = mull(*flags)
    deadline = time.monotonic() + 60
    while not answered.exists() or answered.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=10)
    kept = [json.loads(line)["custom_id"] for line in answered.read_text().splitlines() if line]
    assert len(kept) < 24
    with answered.open("a") as torn:
        torn.write('{"id": "batch_req_run-torn", "custom_id": "p2')
    said = finished(mull(*flags), 0)
    assert "24 of 24 answered" in said
    results = [json.loads(line) for line in answered.read_text().splitlines()]
    names = [one["custom_id"] for one in results]
    assert names[: len(kept)] == kept
    assert sorted(names) == sorted(f"p{at}" for at in range(24))
    assert all(one["response"]["status_code"] == 200 for one in results)
    assert generated(client) - before <= 12_000
    journal = answered.with_name("out.jsonl.journal").read_text().splitlines()
    over = {one["stretch"]: one for one in map(json.loads, journal[1:])}
    assert all(one["over"] for one in over.values())
    assert sum(one["tokens"] for one in over.values()) == generated(client) - before
    size = answered.stat().st_size
    finished(mull(*flags), 0)  # there is nothing left to ask
    assert answered.stat().st_size == size
    other = [flag if flag != '{"max_tokens": 200, "n": 16}' else '{"n": 8}' for flag in flags]
    assert "was begun with" in finished(mull(*other), 2)
    asked.write_text("\n".join(rows[1:]))
    assert "another input" in finished(mull(*flags), 2)


def test_plain_lines_a_spent_budget_and_refused_prompts(server: Served, tmp_path: Path):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    {"prompt": PROMPTS[0], "answer": "3"},
                    {"id": "q", "question": PROMPTS[1]},
                    {"messages": [{"role": "user", "content": PROMPTS[2]}], "max_tokens": 20},
                    {"custom_id": "long", "prompt": "word " * 20_000},
                ],
            )
        )
    )
    flags = [str(asked), str(answered), "--url", server.url, "--model", "mull-tiny"]
    assert "raise --tokens" in finished(mull(*flags, "--tokens", "3"), 1)
    assert not answered.read_text()
    environment = os.environ | {"MULL_API_KEY": "not asked for"}
    finished(mull(*flags, "--tokens", "1500", env=environment), 0)
    results = {one["custom_id"]: one for one in map(json.loads, answered.read_text().splitlines())}
    assert set(results) == {"line-1", "q", "line-3", "long"}
    assert results["long"]["response"]["status_code"] == 400
    assert results["line-3"]["response"]["body"]["choices"][0]["message"]["content"]
