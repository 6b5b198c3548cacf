"""OpenTelemetry: a span for each request, and the spans of its runs. Imported only where wanted.

Exporters, sampler, resource and limits are those of the standard OTEL_* variables.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span as Recorded
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.run import Run
from server.selection import ENDPOINTS
from server.tracing import LONGEST, TRACEPARENT, spans

_W3C = TraceContextTextMapPropagator()

_KINDS = {"run": SpanKind.INTERNAL, "part": SpanKind.INTERNAL, "call": SpanKind.CLIENT}


class Tracing:
    """Keeps runs as spans, and hands them to exporters in a thread of OpenTelemetry's."""

    def __init__(self, *exporters: SpanExporter) -> None:
        self._ids = _Ids()
        named = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(
            id_generator=self._ids, resource=Resource.create({SERVICE_NAME: "mull", **named})
        )
        for one in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(one))
        self._tracer = self._provider.get_tracer("mull")

    @contextmanager
    def request(self, scope: Scope) -> Generator[tuple[Scope, Recorded]]:
        """A span while the block lasts, and the request as if whoever reads it were called by it.

        So what passes on its headers, or hangs spans below them, is below this one.
        """
        path = scope["path"]
        span = self._tracer.start_span(
            f"POST {path}" if path in ENDPOINTS else "POST",
            context=_W3C.extract(dict(Headers(scope=scope)), Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "url.path": path[:LONGEST]},
        )
        try:
            headers = MutableHeaders(raw=list(scope["headers"]))
            headers[TRACEPARENT] = _header(span)
            yield {**scope, "headers": headers.raw}, span
        except BaseException:
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def requests(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware: every POST is a span, and what it leads to is below it."""
        return _Requests(app, self)

    def keep(self, run: Run) -> None:
        """Make a run's spans, below that of its request."""
        if run.selection.traceparent is None:
            return
        context = _W3C.extract({TRACEPARENT: run.selection.traceparent}, Context())
        for one in spans(run):
            self._ids.next = one.id
            span = self._tracer.start_span(
                one.name,
                context=context,
                kind=_KINDS[one.kind],
                attributes=one.attributes,
                start_time=_nanoseconds(run, one.began),
            )
            if one.failed:
                span.set_status(StatusCode.ERROR)
            span.end(_nanoseconds(run, one.ended))
            if one.kind == "run":
                context = set_span_in_context(span, Context())

    async def close(self) -> None:
        """Send what waits."""
        await asyncio.to_thread(self._provider.shutdown)


class _Requests:
    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._tracing.request(scope) as (asked, span):

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            await self._app(asked, receive, sending)


class _Ids(RandomIdGenerator):
    """The next span's id is `next`, if it is set."""

    next: str | None = None

    def generate_span_id(self) -> int:
        wanted, self.next = self.next, None
        return super().generate_span_id() if wanted is None else int(wanted, 16)


def configured(names: tuple[str, ...]) -> Tracing:
    """With exporters by the names under which packages offer them.

    Raises:
        ValueError: There is none of that name.
    """
    exporters: list[SpanExporter] = []
    for name in names:
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise ValueError(f"there is no exporter '{name}' of spans; see OTEL_TRACES_EXPORTER")
        make: Any = found[0].load()
        exporters.append(make())
    return Tracing(*exporters)


def _header(span: Recorded) -> str:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, Context()))
    return carrier[TRACEPARENT]


def _nanoseconds(run: Run, at: float) -> int:
    return int((run.trace.began + at) * 1e9)
