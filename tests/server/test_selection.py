"""The pure part of choosing: what vLLM is to see, and what is refused."""

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.selection import choose as choose_from
from server.selection import from_xargs, owner, uncalibrated
from server.settings import Settings
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from tests.strategies.test_calibration import calibration

MODELS = {"tiny", "org/model:latest"}
CHAT = "/v1/chat/completions"
SETTINGS = Settings.model_validate(
    {
        "limits": {"tokens": 1000},
        "efforts": {"tiny": {"low": {"samples": 4}, "high": {"samples": 64, "seconds": 9}}},
        "presets": {
            "deep": {"strategy": {"kind": "best_of_n", "n": 3}, "budget": {"tokens": 500}},
            "short": {"strategy": {"kind": "best_of_n", "n": 3}, "budget": {"tokens": 50}},
        },
    }
)
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "2 + 2?"}]}


def choose(body: dict[str, Any], models: set[str], headers: dict[str, str] | None = None):
    return choose_from(body, models, Headers(headers), CHAT, SETTINGS)


def test_without_a_strategy_the_body_is_the_same_object():
    assert choose(ASKED, MODELS) == (ASKED, None)
    assert choose(ASKED, MODELS)[0] is ASKED


def test_the_choice_is_taken_out_of_the_body():
    body, selection = choose(
        ASKED | {"strategy": {"kind": "best_of_n", "n": 3}, "budget": {"tokens": 9}}, MODELS
    )
    assert body == ASKED
    assert selection is not None
    assert selection.strategy.kind == "best_of_n"
    assert selection.limits.tokens == 9
    assert selection.question == "2 + 2?"
    assert selection.verifier is not None


def test_a_served_name_with_a_colon_is_no_suffix():
    assert choose(ASKED | {"model": "org/model:latest"}, MODELS)[1] is None
    body, selection = choose(ASKED | {"model": "org/model:latest:self_consistency"}, MODELS)
    assert body["model"] == "org/model:latest"
    assert selection is not None


def test_an_unknown_model_is_left_to_vllm():
    assert choose(ASKED | {"model": "nobody:best_of_n"}, MODELS)[1] is None


def test_trigger_and_examples_go_where_they_belong():
    strategy = {
        "kind": "chain_of_thought",
        "trigger": "Think.",
        "examples": [{"question": "1 + 1?", "answer": "2"}],
    }
    system = {"role": "system", "content": "Be kind."}
    body, _ = choose(
        ASKED | {"messages": [system, *ASKED["messages"]], "strategy": strategy}, MODELS
    )
    assert [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][-1]["content"] == "2 + 2?\nThink."
    body, _ = choose({"model": "tiny", "prompt": "2 + 2?", "strategy": strategy}, MODELS)
    assert body["prompt"] == "1 + 1?\n2\n\n2 + 2?\nThink."
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
    body, _ = choose(ASKED | {"messages": parts, "strategy": strategy}, MODELS)
    assert body["messages"][-1]["content"][-1] == {"type": "text", "text": "Think."}
    with pytest.raises(InvalidRequest, match="prompt in words"):
        choose({"model": "tiny", "prompt": [1, 2], "strategy": strategy}, MODELS)


def test_token_prompts_are_one_prompt():
    assert choose({"model": "tiny", "prompt": [1, 2, 3], "strategy": "best_of_n"}, MODELS)[1]
    with pytest.raises(InvalidRequest, match="one prompt"):
        choose({"model": "tiny", "prompt": [[1], [2]], "strategy": "best_of_n"}, MODELS)


THREE = {"kind": "best_of_n", "n": 3}
WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "object": ({"strategy": THREE}, {}),
    "preset in the body": ({"strategy": "deep"}, {}),
    "preset as suffix": ({"model": "tiny:deep"}, {}),
    "preset in the header": ({}, {"x-mull-strategy": "deep"}),
    "header": ({}, {"x-mull-strategy": json.dumps(THREE)}),
    "xargs": ({"vllm_xargs": {"strategy": json.dumps(THREE)}}, {}),
    "preset in xargs": ({"vllm_xargs": {"strategy": "deep"}}, {}),
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "body": ({"strategy": "best_of_n"}, {}),
    "object": ({"strategy": {"kind": "best_of_n"}}, {}),
    "suffix": ({"model": "tiny:best_of_n"}, {}),
    "header": ({}, {"x-mull-strategy": "best_of_n"}),
    "xargs": ({"vllm_xargs": {"strategy": "best_of_n"}}, {}),
}


@pytest.mark.parametrize("other", [*WAYS, *(f"kind: {name}" for name in KINDS)])
@pytest.mark.parametrize("way", WAYS)
def test_every_two_ways_to_say_the_same_agree(way: str, other: str):
    (body, headers), (more, longer) = (
        WAYS[way],
        (WAYS | {f"kind: {k}": v for k, v in KINDS.items()})[other],
    )
    if body.keys() & more.keys() or headers.keys() & longer.keys():
        pytest.skip("one place can say one thing")
    seen, selection = choose(ASKED | body | more, MODELS, headers | longer)
    assert seen == ASKED
    assert selection is not None
    assert selection.strategy.model_dump()["n"] == 3
    assert selection.limits.tokens == (500 if "preset" in way + other else 1000)


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"strategy": "best_of_n"}, {"x-mull-strategy": "self_consistency"}, "X-Mull-Strategy"),
        ({"strategy": {"kind": "best_of_n", "n": 4}, "model": "tiny:deep"}, {}, "model"),
        (
            {"strategy": "deep", "vllm_xargs": {"strategy": "self_consistency"}},
            {},
            "vllm_xargs.strategy",
        ),
        ({"strategy": "deep", "model": "tiny:short"}, {}, "model"),
        (
            {
                "strategy": "deep",
                "budget": {"tokens": 3},
                "vllm_xargs": {"budget": '{"tokens": 4}'},
            },
            {},
            "vllm_xargs.budget",
        ),
        (
            {"vllm_xargs": {"strategy": "deep", "budget": '{"tokens": 0}'}},
            {},
            "vllm_xargs.budget.tokens",
        ),
        ({"vllm_xargs": {"strategy": '{"kind'}}, {}, "vllm_xargs.strategy"),
        ({"vllm_xargs": {"strategy": 7}}, {}, "vllm_xargs.strategy"),
        ({}, {"x-mull-strategy": '{"kind'}, "X-Mull-Strategy"),
        ({}, {"x-mull-strategy": ""}, "X-Mull-Strategy"),
        ({}, {"x-mull-strategy": "d" * 20_000}, "X-Mull-Strategy"),
        ({"model": "tiny:dep"}, {}, "model"),
        ({"trace": True}, {}, "trace"),
        ({"strategy": "deep", "trace": 1}, {}, "trace"),
        ({"strategy": "chain_of_thought", "n": 3}, {}, "n"),
    ],
)
def test_contradictions_and_nonsense_are_refused_by_name(
    body: dict[str, Any], headers: dict[str, str], field: str
):
    with pytest.raises(InvalidRequest) as refused:
        choose(ASKED | body, MODELS, headers)
    assert refused.value.field == field


def test_a_header_sent_twice_must_agree_with_itself():
    twice = [(b"x-mull-strategy", b"best_of_n"), (b"x-mull-strategy", b"self_consistency")]
    with pytest.raises(InvalidRequest, match="self_consistency"):
        choose_from(ASKED, MODELS, Headers(raw=twice), CHAT, SETTINGS)


def test_a_header_is_read_as_utf8():
    wire = {"kind": "chain_of_thought", "trigger": "Schritt für Schritt"}
    raw = [(b"x-mull-strategy", json.dumps(wire, ensure_ascii=False).encode())]
    _, selection = choose_from(ASKED | {"strategy": wire}, MODELS, Headers(raw=raw), CHAT, SETTINGS)
    assert selection is not None
    assert selection.strategy.trigger_shown() == "Schritt für Schritt"


@pytest.mark.parametrize(
    "field", ["use_beam_search", "echo", "background", "best_of", "prompt_logprobs"]
)
def test_what_a_strategy_cannot_obey_is_refused(field: str):
    value = {"best_of": 2, "prompt_logprobs": 1}.get(field, True)
    with pytest.raises(InvalidRequest) as refused:
        choose(ASKED | {"strategy": "deep", field: value}, MODELS)
    assert refused.value.field == field
    assert choose(ASKED | {"strategy": "deep", field: None}, MODELS)[1]


def test_the_request_wins_over_the_preset_and_the_server_over_both():
    def tokens(**budget: int) -> int | None:
        selection = choose(ASKED | {"model": "tiny:deep", "budget": budget}, MODELS)[1]
        return None if selection is None else selection.limits.tokens

    assert tokens(samples=2) == 500
    assert tokens(tokens=7) == 7
    assert tokens(tokens=9999) == 1000


def test_endpoints_without_several_answers_or_with_several_prompts_say_so():
    for path, body, field in (
        ("/v1/responses", {"n": 2}, "n"),
        ("/v1/messages", {"trace": True, "stream": True}, "trace"),
        ("/v1/chat/completions/batch", {}, "strategy"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            choose_from(ASKED | {"model": "tiny:deep"} | body, MODELS, Headers(), path, SETTINGS)
        assert refused.value.field == field


def test_xargs_alone_choose_where_no_middleware_does():
    selection = from_xargs({"strategy": "deep", "budget": '{"samples": 2}'}, SETTINGS)
    assert selection is not None
    assert (selection.limits.tokens, selection.limits.samples) == (500, 2)
    assert from_xargs({"temperature": 3}, SETTINGS) is None


def test_a_run_of_an_unknown_asker_is_nobodys():
    selection = from_xargs({"strategy": "deep"}, SETTINGS)
    assert selection is not None
    assert selection.owner not in ("", owner(Headers({"authorization": "Bearer a"})))
    assert owner(Headers({"authorization": "Bearer a"})) != owner(Headers({"x-api-key": "b"}))
    same = [{"authorization": "Bearer a"}, {"x-api-key": "a"}, {"x-mull-admin-key": "a"}]
    assert len({owner(Headers(one)) for one in same}) == 1
    assert owner(Headers({"authorization": "Basic a"})) != ""
    spoofed = {"authorization": "Bearer victim", "x-mull-admin-key": "mine"}
    assert owner(Headers(spoofed)) == owner(Headers({"authorization": "Bearer mine"}))


def test_judges_read_the_question_or_all_of_a_longer_conversation():
    def question(*turns: tuple[str, str], **more: str) -> str:
        messages = [{"role": role, "content": said} for role, said in turns]
        body = {"model": "tiny", "messages": messages, "strategy": "best_of_n", **more}
        selection = choose(body, MODELS)[1]
        assert selection is not None
        return selection.question

    asked = ("user", "2 + 2?")
    assert question(("system", "Be brief."), asked) == "2 + 2?"
    assert question(asked, ("assistant", "The")) == "2 + 2?"
    longer = question(asked, ("assistant", "4"), ("user", "And twice that?"))
    assert longer == "user: 2 + 2?\n\nassistant: 4\n\nuser: And twice that?"
    assert question(("system", "Be brief.")) == ""


def test_an_effort_is_a_budget_where_the_operator_gave_some():
    body, selection = choose(ASKED | {"reasoning_effort": "low"}, {"tiny"})
    assert selection is not None
    assert selection.strategy.kind == "compute_optimal"
    assert selection.limits == Limits(samples=4, tokens=1000)
    assert "reasoning_effort" not in body
    asked = {"model": "tiny", "input": "1 + 1?", "reasoning": {"effort": "high"}}
    selection = choose(asked | {"budget": {"seconds": 2}}, {"tiny"})[1]
    assert selection is not None
    assert selection.limits == Limits(samples=64, seconds=2, tokens=1000)


def test_an_effort_without_budgets_or_beside_a_strategy_is_the_templates():
    other = ASKED | {"model": "other", "reasoning_effort": "low"}
    assert choose(other, {"tiny", "other"}) == (other, None)
    named = ASKED | {"reasoning_effort": "any", "strategy": "best_of_n"}
    body, selection = choose(named, {"tiny"})
    assert body["reasoning_effort"] == "any"
    assert selection is not None
    assert selection.strategy.kind == "best_of_n"


def test_an_unknown_effort_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="low, high") as wrong:
        choose(ASKED | {"reasoning_effort": "extreme"}, {"tiny"})
    assert wrong.value.field == "reasoning_effort"


def test_a_moved_alias_takes_the_calibration_away_and_what_needs_one_is_refused():
    _, selection = choose(ASKED | {"strategy": "compute_optimal"}, {"tiny"})
    assert selection is not None
    selection.calibration = calibration()
    uncalibrated(selection)
    assert selection.calibration is None
    sure = {"kind": "compute_optimal", "min_confidence": 0.5}
    _, selection = choose(ASKED | {"strategy": sure}, {"tiny"})
    assert selection is not None
    selection.calibration = calibration()
    with pytest.raises(InvalidRequest) as wrong:
        uncalibrated(selection)
    assert wrong.value.field == "strategy.min_confidence"
