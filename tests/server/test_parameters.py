"""Walks docs/parameters.md: every parameter is there, and does beside a strategy what it says."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

TABLE = Path(__file__).parents[2] / "docs" / "parameters.md"
ROW = re.compile(r"^\| `(\w+)` \| \*\*(prompt|sample|answer|run|refused)\*\*.* \| `(.*)` \|$")
ROWS: dict[str, tuple[str, Any]] = {
    match[1]: (match[2], json.loads(match[3]))
    for line in TABLE.read_text().splitlines()
    if (match := ROW.match(line))
}
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Tom has 5 apples. Mia gives him 3. How many?"}],
    "max_tokens": 12,
    "seed": 1,
    "strategy": {"kind": "best_of_n", "n": 3},
}
NEEDS: dict[str, dict[str, Any]] = {
    "logprobs": {"top_logprobs": 1},
    "ignore_eos": {"temperature": 0},
    "tools": {"tool_choice": "none"},  # calls: see test_tools.py
    "truncation_side": {"truncate_prompt_tokens": 64},
}
"""What a parameter asks for beside it."""


def test_the_table_has_a_row_for_each_parameter_and_no_other():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    assert set(ROWS) == set(ChatCompletionRequest.model_fields)


@pytest.mark.parametrize("name", ROWS)
def test_it_is_obeyed_or_refused_as_the_table_says(client: httpx.Client, name: str):
    verdict, value = ROWS[name]
    body = BODY | NEEDS.get(name, {}) | {name: value}
    reply = client.post("/v1/chat/completions", json=body)
    if verdict == "refused":
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == name
    else:
        assert reply.status_code == 200, reply.text
        assert reply.json()["mull"]["strategy"] == "best_of_n"


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json=BODY | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_sampling_parameters_reach_every_sample(client: httpx.Client):
    hard = "Use the numbers 3, 5, 2 with + - * / to make 16. Use each number once."
    hot = {
        "temperature": 1.5,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": hard}],
    }
    assert ask(client, max_tokens=5)["usage"]["completion_tokens"] == 15
    assert ask(client, max_completion_tokens=4)["usage"]["completion_tokens"] == 12
    assert ask(client, max_tokens=40, stop=["\n"])["usage"]["completion_tokens"] < 120
    assert len(ask(client, temperature=0, max_tokens=60)["mull"]["votes"]) <= 1
    same = [ask(client, **hot)["choices"][0]["message"]["content"] for _ in range(2)]
    assert same[0] == same[1]
    assert ask(client, **hot, seed=2)["choices"][0]["message"]["content"] != same[0]
    assert ask(client, min_tokens=12, ignore_eos=True)["usage"]["completion_tokens"] == 36
    only = ask(client, structured_outputs={"choice": ["yes", "no"]})
    assert only["choices"][0]["message"]["content"] in ("yes", "no")
    cut = ask(client, max_tokens=3)
    assert cut["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("kind", ["self_consistency", "best_of_n", "compute_optimal"])
def test_named_tokens_have_their_probabilities_told(client: httpx.Client, kind: str):
    """Also where a verifier or a plan goes by those of the chosen ones."""
    fields = {"logprobs": True, "logprob_token_ids": [5, 6], "strategy": {"kind": kind, "n": 2}}
    told = ask(client, **fields)["choices"][0]["logprobs"]["content"]
    assert all(2 <= len(one["top_logprobs"]) <= 3 for one in told)
    assert all(one["logprob"] in [of["logprob"] for of in one["top_logprobs"]] for one in told)


def test_messages_all_count(client: httpx.Client):
    turns = [
        {"role": "system", "content": "You count apples."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        *BODY["messages"],
    ]
    longer = ask(client, messages=turns)["usage"]["prompt_tokens"]
    assert longer > ask(client)["usage"]["prompt_tokens"] + 10


def test_n_gives_distinct_answers_best_first(client: httpx.Client):
    wide = {"kind": "self_consistency", "n": 16, "early_stop": "never"}
    hard = "Use the numbers 3, 5, 2 with + - * / to make 16. Use each number once."
    asked = {"messages": [{"role": "user", "content": hard}], "max_tokens": 200, "strategy": wide}
    one, four = ask(client, **asked, temperature=1.0), ask(client, **asked, temperature=1.0, n=4)
    assert four["choices"][0]["message"] == one["choices"][0]["message"]
    assert [choice["index"] for choice in four["choices"]] == [0, 1, 2, 3]
    votes, answers = four["mull"]["votes"], four["mull"]["answers"]
    assert len(set(answers)) == 4
    weights = [votes.get(answer, 0.0) for answer in answers]
    assert weights == sorted(weights, reverse=True)
    usage = four["mull"]["usage"]
    hidden = four["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert hidden == usage["discarded_tokens"]
    assert usage["kept_tokens"] > one["mull"]["usage"]["kept_tokens"]
    assert four["usage"]["completion_tokens"] == one["usage"]["completion_tokens"]


def test_more_answers_than_samples_are_refused(client: httpx.Client):
    for fields in ({"n": 4}, {"n": 2, "strategy": "chain_of_thought"}, {"n": 0}, {"n": 10**6}):
        reply = client.post("/v1/chat/completions", json=BODY | fields)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == "n"
