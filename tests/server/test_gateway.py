"""The gateway before the server of all tests answers as that server does by itself."""

from typing import Any

import httpx
import pytest

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
