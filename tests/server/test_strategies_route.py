"""The native routes: the catalogue, a strategy as an endpoint, and what is refused by name."""

from typing import Any

import httpx
import pytest

from strategies.registry import STRATEGIES

QUESTION = "Use the numbers 3, 5, 2 with + - * / to make 16. Use each number once."
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 200,
    "seed": 7,
}


def test_catalogue_lists_every_strategy_with_schema_and_paper(client: httpx.Client):
    listed = {one["id"]: one for one in client.get("/v1/strategies").json()["data"]}
    assert set(listed) == set(STRATEGIES)
    for one in listed.values():
        assert one["schema"]["additionalProperties"] is False
        assert "arXiv" in one["paper"]
        assert one["defaults"]["kind"] == one["id"]


def test_catalogue_of_verifiers(client: httpx.Client):
    listed = {one["id"] for one in client.get("/v1/verifiers").json()["data"]}
    assert listed == {
        "likelihood",
        "self_certainty",
        "regex",
        "json_schema",
        "countdown",
        "arithmetic",
        "adapter",
        "reward_model",
        "judge",
        "unit_tests",
        "ensemble",
    }


def test_native_reply_shows_every_candidate_and_adds_up(client: httpx.Client):
    reply = client.post("/v1/strategies/best_of_n", json=BODY | {"n": 6, "verifier": "countdown"})
    assert reply.status_code == 200, reply.text
    run = reply.json()
    assert [one["index"] for one in run["candidates"]] == list(range(6))
    assert sum(one["tokens"] for one in run["candidates"]) == run["usage"]["completion_tokens"]
    assert [one["fate"] for one in run["candidates"]].count("kept") == 1
    assert {one["score"] for one in run["candidates"]} <= {0.0, 1.0}
    assert run["mull"]["usage"]["engine_calls"] == 6
    assert run["stopped"] == "samples"
    assert run["timings"]["total_seconds"] > 0


def test_early_stop_saves_samples(client: httpx.Client):
    easy = BODY | {
        "messages": [
            {
                "role": "user",
                "content": "Tom has 5 apples. Mia gives him 3. How many apples does Tom have now?",
            }
        ]
    }
    run = client.post(
        "/v1/strategies/self_consistency",
        json=easy | {"n": 16, "early_stop": "confidence", "temperature": 0},
    ).json()
    assert run["stopped"] == "decided"
    assert run["mull"]["usage"]["engine_calls"] == 4
    assert run["confidence"] == pytest.approx(0.96875)


def test_a_token_budget_is_never_overspent(client: httpx.Client):
    for tokens in (1, 7, 40, 300):
        run = client.post(
            "/v1/strategies/self_consistency", json=BODY | {"n": 8, "budget": {"tokens": tokens}}
        ).json()
        assert run["usage"]["completion_tokens"] <= tokens


def test_the_answer_format_is_obeyed(client: httpx.Client):
    run = client.post(
        "/v1/strategies/self_consistency",
        json=BODY | {"n": 4, "answer": {"kind": "regex", "pattern": r": (\d+)"}},
    ).json()
    assert all(one["answer"] is None or one["answer"].isdigit() for one in run["candidates"])
    assert any(one["answer"] for one in run["candidates"])


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "field", "says"),
    [
        ("/v1/strategies/best_of_m", {}, "kind", "best_of_n"),
        ("/v1/strategies/best_of_n", {"nn": 3}, "nn", "n"),
        ("/v1/strategies/best_of_n", {"n": 0}, "n", "greater than or equal to 1"),
        ("/v1/strategies/best_of_n", {"n": 10**6}, "n", "less than or equal to 256"),
        (
            "/v1/strategies/best_of_n",
            {"verifier": "likelyhood"},
            "verifier.kind",
            "likelihood",
        ),
        (
            "/v1/strategies/best_of_n",
            {"verifier": {"kind": "likelihood", "over": "max"}},
            "verifier.over",
            "",
        ),
        ("/v1/strategies/chain_of_thought", {"stream": "yes"}, "stream", "true or false"),
        (CHAT, {"strategy": {"kind": "self_consistancy"}}, "strategy.kind", "self_consistency"),
        (CHAT, {"strategy": {"n": 4}}, "strategy.kind", "best_of_n"),
        (CHAT, {"strategy": {"kind": "best_of_n", "m": 4}}, "strategy.m", "n"),
        (CHAT, {"strategy": {"kind": "best_of_n", "n": "many"}}, "strategy.n", "integer"),
        (CHAT, {"strategy": 7}, "strategy", "object"),
        (CHAT, {"strategy": "best_of_n", "n": 9}, "n", "distinct"),
        (CHAT, {"strategy": "best_of_n", "budget": {"tokens": 0}}, "budget.tokens", "greater"),
        (CHAT, {"strategy": "best_of_n", "budget": {"dollars": 1}}, "budget.dollars", ""),
        (CHAT, {"budget": {"tokens": 10}}, "budget", "strategy"),
        (CHAT, {"model": "mull-tiny:best_of"}, "model", "best_of_n"),
        (
            CHAT,
            {"model": "mull-tiny:best_of_n", "strategy": "self_consistency"},
            "model",
            "self_consistency",
        ),
        (
            "/v1/completions",
            {"strategy": "best_of_n", "prompt": ["a", "b"]},
            "prompt",
            "one prompt",
        ),
        (
            "/v1/strategies/self_consistency",
            {"early_stop": "confidence", "weight": "verifier", "verifier": "likelihood"},
            "",
            "confidence",
        ),
    ],
)
def test_refused_by_name_in_openai_shape(
    client: httpx.Client, path: str, body: dict[str, Any], field: str, says: str
):
    reply = client.post(path, json=BODY | body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"] or "") == field
    assert says in error["message"]


def test_a_rule_without_its_problem_is_an_error_not_a_score(client: httpx.Client):
    other = BODY | {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    reply = client.post("/v1/strategies/best_of_n", json=other | {"n": 2, "verifier": "countdown"})
    assert reply.status_code == 422
    assert reply.json()["error"]["type"] == "verifier_failed"


def test_bad_bodies_are_refused_and_the_server_lives(client: httpx.Client):
    for raw in (b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 5000):
        for path in (CHAT, "/v1/strategies/best_of_n"):
            reply = client.post(path, content=raw, headers={"content-type": "application/json"})
            assert 400 <= reply.status_code < 500, (path, raw[:10], reply.text)
    assert client.get("/health").status_code == 200


def test_trigger_and_examples_reach_the_prompt(client: httpx.Client):
    plain = client.post("/v1/strategies/chain_of_thought", json=BODY).json()
    shown = client.post(
        "/v1/strategies/chain_of_thought",
        json=BODY
        | {
            "trigger": "Think step by step.",
            "examples": [
                {"question": "Use the numbers 1, 2 to make 3.", "answer": "Answer: \\boxed{1 + 2}"}
            ],
        },
    ).json()
    assert shown["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 10
