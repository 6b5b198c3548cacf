"""What a run looks like as spans: a fold over its trace. Knows W3C's headers, and no OpenTelemetry.

A span's id is the digest of its name. So a call can tell under which span it is made, though spans
are made when the run is over: `server.otel` sends them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from server.run import Run
from server.settings import exporters
from strategies.core.events import (
    Aborted,
    Chosen,
    Consulted,
    Failed,
    Read,
    Sampled,
    Started,
    Verified,
)

if TYPE_CHECKING:
    from server.otel import Tracing

MOST_SPANS = 1000
"""Of one run; what comes later is left out."""

TRACEPARENT = "traceparent"

_FORM = re.compile(r"([0-9a-f]{2}-[0-9a-f]{32}-)[0-9a-f]{16}(-[0-9a-f]{2})")

Attributes = Mapping[str, str | int | float | bool]

LONGEST = 200
"""Characters of a name that a client gave."""


def tracing() -> "Tracing | None":
    """What exports spans; None, and nothing is imported for it, unless OTEL_* ask for it.

    Raises:
        ValueError: They ask for what is not there.
    """
    if not (names := exporters()):
        return None
    try:
        from server.otel import configured
    except ImportError as error:
        why = f"OTEL_* ask for spans; in the checkout: pip install '.[otel]' ({error})"
        raise ValueError(why) from error
    return configured(names)


def span_id(name: str) -> str:
    """The id of the span of that name, in hexadecimal digits."""
    return blake2b(name.encode(), digest_size=8).hexdigest()


def call(run: str, index: int) -> str:
    """The name of a run's call: of a sequence, or below zero of a verifier's question."""
    return f"{run}-{index}"


def below(traceparent: str, name: str) -> dict[str, str]:
    """The header of a call of that name, in the trace of another span; none if that is none."""
    found = _FORM.fullmatch(traceparent)
    return {TRACEPARENT: f"{found[1]}{span_id(name)}{found[2]}"} if found else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took a while. It holds no words of a client, and no keys."""

    name: str
    kind: Literal["run", "part", "call"]
    """The run itself, what it did on the way, or what it asked of others."""
    id: str | None
    """None where nobody else knows of it."""
    began: float
    """In seconds since the run began."""
    ended: float
    attributes: Attributes
    failed: bool = False


def spans(run: Run) -> list[Span]:
    """A run that is over, itself first; all others are below it."""
    began: dict[int, float] = {}
    parts: list[Span] = []
    for at, event in run.trace.events:
        match event:
            case Started():
                began[event.index] = at
            case Sampled(candidate=one) if one.index in began:
                said = {
                    "mull.index": one.index,
                    "mull.fate": "finished",
                    "gen_ai.response.finish_reasons": one.finish_reason,
                    **_tokens(one.drawn, one.prompt_tokens, one.cached_tokens),
                }
                parts.append(_call("sample", run, one.index, began[one.index], at, said))
            case Aborted():
                said = {"mull.index": event.index, "mull.fate": "aborted"}
                said |= _tokens(event.tokens, event.prompt_tokens, event.cached_tokens)
                parts.append(_call("sample", run, event.index, began[event.index], at, said))
            case Verified():
                said = {"mull.verifier": event.verifier, "mull.candidates": event.candidates}
                parts.append(
                    Span(
                        name="verify",
                        kind="part",
                        id=None,
                        began=at - event.seconds,
                        ended=at,
                        attributes=said,
                        failed=not event.done,
                    )
                )
            case Read():
                said = _tokens(event.tokens, event.prompt_tokens, event.cached_tokens)
                parts.append(_call("read", run, event.index, at - event.seconds, at, said))
            case Consulted():
                said = {
                    "mull.endpoint": event.name,
                    **_tokens(event.tokens, event.prompt_tokens, 0),
                }
                parts.append(_call("consult", run, event.index, at - event.seconds, at, said))
            case _:
                pass
    return [_whole(run), *parts[:MOST_SPANS]]


def _whole(run: Run) -> Span:
    selection, usage = run.selection, run.usage()
    _, last = run.trace.events[-1]
    assert isinstance(last, Chosen | Failed)
    said: dict[str, str | int | float | bool] = {
        "mull.run": run.id,
        "mull.strategy": selection.strategy.kind,
        "mull.stopped": last.stopped,
        "mull.engine_calls": usage.engine_calls,
        "mull.tokens.kept": usage.kept,
        "mull.tokens.discarded": usage.discarded,
        "mull.tokens.aborted": usage.aborted,
        "mull.tokens.verifier": usage.verifier,
        **_tokens(usage.generated, usage.prompt, usage.cached),
    }
    if selection.request_id is not None:
        said["mull.request_id"] = selection.request_id[:LONGEST]
    if selection.model is not None:
        said["mull.adapter"] = selection.model
    return Span(
        name=selection.strategy.kind,
        kind="run",
        id=span_id(run.id),
        began=0.0,
        ended=run.trace.seconds,
        attributes=said,
        failed=last.stopped == "error",
    )


def _call(
    name: str, run: Run, index: int, began: float, ended: float, attributes: Attributes
) -> Span:
    own = span_id(call(run.id, index))
    return Span(name=name, kind="call", id=own, began=began, ended=ended, attributes=attributes)


def _tokens(written: int, read: int, cached: int) -> dict[str, str | int | float | bool]:
    """Tokens, as OpenTelemetry calls them."""
    return {
        "gen_ai.usage.output_tokens": written,
        "gen_ai.usage.input_tokens": read,
        "gen_ai.usage.cache_read.input_tokens": cached,
    }
