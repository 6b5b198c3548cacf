"""Whatever a client sends, it gets a 4xx or a bounded answer, and nobody else notices."""

import json
import time
from typing import Any

import httpx
import pytest

CHAT, NATIVE = "/v1/chat/completions", "/v1/strategies/self_consistency"
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Tom has 5 apples. Mia gives him 3. How many?"}],
    "max_tokens": 20,
}
VOTE = {"strategy": {"kind": "self_consistency", "n": 2}}


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "apple " * 3000}]},
        {"strategy": {"kind": "self_consistency", "n": 0}},
        {"strategy": {"kind": "self_consistency", "n": 10**6}},
        {"strategy": {"kind": "self_consistency", "n": "many"}},
        {"strategy": [1]},
        {"budget": {"tokens": -1}},
        {"budget": {"seconds": "NaN"}},
        {"budget": []},
        {"model": "nobody"},
        {"model": "mull-tiny:nothing"},
        {"model": 7},
        {"messages": "no list"},
        {"messages": []},
        {"temperature": "hot"},
        {"max_tokens": -5},
        {"trace": "yes"},
        {"stop": 7},
        {"strategy": {"kind": "best_of_n", "verifier": {"kind": "regex", "pattern": "("}}},
        {"vllm_xargs": {"strategy": "{"}},
    ],
    ids=lambda more: json.dumps(more)[:50],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_wrong_requests_are_4xx(client: httpx.Client, more: dict[str, Any], stream: bool):
    reply = client.post(CHAT, json=BODY | VOTE | {"stream": stream} | more)
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, NATIVE])
def test_wrong_bodies_are_4xx_and_cost_little(client: httpx.Client, path: str):
    huge = json.dumps(BODY | VOTE | {"messages": [{"role": "user", "content": "x" * (10 << 20)}]})
    nested = json.dumps(BODY)[:-1] + f', "metadata": {deep(20_000)}}}'
    over = json.dumps(BODY | VOTE | {"user": "x" * (17 << 20)})
    for raw in (huge, over, nested, deep(200_000), b"\xff\xfe{", "null", "NaN", ""):
        began = time.monotonic()
        reply = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert 400 <= reply.status_code < 500, (raw[:40], reply.status_code, reply.text[:200])
        assert time.monotonic() - began < 5
    assert client.get("/health").status_code == 200


def test_a_pattern_that_backtracks_for_ever_is_bounded(client: httpx.Client):
    endless = {"kind": "regex", "pattern": r"(.|.|.)*\Z#"}
    began = time.monotonic()
    reply = client.post(NATIVE, json=BODY | {"n": 2, "answer": endless, "max_tokens": 60})
    assert reply.status_code == 200, reply.text
    assert reply.json()["answer"] is None
    assert time.monotonic() - began < 20
    assert client.post(NATIVE, json=BODY | {"n": 2}).status_code == 200


def test_what_clients_say_is_not_in_the_log(server):
    secret = "a-secret-that-nobody-logs"
    body = BODY | VOTE | {"messages": [{"role": "user", "content": secret}]}
    headers = {"Authorization": f"Bearer {secret}"}
    for more in ({}, {"budget": {"tokens": "x"}}, {"stream": True}):
        httpx.post(f"{server.url}{CHAT}", json=body | more, headers=headers, timeout=60)
        httpx.post(f"{server.url}{NATIVE}", json=body | more, headers=headers, timeout=60)
    assert secret not in server.log.read_text()
