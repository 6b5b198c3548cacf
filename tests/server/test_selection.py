"""The pure part of choosing: what vLLM is to see, and what is refused."""

from typing import Any

import pytest

from server.selection import choose
from strategies.core.errors import InvalidRequest

MODELS = {"tiny", "org/model:latest"}
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "2 + 2?"}]}


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
