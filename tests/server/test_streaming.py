"""Streams: valid chunks and comments, the answer as soon as it is decided, errors that raise."""

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
QUESTION = (
    "Tom has 12 apples. At the park he finds 7. Ann gets 4 from him. "
    "How many apples does Tom have now?"
)
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 200,
    "seed": 3,
}
VOTE = {"kind": "self_consistency", "n": 8, "early_stop": "never", "start": "all"}
RAMBLE = {"max_tokens": 900, "min_tokens": 900, "temperature": 1.5}


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Named events, without comments."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            assert lines[0].startswith("event: "), block
            assert lines[1].startswith("data: "), block
            found.append((lines[0][7:], json.loads(lines[1][6:])))
    return found


@pytest.fixture
def oai(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_is_chunks_and_comments_and_agrees_with_the_whole_reply(client: httpx.Client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for strategy in (
        VOTE,
        {"kind": "best_of_n", "n": 4},
        "chain_of_thought",
        {"kind": "budget_forcing", "end": "Answer"},
        {"kind": "self_consistency"},
    ):
        whole = client.post(CHAT, json=BODY | {"strategy": strategy}).json()
        text = client.post(CHAT, json=BODY | {"strategy": strategy} | options).text
        lines = [line for line in text.splitlines() if line]
        assert all(line.startswith((":", "data: ")) for line in lines)
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        said = "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )
        told = [chunk["mull"] for chunk in chunks if "mull" in chunk]
        assert [one["answer"] for one in told] == [whole["mull"]["answer"]]
        if strategy != {"kind": "self_consistency"}:  # whose stop depends on who comes first
            assert said == whole["choices"][0]["message"]["content"]
            for usage in (chunks[-1]["usage"], whole["usage"]):
                assert isinstance(usage.pop("prompt_tokens_details")["cached_tokens"], int)
            assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_a_silent_stream_has_heartbeats(serve, tmp_path):
    with (
        serve(tmp_path / "log", MULL_HEARTBEAT_SECONDS="0.05") as served,
        httpx.Client(base_url=served.url, timeout=120) as client,
    ):
        asked = BODY | RAMBLE | {"strategy": VOTE, "stream": True, "min_tokens": 300}
        asked["max_tokens"] = 300
        lines = client.post(CHAT, json=asked).text.splitlines()
        first = next(at for at, line in enumerate(lines) if line.startswith("data: "))
        assert lines[:first].count(": mull") >= 3


def test_an_unassailable_vote_is_told_before_the_last_sample_ends(client: httpx.Client):
    asked = BODY | {"temperature": 1.5, "n": 16, "early_stop": "never", "start": "all"}
    asked |= {"stream": True, "answer": {"kind": "regex", "pattern": "Answer"}}  # all agree
    text = client.post("/v1/strategies/self_consistency", json=asked).text
    names = [name for name, _ in events(text)]
    assert names[-1] == "result"
    assert names.index("committed") < max(at for at, name in enumerate(names) if name == "sampled")
    run = events(text)[-1][1]
    committed = next(data for name, data in events(text) if name == "committed")
    chosen = next(data for name, data in events(text) if name == "chosen")
    assert committed["index"] == chosen["index"]
    assert run["stopped"] == "samples"


def test_trace_tells_what_happens_in_chunks_that_clients_read(oai, client: httpx.Client):
    asked: dict[str, Any] = {"model": "mull-tiny", "messages": BODY["messages"], "max_tokens": 200}
    extra = {"strategy": VOTE, "trace": True}
    made = list(oai.chat.completions.create(**asked, stream=True, extra_body=extra))
    told = [chunk.mull["event"] for chunk in made if not chunk.choices and "event" in chunk.mull]
    assert told.count("started") == 8
    assert told[-1] == "chosen"
    whole = client.post(CHAT, json=asked | extra).json()
    assert [one["event"] for one in whole["mull"]["trace"]][-1] == "chosen"
    silent = client.post(CHAT, json=asked | {"strategy": VOTE}).json()
    assert "trace" not in silent["mull"]


def test_a_failure_in_a_stream_is_raised_by_openai(oai):
    asked: Any = {"model": "mull-tiny", "messages": [{"role": "user", "content": "Hello"}]}
    extra = {"strategy": {"kind": "best_of_n", "n": 2, "verifier": "countdown"}}
    with pytest.raises(openai.APIError, match="numbers"):
        list(oai.chat.completions.create(**asked, max_tokens=9, stream=True, extra_body=extra))


def test_the_native_route_streams_events_and_refuses_in_plain_replies(client: httpx.Client):
    reply = client.post("/v1/strategies/best_of_n", json=BODY | {"n": 3, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    happened = events(reply.text)
    whole = client.post("/v1/strategies/best_of_n", json=BODY | {"n": 3}).json()
    assert happened[-1][0] == "result"
    assert happened[-1][1]["text"] == whole["text"]
    assert [name for name, _ in happened].count("sampled") == 3
    for wrong, status in (({"model": "nobody"}, 404), ({"temperature": -1}, 400)):
        asked = BODY | {"n": 3, "stream": True} | wrong
        reply = client.post("/v1/strategies/best_of_n", json=asked)
        assert reply.status_code == status, reply.text
        assert "error" in reply.json()
    lost = BODY | {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "n": 2}
    reply = client.post(
        "/v1/strategies/best_of_n", json=lost | {"verifier": "countdown", "stream": True}
    )
    assert events(reply.text)[-1][0] == "error"
    assert events(reply.text)[-1][1]["error"]["type"] == "verifier_failed"


def test_a_running_request_can_be_followed_by_its_own_key_only(server):
    headers = {"Authorization": "Bearer mine", "X-Request-Id": "follow-me"}
    asked = BODY | RAMBLE | {"strategy": VOTE | {"n": 16}}
    asking = threading.Thread(
        target=lambda: httpx.post(f"{server.url}{CHAT}", json=asked, headers=headers, timeout=120)
    )
    asking.start()
    path = f"{server.url}/v1/traces/follow-me"
    deadline = time.monotonic() + 10
    while httpx.get(path, headers=headers).status_code == 404:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert httpx.get(path, headers=headers).json()["over"] is False
    assert httpx.get(path, headers={"Authorization": "Bearer other"}).status_code == 404
    assert httpx.get(f"{path}/events").status_code == 404
    happened = events(httpx.get(f"{path}/events", headers=headers, timeout=120).text)
    asking.join(60)
    names = [name for name, _ in happened]
    assert names.count("started") == 16
    assert names[-1] == "chosen"
    assert httpx.get(path, headers=headers).json()["over"] is True


async def test_hanging_up_aborts_within_a_second(server, running):
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for path, more in (
            (CHAT, {"strategy": VOTE}),
            (CHAT, {"strategy": VOTE, "stream": True}),
            ("/v1/strategies/self_consistency", {"n": 8, "start": "all"}),
            ("/v1/strategies/self_consistency", {"n": 8, "start": "all", "stream": True}),
        ):
            asked = BODY | RAMBLE | more
            asking = asyncio.create_task(client.post(path, json=asked))
            async with asyncio.timeout(20):
                while await running(client) == 0:
                    await asyncio.sleep(0.02)
            asking.cancel()
            left = time.monotonic()
            while await running(client) > 0:
                await asyncio.sleep(0.02)
                assert time.monotonic() - left < 1.0, (path, more)
