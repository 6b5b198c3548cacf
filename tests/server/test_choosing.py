"""Every way to choose a strategy on a real server, one against another."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

WIRE: dict[str, Any] = {"kind": "self_consistency", "n": 6, "early_stop": "never"}
CONFIG = {
    "limits": {"tokens": 900},
    "presets": {
        "deep": {"strategy": WIRE, "description": "Six votes."},
        "short": {"strategy": WIRE, "budget": {"tokens": 60}},
    },
}
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [
        {
            "role": "user",
            "content": "Tom has 12 apples. Mia gives him 7. How many has he now?",
        }
    ],
    "max_tokens": 120,
    "seed": 7,
}


@pytest.fixture(scope="module")
def chosen(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("choosing")
    (folder / "mull.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
    with (
        serve(folder / "log", MULL_CONFIG=str(folder / "mull.yaml")) as served,
        httpx.Client(base_url=served.url, timeout=120) as client,
    ):
        yield client


def answered(reply: httpx.Response) -> tuple[Any, ...]:
    assert reply.status_code == 200, reply.text
    said = reply.json()
    text = said["text"] if "text" in said else said["choices"][0]["message"]["content"]
    return text, said["mull"]["votes"], said["usage"]["completion_tokens"]


WAYS: dict[str, dict[str, Any]] = {
    "name": {"json": BODY | {"strategy": "deep"}},
    "suffix": {"json": BODY | {"model": "mull-tiny:deep"}},
    "header name": {"json": BODY, "headers": {"X-Mull-Strategy": "deep"}},
    "header": {"json": BODY, "headers": {"X-Mull-Strategy": json.dumps(WIRE)}},
    "xargs": {"json": BODY | {"vllm_xargs": {"strategy": json.dumps(WIRE)}}},
    "suffix of a kind, made precise by the header": {
        "json": BODY | {"model": "mull-tiny:self_consistency"},
        "headers": {"X-Mull-Strategy": json.dumps(WIRE)},
    },
    "native": {
        "url": "/v1/strategies/self_consistency",
        "json": BODY | {"n": 6, "early_stop": "never"},
    },
    "native, made precise by a preset": {
        "url": "/v1/strategies/self_consistency",
        "json": BODY | {"model": "mull-tiny:deep"},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(chosen: httpx.Client, way: str):
    reference = answered(chosen.post(CHAT, json=BODY | {"strategy": WIRE}))
    assert sum(reference[1].values()) > 0
    asked = {"url": CHAT, "headers": {}} | WAYS[way]
    reply = chosen.post(asked["url"], json=asked["json"], headers=asked["headers"])
    assert answered(reply) == reference


@pytest.mark.parametrize(
    ("path", "body", "header", "field"),
    [
        (CHAT, {"strategy": "best_of_n"}, "deep", "X-Mull-Strategy"),
        (CHAT, {"model": "mull-tiny:deep"}, "best_of_n", "model"),
        (
            CHAT,
            {"strategy": "deep", "vllm_xargs": {"strategy": "best_of_n"}},
            None,
            "vllm_xargs.strategy",
        ),
        ("/v1/strategies/best_of_n", {"n": 2}, "deep", "X-Mull-Strategy"),
        ("/v1/strategies/best_of_n", {"strategy": "deep"}, None, "strategy"),
        ("/v1/chat/completions/batch", {"model": "mull-tiny:deep"}, None, "strategy"),
    ],
)
def test_contradictions_are_refused(
    chosen: httpx.Client, path: str, body: dict[str, Any], header: str | None, field: str
):
    headers = {} if header is None else {"X-Mull-Strategy": header}
    reply = chosen.post(path, json=BODY | body, headers=headers)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field


def test_presets_are_listed_as_models(chosen: httpx.Client):
    listed = {one["id"]: one for one in chosen.get("/v1/models").json()["data"]}
    served = {"mull-tiny", "mull-tiny-prices", "mull-tiny-rft", "mull-tiny-verifier"}
    assert set(listed) == {f"{name}{one}" for name in served for one in ("", ":deep", ":short")}
    assert listed["mull-tiny:deep"]["parent"] == "mull-tiny"
    assert listed["mull-tiny:deep"]["description"] == "Six votes."
    assert "description" not in listed["mull-tiny:short"]


def test_maxima_hold_on_every_path(chosen: httpx.Client):
    much = {"budget": {"tokens": 10_000}}
    for path, body in (
        (CHAT, {"strategy": WIRE | {"n": 64}}),
        ("/v1/strategies/self_consistency", {"n": 64, "early_stop": "never"}),
    ):
        reply = chosen.post(path, json=BODY | body | much).json()
        assert reply["usage"]["completion_tokens"] <= 900
        assert reply["mull"]["budget"]["tokens"] == 900
    short = chosen.post(CHAT, json=BODY | {"model": "mull-tiny:short"}).json()
    assert short["usage"]["completion_tokens"] <= 60


def test_other_endpoints_are_left_alone(chosen: httpx.Client):
    asked = {"model": "mull-tiny", "prompt": "2 + 2", "strategy": "none"}
    assert chosen.post("/tokenize", json=asked).status_code == 200


def test_xargs_choose_on_sagemakers_endpoint_too(chosen: httpx.Client):
    named = {"vllm_xargs": {"strategy": '{"kind": "best_of_n", "n": 3}', "budget": '{"tokens": 9}'}}
    reply = chosen.post("/invocations", json=BODY | named)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 9
    assert reply.json()["mull"]["usage"]["engine_calls"] == 3
    wrong = BODY | {"vllm_xargs": {"strategy": "nothing"}}
    assert chosen.post("/invocations", json=wrong).status_code == 400
