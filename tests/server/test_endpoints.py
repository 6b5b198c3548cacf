"""One self-consistency request through every endpoint, by the clients that people use."""

from typing import Any

import anthropic
import httpx
import openai
import pytest

QUESTION = (
    "Tom has 12 apples. At the park he finds 7. Ann gets 4 from him. "
    "How many apples does Tom have now?"
)
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
STRATEGY = {"strategy": {"kind": "self_consistency", "n": 5, "early_stop": "never"}}
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def oai(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def chat(oai, claude, stream, extra):
    made = oai.chat.completions.create(
        model="mull-tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=300,
        stream=stream,
        extra_body=extra,
    )
    if not stream:
        return made.choices[0].message.content, made.usage.completion_tokens
    options = {"include_usage": True}
    made.close()
    text, tokens = "", 0
    for chunk in oai.chat.completions.create(
        model="mull-tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=300,
        stream=True,
        stream_options=options,
        extra_body=extra,
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


def completions(oai, claude, stream, extra):
    made = oai.completions.create(
        model="mull-tiny",
        prompt=PROMPT,
        temperature=0,
        max_tokens=300,
        stream=stream,
        extra_body=extra,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    if not stream:
        return made.choices[0].text, made.usage.completion_tokens
    text, tokens = "", 0
    for chunk in made:
        text += chunk.choices[0].text if chunk.choices else ""
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


def responses(oai, claude, stream, extra):
    made = oai.responses.create(
        model="mull-tiny",
        input=MESSAGES,
        temperature=0,
        max_output_tokens=300,
        stream=stream,
        extra_body=extra,
    )
    if not stream:
        return made.output_text, made.usage.output_tokens
    text, tokens = "", 0
    for event in made:
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type == "response.completed":
            tokens = event.response.usage.output_tokens
    return text, tokens


def messages(oai, claude, stream, extra):
    asked: dict[str, Any] = {
        "model": "mull-tiny",
        "messages": MESSAGES,
        "max_tokens": 300,
        "extra_body": {"temperature": 0} | extra,
    }
    if not stream:
        made = claude.messages.create(**asked)
        return made.content[0].text, made.usage.output_tokens
    with claude.messages.stream(**asked) as made:
        text = "".join(made.text_stream)
        return text, made.get_final_message().usage.output_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", [chat, completions, responses, messages])
def test_every_endpoint_gives_the_strategy_and_counts_it(oai, claude, endpoint, stream):
    plain, one = endpoint(oai, claude, stream, {})
    text, five = endpoint(oai, claude, stream, STRATEGY)
    assert "\\boxed{" in text
    assert text == plain  # at temperature 0 every sample, and so the winner, is the greedy one
    assert five == 5 * one  # usage counts all that was generated


def test_suffix_and_field_are_the_same_choice(oai):
    by_suffix = oai.chat.completions.create(
        model="mull-tiny:self_consistency", messages=MESSAGES, seed=1, max_tokens=300
    )
    by_field = oai.chat.completions.create(
        model="mull-tiny",
        messages=MESSAGES,
        seed=1,
        max_tokens=300,
        extra_body={"strategy": "self_consistency"},
    )
    assert by_suffix.model == by_field.model == "mull-tiny"
    assert by_suffix.choices[0].message.content == by_field.choices[0].message.content
    assert by_suffix.mull["strategy"] == "self_consistency"
    assert by_suffix.mull["votes"] == by_field.mull["votes"]


def test_chain_of_thought_streams_as_it_is_written(oai):
    chunks = list(
        oai.chat.completions.create(
            model="mull-tiny:chain_of_thought",
            messages=MESSAGES,
            max_tokens=300,
            temperature=0,
            stream=True,
        )
    )
    pieces = [
        chunk.choices[0].delta.content
        for chunk in chunks
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert len(pieces) > 5
    assert "\\boxed{" in "".join(pieces)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_of_the_winner_are_returned(oai):
    asked: dict[str, Any] = {
        "model": "mull-tiny",
        "messages": MESSAGES,
        "seed": 3,
        "max_tokens": 300,
    }
    made = oai.chat.completions.create(
        **asked,
        logprobs=True,
        top_logprobs=2,
        extra_body={"strategy": {"kind": "best_of_n", "n": 4}},
    )
    tokens = made.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith(made.choices[0].message.content[:20])
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    bare = oai.chat.completions.create(
        **asked, extra_body={"strategy": {"kind": "best_of_n", "n": 4}}
    )
    assert bare.choices[0].logprobs is None
    assert bare.choices[0].message.content == made.choices[0].message.content


def test_structured_output_reaches_every_sample(client: httpx.Client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    reply = client.post(
        "/v1/chat/completions",
        json={
            "model": "mull-tiny",
            "messages": MESSAGES,
            "max_tokens": 60,
            "seed": 5,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": schema},
            },
            "strategy": {
                "kind": "best_of_n",
                "n": 3,
                "verifier": {"kind": "json_schema", "schema": schema},
            },
        },
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].lstrip().startswith("{")
