"""The door of both servers: no route without a key, and no key behind it."""

import json
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from server.endpoints import Endpoint, Endpoints
from server.gateway.app import Gateway
from server.gateway.fleet import Fleet, Terms
from server.keys.guard import Guard
from server.keys.keyring import Keyring
from server.local import launcher
from server.settings import Settings
from server.verifiers.catalogue import VERIFIERS
from strategies.core.errors import VerifierFailed
from strategies.core.testing import FakeEngine
from tests.server.fake_upstream import FakeUpstream, Stream
from tests.server.test_gateway_fleet import BODY, CHAT, TEXTS, before
from tests.server.test_keys import add, bearer

OPEN = {"/health", "/ping", "/live", "/ready"}
PLAIN = {name: BODY[name] for name in ("model", "messages", "max_tokens")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "keys.json"
    found.write_text('{"keys": []}')
    return found


@pytest.fixture
def serve_app(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FastAPI]:
    """The app of `mull serve`, without an engine behind it."""

    def build(*flags: str, again: bool = False, keys: str = str(file)) -> FastAPI:
        monkeypatch.setenv("VLLM_PLUGINS", "mull")
        monkeypatch.setenv("MULL_KEYS", keys)
        monkeypatch.setenv("MULL_ADAPTERS", str(tmp_path / "registry"))
        args = launcher.parse(["--enable-scale-out", *flags], Settings.read())
        for _ in range(1 + again):  # a new engine brings a new app
            app = launcher.build_app(args, ("generate",), None)
        return app

    return build


@pytest.fixture
def gateway_app(file: Path) -> FastAPI:
    fleet = Fleet(["http://up"], Terms(), transport=lambda url: FakeUpstream(FakeEngine(TEXTS)))
    return Gateway(fleet, Settings(keys=file)).app


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Every method and path that an app knows, and some that it does not."""
    for route in app.routes:
        path = re.sub(r"\{[^}]*\}", "x", getattr(route, "path", ""))
        for method in getattr(route, "methods", None) or ("GET", "POST", "DELETE"):
            yield method, path or "/"
    yield from [("GET", "/"), ("GET", "/nowhere"), ("OPTIONS", CHAT), ("PATCH", "/v1/x")]


async def statuses(app: FastAPI, headers: dict[str, str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        for method, path in routes(app):
            reply = await client.request(method, path, headers=headers)
            found.setdefault(path, set()).add(reply.status_code)
            if reply.status_code == 401:
                assert reply.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert reply.json()["error"]["code"] == "invalid_api_key"
    return found


@pytest.mark.parametrize("headers", [{}, bearer("mull-guess"), {"x-api-key": "none"}])
async def test_no_route_of_either_server_answers_without_a_key(
    serve_app: Callable[..., FastAPI], gateway_app: FastAPI, headers: dict[str, str]
):
    for app in (serve_app(), gateway_app):
        found = await statuses(app, headers)
        assert len(found) > 10
        closed = {path for path, said in found.items() if said == {401}}
        assert found.keys() - closed <= OPEN


async def test_what_is_the_operators_alone(
    serve_app: Callable[..., FastAPI], gateway_app: FastAPI, file: Path
):
    """A route that appears here was never thought of: it is closed to clients until it is."""
    key = bearer(add(file, "ann"))
    found = await statuses(serve_app(), key)
    assert {path for path, said in found.items() if said == {403}} == {
        *("/", "/nowhere", "/metrics", "/kv_event_sources"),
        *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
        *("/inference/v1/generate", "/inference/v1/abort_requests"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        *("/v1/adapters", "/v1/adapters/x", "/v1/adapters/x/rollback"),
    }
    assert not any(401 in said for said in found.values())
    found = await statuses(gateway_app, key)
    assert {path for path, said in found.items() if said == {403}} == {
        *("/", "/nowhere", "/metrics", "/x"),
        *("/docs", "/docs/oauth2-redirect", "/redoc"),
    } & found.keys()


async def test_vllms_own_flag_is_a_clients_key_on_every_route(
    serve_app: Callable[..., FastAPI], file: Path
):
    key = add(file, "ann")
    app = serve_app("--api-key", "plain", "other", again=True)
    assert "plain" not in str(vars(app.state.args))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        for path in ("/version", "/v1/strategies"):
            assert (await client.get(path)).status_code == 401
            for one in ("plain", "other", key):
                assert (await client.get(path, headers=bearer(one))).status_code == 200
        assert (await client.get("/metrics", headers=bearer("plain"))).status_code == 403


async def test_adapters_are_an_admins_also_where_nothing_else_needs_a_key(
    serve_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
):
    for own, refused in ((None, 403), ("the-operators", 401)):
        if own is not None:
            monkeypatch.setenv("MULL_ADMIN_KEY", own)
        app = serve_app(keys="")
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            assert (await client.get("/version")).status_code == 200
            for headers in ({}, bearer("guess"), {"x-mull-admin-key": "guess"}):
                reply = await client.post("/v1/adapters", headers=headers)
                assert reply.status_code == refused
            if own is not None:  # let in, to where an engine would be
                reply = await client.get("/v1/adapters", headers={"x-mull-admin-key": own})
                assert reply.status_code == 500


async def test_no_other_site_reads_along_unless_told(serve_app: Callable[..., FastAPI], file: Path):
    asks = {"Origin": "https://elsewhere", "Access-Control-Request-Method": "POST"}
    asks |= {"x-api-key": add(file, "ann")}
    for flags, allowed in (((), False), (("--allowed-origins", '["https://elsewhere"]'), True)):
        transport = httpx.ASGITransport(serve_app(*flags), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for reply in (
                await client.options(CHAT, headers=asks),
                await client.get("/version", headers=asks),
            ):
                assert ("access-control-allow-origin" in reply.headers) == allowed


async def test_no_body_is_read_beyond_its_bound(serve_app: Callable[..., FastAPI], file: Path):
    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b" " * (1 << 20)

    transport = httpx.ASGITransport(serve_app(), raise_app_exceptions=False)
    headers = {"x-api-key": add(file, "ann"), "content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        for path in (CHAT, "/tokenize", "/invocations"):
            sent = 0
            reply = await client.post(path, content=endless(), headers=headers)
            assert reply.status_code == 400, path
            assert sent == 17 << 20


def test_what_mull_serve_sets_for_safety(serve_app: Callable[..., FastAPI]):
    args = serve_app().state.args
    assert args.allowed_media_domains == ["none.invalid"]
    assert (args.allowed_origins, args.enable_log_requests) == ([], False)
    assert args.disable_uvicorn_access_log
    args = serve_app("--allowed-media-domains", "pictures.example").state.args
    assert args.allowed_media_domains == ["pictures.example"]


async def heard(path: str, headers: dict[str, str], **scope: Any) -> list[Any]:
    """What a guard lets through, or says itself."""
    said: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        said.append("let through")

    async def send(message: Any) -> None:
        said.append(message.get("status") or message.get("code"))

    keys = Keyring(Path(headers.pop("file")))
    guard = Guard(app, keys=keys, open_metrics=bool(scope.pop("open_metrics", False)))
    raw = [(name.encode(), of.encode()) for name, of in headers.items()]
    whole = {"type": "http", "method": "GET", "path": path, "headers": raw, **scope}
    await guard(whole, None, send)  # pyright: ignore[reportArgumentType]
    return said[:1]


async def test_no_way_of_writing_a_path_goes_around(file: Path):
    key = {"file": str(file)} | bearer(add(file, "ann"))
    for path in (
        "/v1/models",
        "/v1/models/",
        "/v1/adaptersx",
        "/invocations",
        "/v1/traces/a/events",
    ):
        assert await heard(path, dict(key)) == ["let through"], path
    for path in (
        *("/v1/adapters", "/v1/adapters/", "/v1/adapters/a/rollback", "/v1//adapters"),
        *("/v1/./adapters", "/v1/x/../adapters", "/v1/../metrics", "/v1/models/..", "//v1/models"),
        *("/V1/models", "/v1x", "", "*", "/metrics/", "/sleep", "/health/../metrics"),
    ):
        assert await heard(path, dict(key)) == [403], path
    assert await heard("/root/v1/models", dict(key), root_path="/root") == ["let through"]
    assert await heard("/root/v1/adapters", dict(key), root_path="/root") == [403]
    assert await heard("/root/health", {"file": str(file)}, root_path="/root") == ["let through"]
    assert await heard("/metrics", {"file": str(file)}, open_metrics=True) == ["let through"]
    assert await heard("/v1/realtime", dict(key), type="websocket") == ["let through"]
    assert await heard("/v1/realtime", {"file": str(file)}, type="websocket") == [1008]


async def test_an_upstream_never_sees_a_key_of_ours(file: Path):
    key = add(file, "ann")
    for own in (None, SecretStr("the-upstreams")):
        one = FakeUpstream(FakeEngine(TEXTS))
        settings = Settings(keys=file)
        async with before([one], settings, key=own, keyed=settings.terms.keyed) as (client, _):
            for headers in (bearer(key), {"x-api-key": key}, {"x-mull-admin-key": key}):
                for path, body in ((CHAT, BODY), (CHAT, PLAIN), ("/v1/responses", PLAIN)):
                    reply = await client.post(path, json=body, headers=headers)
                    assert reply.status_code != 401, reply.text
        sent = {name: of for asked in one.requests for name, of in asked.headers.items()}
        assert key not in str([asked.headers.raw for asked in one.requests])
        assert not {"x-api-key", "x-mull-admin-key"} & sent.keys()
        assert sent.get("authorization") == (None if own is None else "Bearer the-upstreams")


async def test_without_keys_of_ours_the_clients_go_on_to_the_upstream():
    one = FakeUpstream(FakeEngine(TEXTS))
    async with before([one]) as (client, _):
        await client.post(CHAT, json=PLAIN, headers=bearer("theirs") | {"x-api-key": "too"})
        assert one.requests[-1].headers["authorization"] == "Bearer theirs"
        assert one.requests[-1].headers["x-api-key"] == "too"


async def replied(request: httpx.Request) -> httpx.Response | None:
    async def said() -> AsyncGenerator[bytes, None]:
        yield b'{"choices": [], "usage": {"completion_tokens": 70}}'

    return httpx.Response(200, stream=Stream(said())) if request.url.path == CHAT else None


async def test_tokens_of_searches_and_of_plain_requests_are_one_budget(file: Path):
    key = bearer(add(file, "ann", tokens_per_minute=60))
    other = bearer(add(file, "ben", tokens_per_minute=60))
    async with before([FakeUpstream(FakeEngine(TEXTS), before=replied)], Settings(keys=file)) as (
        client,
        _,
    ):
        asked = BODY | {"strategy": {"kind": "self_consistency", "n": 4, "early_stop": "never"}}
        assert (await client.post(CHAT, json=asked, headers=key)).status_code == 200  # 10 tokens
        assert (await client.post(CHAT, json=PLAIN, headers=key)).status_code == 200  # and 70
        refused = await client.post(CHAT, json=asked, headers=key)
        assert refused.status_code == 429
        assert 20 <= int(refused.headers["retry-after"]) <= 21
        assert refused.json()["error"]["type"] == "rate_limit_exceeded"
        assert (await client.get("/v1/models", headers=key)).status_code == 429
        assert (await client.get("/health", headers=key)).status_code == 200
        assert (await client.post(CHAT, json=asked, headers=other)).status_code == 200


async def test_candidates_and_batches_are_charged_in_full(file: Path):
    key = bearer(add(file, "ann", tokens_per_minute=5))
    lines = [{"custom_id": str(at), "body": {"messages": BODY["messages"]}} for at in range(3)]
    many = {"model": BODY["model"], "max_tokens": 20, "requests": lines, "n": 2}
    many |= {"budget": {"tokens": 200}, "allocation": "equal"}
    native = {name: of for name, of in BODY.items() if name != "strategy"} | {"n": 4}
    for path, body, spent in (
        (CHAT, BODY, lambda said: said["usage"]["completion_tokens"]),
        ("/v1/strategies/best_of_n", native, lambda said: said["usage"]["completion_tokens"]),
        ("/v1/strategies/compute_optimal/batch", many, lambda said: said["spent"]["tokens"]),
    ):
        async with before([FakeUpstream(FakeEngine(TEXTS))], Settings(keys=file)) as (client, _):
            reply = await client.post(path, json=body, headers=key)
            assert reply.status_code == 200, reply.text
            refused = await client.post(path, json=body, headers=key)
            assert refused.status_code == 429
            seconds = (spent(reply.json()) - 5 + 1) * 12
            assert seconds - 1 <= int(refused.headers["retry-after"]) <= seconds


async def test_traces_are_for_the_key_that_asked_and_hold_none(file: Path, caplog: Any):
    ann, ben = add(file, "ann"), add(file, "ben")
    async with before([FakeUpstream(FakeEngine(TEXTS))], Settings(keys=file)) as (client, _):
        reply = await client.post(CHAT, json=BODY | {"trace": True}, headers=bearer(ann))
        trace = f"/v1/traces/{reply.json()['mull']['run']}"
        mine = await client.get(trace, headers=bearer(ann))
        assert mine.status_code == 200
        for said in (reply.text, mine.text, caplog.text):
            assert ann not in said
        for place in (trace, f"{trace}/events"):
            assert (await client.get(place, headers=bearer(ben))).status_code == 404
            assert (await client.get(place)).status_code == 401


async def test_too_many_turns_and_long_patterns_are_refused_before_an_upstream_sees_them():
    one = FakeUpstream(FakeEngine(TEXTS))
    async with before([one], Settings(max_turns=2)) as (client, _):
        for more in (
            {"messages": BODY["messages"] * 3},
            {"structured_outputs": {"regex": "a" * 5000}},
        ):
            for path, body in ((CHAT, BODY), (CHAT, PLAIN), ("/v1/strategies/best_of_n", PLAIN)):
                reply = await client.post(path, json=body | more)
                assert reply.status_code == 400
                assert reply.json()["error"]["param"] in more
        assert CHAT not in [asked.url.path for asked in one.requests]


def redirecting(status: int) -> Callable[[httpx.Request], Awaitable[httpx.Response | None]]:
    async def then(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(status, headers={"location": "http://169.254.169.254/latest"})

    return then


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_no_redirect_of_an_upstream_is_followed(status: int):
    one = FakeUpstream(FakeEngine(TEXTS), before=redirecting(status))
    async with before([one]) as (client, _):
        await client.post(CHAT, json=BODY)
        await client.post(CHAT, json=PLAIN)
        assert {asked.url.host for asked in one.requests} == {"up0"}


def test_a_client_names_no_address():
    """Verifiers name endpoints, which are the operator's."""
    schemas = json.dumps([model.model_json_schema() for model in VERIFIERS.values()])
    assert not re.findall(r'"[^"]*(?:url|uri|host|address)[^"]*": \{', schemas, re.IGNORECASE)


async def test_no_redirect_of_an_endpoint_is_followed():
    asked: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Redirecting) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{there.server_port}"
        endpoints = Endpoints({"judge": Endpoint(api="chat", url=url, model="m")})
        with pytest.raises(VerifierFailed, match="status 307"):
            await endpoints.post("judge", {})
        await endpoints.close()
        there.shutdown()
    assert asked == ["/v1/chat/completions"]
