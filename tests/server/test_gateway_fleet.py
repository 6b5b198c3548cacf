"""Upstreams that die, hang, refuse and talk nonsense; and who is asked then."""

import argparse
import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.gateway import command
from server.gateway.app import Gateway
from server.gateway.engine import RemoteEngine
from server.gateway.fleet import SESSION, Breaker, Fleet, Lost, Terms
from server.settings import Settings
from strategies.core.aio import Background
from strategies.core.testing import FakeEngine
from tests.server.fake_upstream import MODEL, FakeUpstream, Stream, never

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "How many?"}],
    "max_tokens": 20,
    "seed": 1,
    "strategy": {"kind": "self_consistency", "n": 4, "early_stop": "never"},
}
TEXTS = [r"it is \boxed{4}", r"so \boxed{4}", r"\boxed{5} it is", r"then \boxed{4}"]


@asynccontextmanager
async def before(
    upstreams: Sequence[FakeUpstream],
    settings: Settings | None = None,
    tracing: Any = None,
    **terms: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Fleet]]:
    """A gateway before these, and a client of it."""
    known = {f"http://up{at}": one for at, one in enumerate(upstreams)}
    terms = {"silent_seconds": 1.0, "rest_seconds": 0.2, **terms}
    fleet = Fleet(list(known), Terms(**terms), transport=lambda url: known[url])
    gateway = Gateway(fleet, settings or Settings(), tracing)
    async with (
        gateway.app.router.lifespan_context(gateway.app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(gateway.app, raise_app_exceptions=False),
            base_url="http://gateway",
            timeout=20,
        ) as client,
    ):
        await gateway.look({})
        yield client, fleet


def upstream(**more: Any) -> FakeUpstream:
    return FakeUpstream(FakeEngine(TEXTS), **more)


async def refused(request: httpx.Request) -> httpx.Response | None:
    raise httpx.ConnectError("refused")


def only(path: str, then: Any) -> Any:
    async def before(request: httpx.Request) -> httpx.Response | None:
        return await then(request) if request.url.path == path else None

    return before


async def test_a_vote_over_http():
    one = upstream()
    async with before([one]) as (client, _):
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 200, reply.text
        said = reply.json()
        assert said["object"] == "chat.completion"
        assert said["choices"][0]["message"]["content"] == TEXTS[0]
        assert said["mull"]["votes"] == {"4": 3.0, "5": 1.0}
        assert said["usage"]["completion_tokens"] == one.engine.tokens == 10
        assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + 10
        trace = await client.get(f"/v1/traces/{said['mull']['run']}")
        assert trace.json()["mull"] == said["mull"]
        assert 'mull_runs_total{stopped="samples"' in (await client.get("/metrics")).text.replace(
            'strategy="self_consistency",', ""
        )


async def test_a_stream_has_chunks_of_openai_and_ends_with_done():
    async with before([upstream()]) as (client, _):
        asked = BODY | {"stream": True, "stream_options": {"include_usage": True}, "trace": True}
        reply = await client.post(CHAT, json=asked)
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in reply.text
        assert '"completion_tokens":10' in lines[-2]
        assert '"event": "voted"' in reply.text


async def test_siblings_stay_together_and_name_what_they_belong_to():
    ups = [upstream(), upstream(), upstream()]
    async with before(ups) as (client, _):
        homes = []
        for at in range(12):
            asked = BODY | {"messages": [{"role": "user", "content": f"How many? {at}"}]}
            counts = [one.engine.calls for one in ups]
            assert (await client.post(CHAT, json=asked)).status_code == 200
            grown = [one.engine.calls - count for one, count in zip(ups, counts, strict=True)]
            assert sorted(grown) == [0, 0, 4]
            homes.append(grown.index(4))
        assert len(set(homes)) == 3  # and strangers spread
        asked = [one for up in ups for one in up.requests if one.url.path == "/v1/completions"]
        keys = [one.headers.get(SESSION) for one in asked if b'"stream":true' in one.content]
        assert len(set(keys)) == 12
        client.headers[SESSION] = "mine"
        await client.post(CHAT, json=BODY)
        asked = [one for up in ups for one in up.requests if one.headers.get(SESSION) == "mine"]
        assert {one.url.host for one in asked if b'"stream":true' in one.content}.__len__() == 1


async def test_what_has_no_token_yet_goes_to_another_upstream():
    ups = [upstream(), upstream()]
    async with before(ups) as (client, fleet):
        for one in ups:
            one.before = only("/v1/completions", refused)
            others = [other for other in ups if other is not one]
            for other in others:
                other.before = None
            for at in range(4):
                asked = BODY | {"messages": [{"role": "user", "content": f"{at}?"}]}
                reply = await client.post(CHAT, json=asked)
                assert reply.status_code == 200, reply.text
                assert reply.json()["mull"]["votes"] == {"4": 3.0, "5": 1.0}
            for upstream_ in fleet.upstreams:
                upstream_.breaker.answered()


async def test_what_breaks_off_after_a_token_fails_clearly():
    async def broken(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        yield await anext(source)
        await source.aclose()
        raise httpx.ReadError("reset")

    async with before([upstream(spoil=broken), upstream(spoil=broken)]) as (client, _):
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "service_unavailable"
        assert "Retry-After" in reply.headers


@pytest.mark.parametrize(
    "said",
    [
        b"data: {\n\n",
        b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"index": 0, "text": 1, "token_ids": [1]}]}\n\n',
        b'data: {"choices": [{"text": "x", "token_ids": ["1"], "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"text": "x", "token_ids": [1], "finish_reason": "odd"}]}\n\n',
        b'data: {"choices": 7}\n\n',
        b'data: {"error": {"message": "boom", "code": 500}}\n\n',
        b"data: [DONE]\n\n",
        b"",
        b"\xff\xfe\n\n",
    ],
)
async def test_nonsense_is_an_error_and_no_answer(said: bytes):
    async def nonsense(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        yield said

    async with before([upstream(spoil=nonsense)], retries=1) as (client, _):
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 503, reply.text


async def test_more_tokens_than_asked_for_are_an_error():
    async def endless(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        while True:
            await asyncio.sleep(0)
            yield b'data: {"choices": [{"index": 0, "text": "x", "token_ids": [1, 1]}]}\n\n'

    async with before([upstream(spoil=endless)]) as (client, _):
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 503


async def test_an_upstream_that_hangs_is_left_after_a_while():
    async def hanging(request: httpx.Request) -> httpx.Response | None:
        try:
            async with asyncio.timeout(0.2):
                await never()
        except TimeoutError:
            raise httpx.ReadTimeout("silent") from None
        return None

    async with before([upstream(before=only("/v1/completions", hanging))], retries=1) as (
        client,
        _,
    ):
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 503


async def test_a_refusal_keeps_its_words_and_is_not_asked_again():
    async def no(request: httpx.Request) -> httpx.Response | None:
        if b'"stream":true' not in request.content:
            return None
        error = {"message": "top_k is odd", "param": "top_k", "code": 400}
        return httpx.Response(400, json={"error": error})

    one = upstream(before=only("/v1/completions", no))
    async with before([one]) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"top_k": -7})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "top_k is odd"
        assert reply.json()["error"]["param"] == "top_k"
        streamed = await client.post(CHAT, json=BODY | {"top_k": -7, "stream": True})
        assert streamed.status_code == 400
        assert one.engine.calls == 0


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"echo": True},
        {"documents": [{}]},
        {"kv_transfer_params": {"x": 1}},
        {"best_of": 3},
        {"n": 0},
        {"max_tokens": "many"},
        {"stream": "yes"},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
    ids=lambda one: next(iter(one)),
)
async def test_what_cannot_be_obeyed_is_refused_by_name(field: dict[str, Any]):
    one = upstream()
    async with before([one]) as (client, _):
        reply = await client.post(CHAT, json=BODY | field)
        assert reply.status_code == 400, reply.text
        assert next(iter(field)) in reply.json()["error"]["param"]
        assert one.engine.calls == 0


async def test_a_gateway_without_a_well_upstream_says_so():
    one = upstream(before=refused)
    async with before([one], rest_seconds=60.0) as (client, _):
        assert (await client.get("/health")).status_code == 503
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 503
        assert (await client.get("/version")).status_code == 503


async def test_an_upstream_comes_back_by_itself():
    one = upstream(before=refused)
    async with before([one]) as (client, _):
        assert (await client.get("/health")).status_code == 503
        one.before = None
        async with asyncio.timeout(10):
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.1)
        assert (await client.post(CHAT, json=BODY)).status_code == 200


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_try():
    now = 0.0
    breaker = Breaker(failures=2, rest_seconds=5, clock=lambda: now)

    def fail() -> None:
        with pytest.raises(Lost), breaker.attempt():
            raise Lost("gone")

    fail()
    breaker.answered()
    fail()
    assert not breaker.open
    fail()
    assert breaker.open
    now = 5.0
    assert not breaker.open
    with breaker.attempt():
        assert breaker.open  # to all others
    assert not breaker.open
    fail()
    assert breaker.open
    now = 10.0
    with breaker.attempt():
        breaker.answered()
    assert not breaker.open


async def test_without_a_route_for_it_an_abort_closes_the_stream_and_keeps_what_came():
    engine = FakeEngine(["a b c d e f g h"], delay=lambda index: 0.02)
    one = FakeUpstream(engine, aborts=False)
    async with before([one]) as (client, _):
        asked = BODY | {"budget": {"seconds": 0.09}, "strategy": {"kind": "chain_of_thought"}}
        reply = await client.post(CHAT, json=asked)
        assert reply.status_code == 200, reply.text
        said = reply.json()
        assert said["mull"]["stopped"] == "deadline"
        assert 1 <= said["usage"]["completion_tokens"] <= engine.tokens
        assert engine.aborted == [0]
        assert engine.running == 0


async def test_an_abort_that_came_too_early_is_said_again():
    missed: list[httpx.Request] = []

    async def miss(request: httpx.Request) -> httpx.Response | None:
        missed.append(request)
        return httpx.Response(200, json={}) if len(missed) < 4 else None

    engine = FakeEngine(["a " * 1000], delay=lambda index: 0.01)
    one = FakeUpstream(engine, before=only("/inference/v1/abort_requests", miss))
    async with before([one]) as (client, _):
        more = {"budget": {"seconds": 0.1}, "max_tokens": 1000}
        reply = await client.post(CHAT, json=BODY | more)
        assert reply.json()["mull"]["stopped"] == "deadline"
        assert reply.json()["usage"]["completion_tokens"] == engine.tokens > 0
        assert len(missed) > 4
        assert engine.tokens < 4 * 100  # of a thousand each


async def test_whatever_names_no_strategy_passes_byte_for_byte():
    heard: list[httpx.Request] = []

    async def whole(content: bytes) -> AsyncGenerator[bytes, None]:
        for at in range(0, len(content), 7):
            yield content[at : at + 7]

    async def echo(request: httpx.Request) -> httpx.Response | None:
        if request.url.path in ("/v1/models", "/tokenize", "/inference/v1/abort_requests"):
            return None
        if request.url.path == "/v1/calibrations":
            return None
        heard.append(request)
        return httpx.Response(
            418,
            headers=[("X-Odd", "a"), ("x-odd", "b"), ("Content-Type", "x/y")],
            stream=Stream(whole(b"\x00\xff" + request.content)),
        )

    async with before([upstream(before=echo)]) as (client, _):
        for method, path, body in (
            ("POST", CHAT, b'{"model" :"fake",   "messages":[]}'),
            ("POST", "/v1/embeddings", b"{}"),
            ("PUT", "/odd/%2Fpath?x=1&x=%20", b"\x00raw"),
            ("GET", "/version", b""),
            ("DELETE", "/v1/responses/r1", b""),
        ):
            reply = await client.request(method, path, content=body, headers={"X-Mine": "1"})
            assert reply.status_code == 418
            assert reply.content == b"\x00\xff" + body
            assert reply.headers.get_list("x-odd") == ["a", "b"]
            last = heard[-1]
            assert (last.method, last.url.raw_path) == (method, path.encode())
            assert last.content == body
            assert last.headers["x-mine"] == "1"


async def test_a_large_body_is_passed_on_as_it_comes():
    sizes: list[int] = []

    async def count(request: httpx.Request) -> httpx.Response | None:
        sizes.append(len(await request.aread()))
        return httpx.Response(201)

    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(100):
            yield b"x" * 1000

    one = upstream(before=only("/v1/audio/transcriptions", count))
    async with before([one], Settings(max_body_bytes=4096)) as (client, _):
        reply = await client.post("/v1/audio/transcriptions", content=pieces())
        assert reply.status_code == 201
        assert sizes == [100_000]


async def test_one_request_that_fails_does_not_keep_others_from_an_upstream():
    async def fails(request: httpx.Request) -> httpx.Response | None:
        if b"poison" in request.content:
            return httpx.Response(500, json={"error": {"message": "boom", "code": 500}})
        return None

    one = upstream(before=only("/tokenize", fails))
    async with before([one], failures=1) as (client, _):
        poison = BODY | {"messages": [{"role": "user", "content": "poison"}]}
        for _ in range(3):
            assert (await client.post(CHAT, json=poison)).status_code == 503
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_a_header_that_cannot_be_passed_on_is_the_clients_fault():
    async def strict(request: httpx.Request) -> httpx.Response | None:
        if request.headers.get("authorization", "").endswith(("!", " ")):
            raise httpx.LocalProtocolError("Illegal header value b'Bearer secret!'")
        return None

    one = upstream(before=strict)
    async with before([one], failures=1) as (client, _):
        for path, body in ((CHAT, BODY), ("/v1/embeddings", {"input": "x"})):
            said = await client.post(path, json=body, headers={"Authorization": "Bearer secret!"})
            assert said.status_code == 400
            assert "secret" not in said.text
            # As lm-eval says it without a key.
            said = await client.post(path, json=body, headers={"Authorization": "Bearer "})
            assert said.status_code in (200, 404)


async def test_the_gateways_own_key_replaces_the_clients():
    one = upstream()
    async with before([one], key=SecretStr("upstream-key")) as (client, _):
        await client.post(CHAT, json=BODY, headers={"Authorization": "Bearer mine"})
        await client.get("/version", headers={"Authorization": "Bearer mine"})
        assert {request.headers["authorization"] for request in one.requests} == {
            "Bearer upstream-key"
        }


async def test_an_upstream_without_tokens_is_searched_in_words():
    one = upstream(tokens=False, aborts=False)
    async with before([one]) as (client, _):
        for strategy in (
            BODY["strategy"],
            {"kind": "best_of_n", "n": 4, "verifier": {"kind": "regex", "pattern": "5"}},
            {"kind": "chain_of_thought"},
        ):
            for streamed in (False, True):
                one.engine.tokens = 0
                asked = BODY | {"strategy": strategy, "stream": streamed, "top_p": 0.5}
                reply = await client.post(CHAT, json=asked)
                assert reply.status_code == 200, reply.text
                if not streamed:
                    usage = reply.json()["usage"]
                    assert usage["completion_tokens"] == one.engine.tokens > 0
                    assert usage["prompt_tokens"] == 5
        body = one.bodies(CHAT)[0]
        assert body["messages"] == BODY["messages"]
        assert body["top_p"] == 0.5
        assert body["seed"] == 1
        verify = {name: BODY[name] for name in ("model", "messages")} | {"candidates": ["5", "6"]}
        asked = verify | {"verifier": {"kind": "regex", "pattern": "5"}}
        scores = (await client.post("/v1/verify", json=asked)).json()["data"]
        assert [one["score"] for one in scores] == [1.0, 0.0]


@pytest.mark.parametrize(
    "strategy",
    [
        {"kind": "beam_search", "level": "token"},
        {"kind": "tree_of_thoughts", "evaluate": "value"},
        {"kind": "self_refine", "n": 3},
        {"kind": "budget_forcing", "end": "so"},
        {"kind": "deep_confidence", "n": 6, "warmup": 3},
        {"kind": "best_of_n", "n": 4, "verifier": "likelihood"},
        {"kind": "best_of_n", "n": 4, "verifier": {"kind": "judge", "mode": "compare"}},
    ],
    ids=lambda one: one["kind"],
)
async def test_what_needs_tokens_is_refused_by_name_where_there_are_none(strategy: dict[str, Any]):
    one = upstream(tokens=False, aborts=False)
    async with before([one]) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"strategy": strategy})
        assert reply.status_code == 400, reply.text
        assert "no vLLM server" in reply.json()["error"]["message"]


def test_a_gateway_needs_no_engine():
    code = (
        "import sys, server.cli, server.gateway.app, server.gateway.command\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_the_command_takes_upstreams_and_all_other_settings(monkeypatch: pytest.MonkeyPatch):
    found: list[Settings] = []

    async def serve(gateway: Gateway, options: object, settings: Settings) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(command, "_serve", serve)
    monkeypatch.setenv("MULL_KEPT_TRACES", "7")
    options = argparse.Namespace(upstream=["http://up"], host="127.0.0.1", port=1)
    assert command.run(options) == 0
    assert (found[0].upstreams, found[0].kept_traces) == (("http://up",), 7)


async def test_one_request_too_many_is_told_before_a_prompt_is_read():
    read, go_on = asyncio.Event(), asyncio.Event()

    async def hold(request: httpx.Request) -> None:
        read.set()
        await go_on.wait()

    own = BODY | {"n": 2, "early_stop": "never"}
    del own["strategy"]
    said = {"model": MODEL, "messages": BODY["messages"], "candidates": ["4"]}
    said["verifier"] = {"kind": "regex", "pattern": "4"}
    asked = [(CHAT, BODY), (CHAT, BODY | {"stream": True}), ("/v1/verify", said)]
    asked += [("/v1/strategies/self_consistency", own | {"stream": way}) for way in (False, True)]
    one = upstream(before=only("/tokenize", hold))
    go_on.set()  # the gateway looks at it first
    async with before([one], Settings(max_running_requests=1)) as (client, _):
        for path, body in asked:
            read.clear()
            go_on.clear()
            new = [{"role": "user", "content": f"How many, at {path}, {body.get('stream')}?"}]
            async with Background(client.post(CHAT, json=BODY | {"messages": new})) as first:
                await read.wait()
                reply = await asyncio.wait_for(client.post(path, json=body), 10)
                assert reply.status_code == 429, (path, reply.text)
                assert reply.headers["Retry-After"] == "1"
                go_on.set()
                assert (await first).status_code == 200
            assert (await client.post(path, json=body)).status_code == 200, path


async def test_a_trace_that_is_kept_keeps_no_engine():
    async with before([upstream()]) as (client, _):
        run = (await client.post(CHAT, json=BODY)).json()["mull"]["run"]
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is RemoteEngine]
        assert (await client.get(f"/v1/traces/{run}")).json()["mull"]["votes"] == {"4": 3, "5": 1}
