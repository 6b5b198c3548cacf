"""Keys on a real server: what clients of others send, what is counted, and what is never told."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from server.keys.keyring import changing, digest
from tests.server.test_keys import add, bearer

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Tom has 5 apples. Mia gives him 3. How many?"}],
    "max_tokens": 40,
    "seed": 1,
}
VOTE = {"strategy": {"kind": "self_consistency", "n": 4, "early_stop": "never"}}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("keys") / "keys.json"
    found.write_text('{"keys": []}')
    return found


@pytest.fixture(scope="module")
def served(serve: Any, file: Path) -> Iterator[Any]:
    environment = {
        "MULL_KEYS": str(file),
        "MULL_ADMIN_KEY": "the-operators-own",
        "MULL_TRACES": str(file.parent / "traces"),
    }
    flags = ("--api-key", "the-flags-own", "--uvicorn-log-level", "info")
    with serve(file.parent / "log", *flags, **environment) as server:
        yield server


@pytest.fixture
def there(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def known(file: Path, name: str, **more: Any) -> str:
    """A new key, and the time until the server knows it."""
    key = add(file, name, **more)
    time.sleep(0.6)
    return key


def test_stock_clients_are_let_in_and_others_are_told_what_is_missing(
    served: Any, there: httpx.Client, file: Path
):
    key = known(file, "ann")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
        assert client.models.list().data
        reply = client.chat.completions.create(**BODY, extra_body=VOTE)
        assert reply.usage is not None
    with anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0) as client:
        said = client.messages.create(
            model="mull-tiny", messages=BODY["messages"], max_tokens=20, extra_body=VOTE
        )
        assert said.content
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.chat.completions.create(**BODY, extra_body=VOTE)
    assert refused.value.code == "invalid_api_key"
    assert there.get("/health").status_code == there.get("/ping").status_code == 200
    for path in ("/metrics", "/openapi.json"):
        assert there.get(path).status_code == 401
        assert there.get(path, headers=bearer(key)).status_code == 403
        assert there.get(path, headers=bearer("the-operators-own")).status_code == 200
    assert there.post(CHAT, json=BODY, headers=bearer("the-flags-own")).status_code == 200


@pytest.mark.parametrize("more", [VOTE, {}, {"stream": True}, VOTE | {"stream": True}])
def test_what_was_generated_is_charged(there: httpx.Client, file: Path, more: dict[str, Any]):
    key = bearer(known(file, f"charged-{len(str(more))}", tokens_per_minute=2))
    reply = there.post(CHAT, json=BODY | more, headers=key)
    assert reply.status_code == 200, reply.text
    refused = there.post(CHAT, json=BODY | more, headers=key)
    assert refused.status_code == 429
    if "stream" not in more:
        spent = reply.json()["usage"]["completion_tokens"]
        seconds = (spent - 2 + 1) * 30
        assert seconds - 5 <= int(refused.headers["retry-after"]) <= seconds
    assert int(refused.headers["retry-after"]) > 60


def test_a_search_that_nobody_waits_for_is_charged(there: httpx.Client, file: Path):
    key = bearer(known(file, "leaves", tokens_per_minute=2))
    body = BODY | {"max_tokens": 300, "ignore_eos": True}
    body |= {"strategy": {"kind": "self_consistency", "n": 32, "early_stop": "never"}}
    with pytest.raises(httpx.ReadTimeout):
        there.post(CHAT, json=body, headers=key, timeout=1.5)
    time.sleep(1)
    assert there.post(CHAT, json=body, headers=key).status_code == 429


def test_keys_come_and_go_without_a_restart(there: httpx.Client, file: Path):
    old, new = known(file, "rotates"), known(file, "rotates")
    for key in (old, new):
        assert there.get("/v1/models", headers=bearer(key)).status_code == 200
    with changing(file) as keys:
        keys[:] = [one for one in keys if one.digest != digest(old)]
    time.sleep(0.6)
    assert there.get("/v1/models", headers=bearer(old)).status_code == 401
    assert there.get("/v1/models", headers=bearer(new)).status_code == 200


def test_no_key_is_in_the_log_or_in_a_trace(served: Any, there: httpx.Client, file: Path):
    key = known(file, "logged")
    for headers in (bearer(key), {"x-api-key": key}, bearer(f"{key}-wrong")):
        there.post(CHAT, json=BODY | VOTE, headers=headers)
        there.get("/v1/traces/nobody", headers=headers)
    there.post(CHAT, json=BODY | {"budget": {"tokens": "x"}}, headers=bearer(key))
    time.sleep(2)
    kept = [one.read_text() for one in (file.parent / "traces").iterdir()]
    assert kept
    for said in (
        served.log.read_text(),
        *kept,
        there.get("/metrics", headers=bearer("the-operators-own")).text,
    ):
        for one in (key, "the-operators-own", "the-flags-own"):
            assert one not in said
