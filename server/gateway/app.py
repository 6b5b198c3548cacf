"""The gateway as an ASGI app: our routes over a fleet, and everything else an upstream's."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.adapters.registry import Registry
from server.admission import Admission
from server.archive import Archive
from server.batch.running import Batches
from server.calibration.shelf import Shelf
from server.endpoints import Endpoints
from server.errors import handle, shape
from server.gateway.answering import Answering, Kind
from server.gateway.fleet import Fleet
from server.gateway.names import FleetNames
from server.gateway.passing import Passing
from server.keys.guard import Guard
from server.keys.keyring import Keyring
from server.middleware import Choosing
from server.routes import batch, calibrations, models, strategies, traces, verify
from server.search import Searches
from server.selection import ENDPOINTS, SELECTION
from server.settings import Settings
from server.sse import EventStream
from server.store import Store
from server.wire import JSON, as_object, body_of
from strategies.core.aio import Background
from strategies.core.errors import EngineUnavailable, InvalidRequest, MullError
from strategies.core.sandbox import Sandbox

if TYPE_CHECKING:
    from server.otel import Tracing

_LOOK_SECONDS = 1.0
"""How often is seen whether an upstream is to be asked again what it serves."""

_CANDIDATES = 256
"""That run at once on each upstream, unless the operator says otherwise: vLLM's own default."""

_SEARCHED: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}


class Served:
    """What is served, as far as calibrations ask."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def weights(self) -> str | None:
        """The digest that all upstreams tell; None if one tells none, or another."""
        told = {one.weights for one in self._fleet.known}
        return told.pop() if len(told) == 1 else None


class Gateway:
    """An app over a fleet, and what it lives by."""

    def __init__(self, fleet: Fleet, settings: Settings, tracing: "Tracing | None" = None) -> None:
        self._fleet = fleet
        self._tracing = tracing
        self._settings = settings
        self._shelf = Shelf(settings.calibrations)
        self._names: FleetNames | None = None
        if settings.adapters is not None:
            self._names = FleetNames(fleet, Registry(settings.adapters))
        self._served = Served(fleet)
        self.app = self._built()

    def _built(self) -> FastAPI:
        settings, fleet = self._settings, self._fleet
        app = FastAPI(openapi_url=None, lifespan=self._living)
        keys = app.state.keys = Keyring(settings.keys, admin=settings.admin_key)
        for one in (strategies, batch, traces, verify, calibrations):
            app.include_router(one.router)
        if settings.presets or self._names is not None:
            app.include_router(models.router)
        passing = Passing(fleet, most_bytes=settings.max_body_bytes)
        for path in ENDPOINTS:
            app.router.routes.append(Route(path, _Searching(passing), methods=["POST"]))
        app.router.routes.append(Route("/health", self._health, methods=["GET"]))
        app.router.routes.append(Route("/live", _live, methods=["GET"]))
        app.router.routes.append(Route("/metrics", _metrics, methods=["GET"]))
        app.router.routes.append(Route("/{path:path}", passing))
        app.add_exception_handler(MullError, handle)
        app.add_middleware(
            Choosing,
            models=lambda: self.models,
            names=lambda: self._names,
            settings=settings,
            shelf=self._shelf,
        )
        app.add_middleware(_Looking, gateway=self)
        app.add_middleware(Guard, keys=keys, open_metrics=settings.open_metrics)
        if self._tracing is not None:
            app.add_middleware(self._tracing.requests)
        return app

    @property
    def models(self) -> set[str]:
        """Every name under which a model or an adapter is served."""
        return self._fleet.models | (set[str]() if self._names is None else self._names.names)

    async def look(self, headers: Mapping[str, str]) -> None:
        """See what the upstreams serve, and which calibrations are of it."""
        await self._fleet.look(headers)
        if self._settings.calibrations is not None and self._fleet.known:
            self._shelf.check(self._served.weights)

    async def reached(self, headers: Mapping[str, str]) -> None:
        """Look, if nothing was ever seen: with the client's own key, if need be."""
        if not self._fleet.known:
            await self.look(headers)

    @asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncGenerator[None]:
        settings, state = self._settings, app.state
        sandbox, remote = Sandbox(), Endpoints(settings.endpoints)
        archive = None
        if settings.traces is not None:
            archive = Archive(settings.traces, most_bytes=settings.max_traces_bytes)
        state.settings = settings
        keepers = [one for one in (archive, self._tracing) if one is not None]
        state.store = Store(settings.kept_traces, *keepers)
        state.shelf, state.base = self._shelf, self._served
        state.adapters = self._names
        state.served = lambda: self.models
        state.shown = self._shown
        candidates = settings.max_running_candidates or _CANDIDATES * len(self._fleet.upstreams)
        admission = Admission(requests=settings.max_running_requests, candidates=candidates)
        state.admission, state.batches = admission, Batches()
        searches = Searches(
            admission=admission,
            store=state.store,
            sandbox=sandbox,
            remote=remote,
            traced=self._tracing is not None,
        )
        state.chat = Answering(self._fleet, names=self._names, searches=searches)
        async with Background(self._watch()):
            try:
                yield
            finally:
                await sandbox.close()
                await remote.close()
                for one in keepers:
                    await one.close()
                await self._fleet.close()

    async def _watch(self) -> None:
        """Look again and again, so that what is gone is known before it is asked."""
        while True:
            await self.look({})
            await asyncio.sleep(_LOOK_SECONDS)

    async def _shown(self, headers: Mapping[str, str]) -> JSON:
        """What the upstreams say of their models."""
        await self.look(headers)
        if not self._fleet.cards:
            raise EngineUnavailable("no upstream is well; try again")
        return {"object": "list", "data": [dict(card) for card in self._fleet.cards]}

    async def _health(self, request: Request) -> Response:
        """Well as long as one upstream is."""
        if any(one.cards and not one.breaker.open for one in self._fleet.upstreams):
            return Response()
        error = shape(EngineUnavailable("no upstream is well"))
        return JSONResponse(error, status_code=503)


class _Searching:
    """An endpoint that generates: searched for here with a strategy, passed on without."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if SELECTION.get() is None:
            await self._passing(scope, receive, send)
            return
        request = Request(scope, receive)
        reply = await self._answered(request)
        await reply(scope, receive, send)

    async def _answered(self, request: Request) -> Response:
        path = request.url.path
        if path not in _SEARCHED:
            raise InvalidRequest(
                f"a gateway searches on {' and '.join(_SEARCHED)}, not on {path}; ask there, or an "
                "upstream",
                field="strategy",
            )
        state = request.app.state
        answering: Answering = state.chat
        raw = await body_of(request.receive, state.settings.max_body_bytes)
        if raw is None:
            return Response(status_code=499)
        body = as_object(json.loads(raw)) or {}
        answer = await answering.prepared(_SEARCHED[path], body, request.headers)
        if body.get("stream"):
            return EventStream(
                answering.stream(answer),
                heartbeat_seconds=state.settings.heartbeat_seconds,
                failure=_failed,
            )
        reply = await answering.watched(answer, request)
        return reply if isinstance(reply, Response) else JSONResponse(reply)


class _Looking:
    """Sees what is served before the first request is read."""

    def __init__(self, app: ASGIApp, *, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._gateway.reached(Headers(scope=scope))
        await self._app(scope, receive, send)


def _failed(error: Exception) -> bytes:
    """What ends a stream of OpenAI's, as vLLM says it."""
    return b"data: " + json.dumps(shape(error)).encode() + b"\n\ndata: [DONE]\n\n"


async def _live(request: Request) -> Response:
    """Whether this process is there: no restart mends an upstream."""
    return Response()


async def _metrics(request: Request) -> Response:
    """This process's own; each upstream has its own `/metrics`."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
