"""The gateway before the server of all tests answers as that server does by itself."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from finetune.tiny.problems import exam, grade

CHAT = "/v1/chat/completions"
QUESTION = (
    "Tom has 12 apples. At the park he finds 7. Ann gets 4 from him. "
    "How many apples does Tom have now?"
)
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 150,
    "seed": 3,
}
STRATEGIES: list[dict[str, Any]] = [
    {"kind": "chain_of_thought"},
    {"kind": "best_of_n", "n": 4},
    {"kind": "best_of_n", "n": 4, "verifier": {"kind": "likelihood", "over": "min"}},
    {"kind": "best_of_n", "n": 4, "verifier": "self_certainty"},
    {"kind": "self_consistency", "n": 6, "early_stop": "never", "start": "all"},
    {"kind": "deep_confidence", "n": 6, "warmup": 3},
    {"kind": "self_refine", "n": 3},
    {"kind": "budget_forcing", "end": "Answer"},
    {"kind": "beam_search", "width": 2, "branch": 2, "verifier": "likelihood"},
    {"kind": "beam_search", "level": "token", "width": 3},
    {"kind": "tree_of_thoughts", "verifier": "likelihood", "max_nodes": 12},
    {"kind": "tree_of_thoughts", "evaluate": "value", "max_nodes": 8, "evaluations": 1},
    {"kind": "compute_optimal", "n": 4},
]


@pytest.fixture
def there(gateway):
    with httpx.Client(base_url=gateway.url, timeout=120) as client:
        yield client


def told(reply: dict[str, Any]) -> dict[str, Any]:
    """What does not differ between two replies to the same request."""
    mull = {name: of for name, of in reply["mull"].items() if name != "run"}
    mull["usage"] = {
        name: of for name, of in mull["usage"].items() if "cached" not in name
    }  # the second finds what the first has left
    choices = [
        {"text": one["message"]["content"], "finish_reason": one["finish_reason"]}
        for one in reply["choices"]
    ]
    usage = {name: of for name, of in reply["usage"].items() if name != "prompt_tokens_details"}
    return {"choices": choices, "usage": usage, "mull": mull, "model": reply["model"]}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: "-".join(map(str, one.values())))
def test_the_same_seed_gives_the_same_reply_as_the_engine_itself(
    client: httpx.Client, there: httpx.Client, strategy: dict[str, Any]
):
    body = BODY | {"strategy": strategy}
    here, over = client.post(CHAT, json=body), there.post(CHAT, json=body)
    assert (here.status_code, over.status_code) == (200, 200), (here.text, over.text)
    assert told(over.json()) == told(here.json())
    assert over.json().keys() <= here.json().keys()


def test_many_prompts_have_one_budget_over_a_fleet(client: httpx.Client, there: httpx.Client):
    lines = [
        {"custom_id": str(at), "body": {"messages": BODY["messages"], "seed": at}}
        for at in range(4)
    ]
    asked = {"model": "mull-tiny", "max_tokens": 150, "requests": lines, "n": 2}
    asked |= {"budget": {"tokens": 800}, "allocation": "equal"}
    path = "/v1/strategies/compute_optimal/batch"
    here, over = (at.post(path, json=asked) for at in (client, there))
    assert (here.status_code, over.status_code) == (200, 200), (here.text, over.text)
    assert over.json()["spent"] == here.json()["spent"]
    for one, other in zip(over.json()["data"], here.json()["data"], strict=True):
        assert one["error"] is None
        assert told(one["response"]["body"]) == told(other["response"]["body"])
    refused = there.post(path, json=asked | {"requests": [{"custom_id": "a", "body": {}}]})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "requests.0.body.messages"


def test_streams_and_the_native_route_say_the_same(client: httpx.Client, there: httpx.Client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for strategy in (STRATEGIES[0], STRATEGIES[4], STRATEGIES[8]):
        whole = there.post(CHAT, json=BODY | {"strategy": strategy}).json()
        text = there.post(CHAT, json=BODY | {"strategy": strategy} | options).text
        lines = [line for line in text.splitlines() if line]
        assert all(line.startswith((":", "data: ")) for line in lines)
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        said = "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )
        assert said == whole["choices"][0]["message"]["content"]
        [mull] = [chunk["mull"] for chunk in chunks if "mull" in chunk]
        assert mull["answer"] == whole["mull"]["answer"]
        for usage in (chunks[-1]["usage"], whole["usage"]):
            assert isinstance(usage.pop("prompt_tokens_details")["cached_tokens"], int)
        assert chunks[-1]["usage"] == whole["usage"]
        if strategy["kind"] == "chain_of_thought":
            assert len(chunks) > 10  # as they come
        kind = strategy["kind"]
        native = BODY | {name: of for name, of in strategy.items() if name != "kind"}
        here, over = (
            one.post(f"/v1/strategies/{kind}", json=native).json() for one in (client, there)
        )
        assert over["candidates"] == here["candidates"]
        assert over["text"] == said


def test_a_prompt_in_text_or_tokens_is_completed(client: httpx.Client, there: httpx.Client):
    words = {"model": "mull-tiny", "max_tokens": 40, "seed": 5, "strategy": STRATEGIES[4]}
    ids = client.post("/tokenize", json={"model": "mull-tiny", "prompt": QUESTION}).json()["tokens"]
    for prompt in (QUESTION, ids, [ids], [QUESTION]):
        here, over = (
            one.post("/v1/completions", json=words | {"prompt": prompt}).json()
            for one in (client, there)
        )
        assert over["object"] == here["object"] == "text_completion"
        assert over["choices"][0]["text"] == here["choices"][0]["text"]
        assert over["usage"]["completion_tokens"] == here["usage"]["completion_tokens"]


def test_twenty_problems_have_the_answers_of_the_engine_itself(
    client: httpx.Client, there: httpx.Client
):
    right = 0
    for one in exam(7, 10):
        body = BODY | {
            "messages": [{"role": "user", "content": one.prompt}],
            "strategy": {"kind": "self_consistency", "n": 8, "early_stop": "never"},
        }
        here, over = (told(which.post(CHAT, json=body).json()) for which in (client, there))
        for reply in (here, over):  # how an answer is spelled in a vote is up to who comes first
            reply["votes"] = sorted(reply["mull"].pop("votes").values())
        assert over == here
        right += grade(one, over["choices"][0]["text"])
    assert right >= 5


def test_what_verifies_lists_and_traces_is_there(client: httpx.Client, there: httpx.Client):
    for path in ("/v1/strategies", "/v1/verifiers"):
        assert there.get(path).json() == client.get(path).json()
    asked = {name: BODY[name] for name in ("model", "messages")}
    asked |= {"candidates": ["12 + 7 = 19", "12 + 7 = 18"], "verifier": "arithmetic"}
    here, over = (one.post("/v1/verify", json=asked).json() for one in (client, there))
    assert over["data"] == here["data"]
    reply = there.post(CHAT, json=BODY | {"strategy": STRATEGIES[4]}).json()
    trace = there.get(f"/v1/traces/{reply['mull']['run']}").json()
    assert trace["mull"] == reply["mull"]
    assert client.get(f"/v1/traces/{reply['mull']['run']}").status_code == 404
    ids = {card["id"] for card in there.get("/v1/models").json()["data"]}
    assert "mull-tiny" in ids
    known = there.get("/v1/calibrations").json()
    assert known["weights"] == client.get("/v1/calibrations").json()["weights"]
    assert {one["id"]: one["usable"] for one in known["data"]} == {"small": True, "foreign": False}


def test_what_names_no_strategy_is_the_servers_own(client: httpx.Client, there: httpx.Client):
    """Byte for byte, but for what differs between two replies of one server."""

    def bare(text: str) -> str:
        return re.sub(
            r"(chatcmpl|resp|msg|cmpl|modelperm)[-_][0-9a-f]+|[0-9]{10}(\.[0-9]+)?", "X", text
        )

    plain = BODY | {"temperature": 0}
    requests: list[tuple[str, str, Any]] = [
        ("POST", CHAT, plain),
        ("POST", CHAT, plain | {"model": "nobody"}),
        ("POST", CHAT, {"messages": 7}),
        ("POST", "/v1/completions", {"model": "mull-tiny", "prompt": "1 +", "temperature": 0}),
        ("POST", "/tokenize", {"model": "mull-tiny", "prompt": "1 +"}),
        ("GET", "/version", None),
        ("GET", "/v1/models", None),
        ("GET", "/nowhere", None),
        ("PUT", CHAT, None),
    ]
    for method, path, body in requests:
        here, over = (one.request(method, path, json=body) for one in (client, there))
        assert over.status_code == here.status_code
        assert over.headers["content-type"] == here.headers["content-type"]
        assert bare(over.text) == bare(here.text), path
    streamed = []
    for one in (client, there):
        with one.stream("POST", CHAT, json=plain | {"stream": True}) as reply:
            pieces = list(reply.iter_raw())
        assert len(pieces) > 3  # as they come
        lines = b"".join(pieces).splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        streamed.append("".join(one["choices"][0]["delta"].get("content", "") for one in chunks))
        assert lines[-2] == b"data: [DONE]"
    assert streamed[0] == streamed[1]


def test_openai_s_client_does_not_notice(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as oai:
        strategy = {"strategy": STRATEGIES[4]}
        whole = oai.chat.completions.create(**BODY, extra_body=strategy)  # type: ignore[call-overload]
        assert r"\boxed{15}" in whole.choices[0].message.content
        assert whole.mull["answer"] == "15"
        stream = oai.chat.completions.create(**BODY, stream=True, extra_body=strategy)  # type: ignore[call-overload]
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as refused:
            oai.chat.completions.create(**BODY, extra_body={"strategy": {"kind": "best_of_m"}})  # type: ignore[call-overload]
        assert refused.value.param == "strategy.kind"


async def generated(client: httpx.AsyncClient) -> float:
    """Tokens that the engine has generated so far."""
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_usage_is_what_the_engine_counts_aborted_samples_included(server, gateway):
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as engine,
        httpx.AsyncClient(base_url=gateway.url, timeout=120) as there,
    ):
        for more in (
            {"budget": {"seconds": 0.4}, "max_tokens": 900, "min_tokens": 900},
            {"strategy": {"kind": "self_consistency", "n": 16, "start": "all"}},
            {"strategy": {"kind": "deep_confidence", "n": 8, "warmup": 3, "eta": 0.2}},
            {"budget": {"tokens": 100}},
            {"strategy": STRATEGIES[8], "min_tokens": 0},
        ):
            await there.post(CHAT, json=BODY | {"strategy": STRATEGIES[4]})  # whatever was probed
            before = await generated(engine)
            reply = await there.post(CHAT, json=BODY | {"strategy": STRATEGIES[4]} | more)
            assert reply.status_code == 200, reply.text
            after = await generated(engine)
            assert after - before == reply.json()["usage"]["completion_tokens"], more


async def test_a_client_that_leaves_ends_its_search(
    server, gateway, running: Callable[[httpx.AsyncClient], Awaitable[int]]
):
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as engine,
        httpx.AsyncClient(base_url=gateway.url, timeout=120) as there,
    ):
        for streamed in (False, True):
            body = BODY | {"strategy": STRATEGIES[4], "max_tokens": 900, "min_tokens": 900}
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(there.post(CHAT, json=body | {"stream": streamed}), 0.7)
            async with asyncio.timeout(5):
                while await running(engine):
                    await asyncio.sleep(0.05)
