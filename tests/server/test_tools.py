"""Tool calls vote by name and canonical arguments; reasoning is never read as an answer."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from strategies.core.answers import AnswerFormat, Answers
from strategies.core.sandbox import Sandbox

TOOL = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
ASKED: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Pick."}],
    "tools": [TOOL],
    "max_tokens": 200,
    "temperature": 2.0,
    "seed": 5,
    "strategy": {"kind": "self_consistency", "n": 9, "early_stop": "never"},
}
NAMED = {"type": "function", "function": {"name": "pick"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory, serve):
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serve(tmp_path_factory.mktemp("tools") / "log", *flags) as served:
        yield served


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_calls_vote_by_name_and_arguments(served, choice: Any, stream: bool):
    body = ASKED | {"tool_choice": choice}
    with httpx.Client(base_url=served.url, timeout=120) as client:
        # The grammar allows white space without end, and this model would write it.
        blank = [
            client.post("/tokenize", json={"model": "mull-tiny", "prompt": piece}).json()["tokens"]
            for piece in ("\n", "\t", " ")
        ]
        body["logit_bias"] = {str(token): -100 for tokens in blank for token in tokens}
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        whole = reply.json()
        votes = whole["mull"]["votes"]
        assert sum(votes.values()) > 2  # some may not come to an end
        for answer in votes:
            for call in json.loads(answer):
                assert call["name"] == "pick"
                assert call["arguments"]["n"] in (1, 2)
        calls = [call["function"] for call in whole["choices"][0]["message"]["tool_calls"]]
        arguments = [json.loads(call["arguments"]) for call in calls]
        spelled = [
            {"name": call["name"], "arguments": given}
            for call, given in zip(calls, arguments, strict=True)
        ]
        most = json.loads(max(votes, key=lambda answer: votes[answer]))
        assert sorted(spelled, key=str) == sorted(
            ({"name": call["name"], "arguments": call["arguments"]} for call in most), key=str
        )
        if stream:
            text = client.post("/v1/chat/completions", json=body | {"stream": True}).text
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line[:7] == "data: {"]
            said = [""] * len(arguments)
            for chunk in chunks:
                for choice in chunk["choices"]:
                    for part in choice["delta"].get("tool_calls") or []:
                        said[part["index"]] += part["function"].get("arguments") or ""
            assert [json.loads(one) for one in said] == arguments


def test_calls_have_one_spelling():
    from server.local.chat import canonical

    def call(name: str, arguments: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, arguments=arguments)

    one, other = call("a", '{"x": 1, "y": [2]}'), call("b", "{}")
    assert canonical([one, other]) == canonical([other, call("a", '{"y":[2],"x":1}')])
    assert canonical([one]) != canonical([call("a", '{"x": 2, "y": [2]}')])
    assert canonical([call("a", "not JSON")]) != canonical([one])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think>So \boxed{2}", "2"),
        (r"\boxed{1} is wrong</think> \boxed{2}", "2"),
        (r"\boxed{2}<think>or rather \boxed{1}", "2"),
        (r"<think>perhaps \boxed{1}", None),
        (r"<reasoning>\boxed{1}</reasoning>", None),
    ],
)
async def test_reasoning_is_no_answer(text: str, answer: str | None):
    assert await Answers(Sandbox()).extract(text, AnswerFormat()) == answer
