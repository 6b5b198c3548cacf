"""Without a strategy Mull is vLLM; and vLLM's own server takes our plugin."""

from typing import Any

import httpx
import pytest

from models import MULL_TINY

FLAGS = (
    *("--model", str(MULL_TINY), "--served-model-name", "mull-tiny"),
    *("--enable-prompt-tokens-details", "--max-num-seqs", "128"),
)
MESSAGES = [
    {
        "role": "user",
        "content": "Tom has 12 apples. At the park he finds 7. How many apples does Tom have now?",
    }
]


SAMPLING: dict[str, Any] = {"model": "mull-tiny", "seed": 11, "temperature": 0.9}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        SAMPLING | {"messages": MESSAGES, "max_tokens": 80, "n": 2, "logprobs": True},
    ),
    "completions": (
        "/v1/completions",
        SAMPLING
        | {
            "prompt": "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
            "max_tokens": 20,
        },
    ),
    "responses": (
        "/v1/responses",
        {"model": "mull-tiny", "temperature": 0, "input": MESSAGES, "max_output_tokens": 80},
    ),
    "messages": (
        "/v1/messages",
        {"model": "mull-tiny", "temperature": 0, "messages": MESSAGES, "max_tokens": 80},
    ),
    "tokenize": ("/tokenize", {"model": "mull-tiny", "messages": MESSAGES}),
    "unknown model": ("/v1/chat/completions", {"model": "nobody", "messages": MESSAGES}),
    "bad temperature": (
        "/v1/chat/completions",
        SAMPLING | {"messages": MESSAGES, "temperature": -1},
    ),
}
VOLATILE = {
    "id",
    "created",
    "created_at",
    "item_id",
    "sequence_number",  # of chunks before it, and how many tokens share one depends on timing
    "request_id",
    "completed_at",
    "input_messages",
    "output_messages",
    "system_fingerprint",  # of the configuration: Mull serves the embedded model's adapters, too
}


def stable(value: Any) -> Any:
    """A reply without what differs from request to request."""
    if isinstance(value, dict):
        return {key: stable(inner) for key, inner in value.items() if key not in VOLATILE}
    return [stable(inner) for inner in value] if isinstance(value, list) else value


def events(text: str) -> list[Any]:
    import json

    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [stable(json.loads(one)) if one.startswith("{") else one for one in data]


def joined(chunks: list[Any]) -> str:
    """The text of a stream; how many tokens share a chunk depends on timing."""
    text = ""
    for chunk in chunks:
        if not isinstance(chunk, dict):
            continue
        for choice in chunk.get("choices", []):
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        delta = chunk.get("delta")
        text += (
            delta
            if isinstance(delta, str)
            else (delta or {}).get("text", "")
            if chunk.get("type", "").endswith("delta")
            else ""
        )
    return text


@pytest.mark.slow
def test_no_strategy_is_bare_vllm_and_the_plugin_reasons_there(server, vllm, tmp_path):
    with vllm(tmp_path / "bare.log", *FLAGS) as bare:
        for name, (path, body) in REQUESTS.items():
            theirs, ours = (
                httpx.post(f"{url}{path}", json=body, timeout=120) for url in (bare.url, server.url)
            )
            assert ours.status_code == theirs.status_code, name
            assert stable(ours.json()) == stable(theirs.json()), name
        for name in ("chat", "completions", "responses", "messages"):
            path, body = REQUESTS[name]
            asked = {key: value for key, value in body.items() if key not in ("n", "logprobs")} | {
                "stream": True
            }
            theirs, ours = (
                httpx.post(f"{url}{path}", json=asked, timeout=120)
                for url in (bare.url, server.url)
            )
            assert joined(events(ours.text)) == joined(events(theirs.text)) != "", name
            assert events(ours.text)[-1] == events(theirs.text)[-1], name
    with vllm(tmp_path / "plugin.log", *FLAGS, VLLM_PLUGINS="mull") as plugged:
        asked = {
            "model": "mull-tiny:self_consistency",
            "messages": MESSAGES,
            "seed": 4,
            "max_tokens": 200,
        }
        theirs, ours = (
            httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
            for url in (plugged.url, server.url)
        )
        assert ours.status_code == theirs.status_code == 200, theirs.text
        assert theirs.json()["choices"] == ours.json()["choices"]
        assert theirs.json()["mull"]["votes"] == ours.json()["mull"]["votes"]
        assert httpx.get(f"{plugged.url}/v1/strategies").status_code == 200
