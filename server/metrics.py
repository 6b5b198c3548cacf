"""Mull's own Prometheus metrics, beside vLLM's on `/metrics`, and what a run that is over adds.

Gauges are counted up and down, never asked by a function: with several API-server processes
(`PROMETHEUS_MULTIPROC_DIR`), numbers come from files and functions would be lost. What labels may
say is known beforehand, is the operator's, or is bounded here: no client makes a new series.
"""

from collections import OrderedDict
from statistics import mean
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from strategies.core.events import Aborted, Chosen, Consulted, Failed, Read, Sampled, Verified
from strategies.core.types import Candidate

if TYPE_CHECKING:
    from server.run import Run

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 3600)
"""Of a search, which may take a moment or most of an hour."""

_MOST_ALIASED = 256
"""Pairs of alias and version that are told apart; the one that was used last stays."""

RUNS = Counter("mull_runs", "Searches that are over.", ["strategy", "stopped"])
SECONDS = Histogram("mull_run_seconds", "Wall time of searches.", ["strategy"], buckets=_SECONDS)
SAMPLES = Counter(
    "mull_samples",
    "Sequences by fate; undrawn: planned, and not needed for the decision.",
    ["strategy", "fate"],
)
TOKENS = Counter("mull_tokens", "Generated tokens by fate.", ["strategy", "fate"])
SAVED = Counter(
    "mull_saved_tokens_estimate",
    "Tokens that early decisions saved, if samples had been as long as their siblings on average.",
    ["strategy"],
)
PROMPT_TOKENS = Counter("mull_prompt_tokens", "Prompt tokens of all engine calls.", ["strategy"])
CACHED_TOKENS = Counter(
    "mull_cached_prompt_tokens", "Those of them from the prefix cache.", ["strategy"]
)
CALLS = Counter("mull_engine_calls", "Sequences asked of the engine.", ["strategy"])
VERIFIED = Counter(
    "mull_verified_candidates",
    "Candidates by verifier; failed: it was ended before it had an opinion.",
    ["verifier", "result"],
)
VERIFYING = Histogram(
    "mull_verifier_seconds",
    "Wall time of verifiers, for all candidates that they were given at once.",
    ["verifier"],
    buckets=_SECONDS,
)
QUESTIONS = Counter(
    "mull_verifier_calls",
    "What verifiers asked of the engine, and of endpoints elsewhere.",
    ["strategy", "of"],
)
REFUSED = Counter("mull_refusals", "Requests that were answered with an error, by why.", ["reason"])
RUNNING = Gauge(
    "mull_running_requests",
    "Requests that search now, or are about to.",
    multiprocess_mode="livesum",
)
UNBEGUN = Gauge(
    "mull_waiting_requests",
    "Searches whose first candidate waits for a slot.",
    multiprocess_mode="livesum",
)
CANDIDATES = Gauge(
    "mull_running_candidates", "Candidates that run now.", multiprocess_mode="livesum"
)
WAITING = Gauge(
    "mull_waiting_candidates", "Candidates that wait for a slot.", multiprocess_mode="livesum"
)
UNARCHIVED = Counter("mull_traces_lost", "Runs that could not be kept on disk.")
ALIASED = Counter("mull_adapter_requests", "Requests by alias.", ["alias", "version"])
RESIDENT = Gauge("mull_adapters_resident", "Adapters in the engine.", multiprocess_mode="livesum")
LOADING = Histogram(
    "mull_adapter_load_seconds",
    "Until an adapter was loaded and tried, or refused.",
    buckets=_SECONDS,
)
LOAD_FAILED = Counter("mull_adapter_load_failures", "Adapters that could not be loaded.")
FLIPS = Counter("mull_adapter_flips", "Aliases seen to mean something else than before.")
OPEN = Gauge("mull_upstream_open", "1 while an upstream is left alone.", ["upstream"])
ASKED = Gauge("mull_upstream_running", "Requests under way to an upstream.", ["upstream"])
FAILED = Counter("mull_upstream_failures", "Times that it did not answer.", ["upstream"])
RETRIED = Counter("mull_upstream_retries", "Requests that were tried again.")
PASSED = Counter("mull_passed_requests", "Requests passed to an upstream, by status.", ["status"])

_aliased: OrderedDict[tuple[str, str], None] = OrderedDict()


def aliased(alias: str, version: str) -> None:
    """Count a request to an alias. Versions come and go for ever, so the oldest pair makes room."""
    _aliased[alias, version] = None
    _aliased.move_to_end((alias, version))
    if len(_aliased) > _MOST_ALIASED:
        ALIASED.remove(*_aliased.popitem(last=False)[0])
    ALIASED.labels(alias, version).inc()


def count(run: "Run") -> None:
    """Add a run that is over."""
    strategy, usage = run.selection.strategy.kind, run.usage()
    events = [event for _, event in run.trace.events]
    stopped = events[-1].stopped if isinstance(events[-1], Chosen | Failed) else "error"
    RUNS.labels(strategy, stopped).inc()
    SECONDS.labels(strategy).observe(run.trace.seconds)
    for fate in ("kept", "discarded", "aborted", "verifier"):
        TOKENS.labels(strategy, fate).inc(getattr(usage, fate))
    PROMPT_TOKENS.labels(strategy).inc(usage.prompt)
    CACHED_TOKENS.labels(strategy).inc(usage.cached)
    CALLS.labels(strategy).inc(usage.engine_calls)
    finished = [event.candidate for event in events if isinstance(event, Sampled)]
    aborted = [event.tokens for event in events if isinstance(event, Aborted)]
    undrawn, saved = _saved(run, finished, aborted) if stopped == "decided" else (0, 0.0)
    SAMPLES.labels(strategy, "finished").inc(len(finished))
    SAMPLES.labels(strategy, "aborted").inc(len(aborted))
    SAMPLES.labels(strategy, "undrawn").inc(undrawn)
    SAVED.labels(strategy).inc(saved)
    for event in events:
        match event:
            case Verified():
                result = "judged" if event.done else "failed"
                VERIFIED.labels(event.verifier, result).inc(event.candidates)
                VERIFYING.labels(event.verifier).observe(event.seconds)
            case Read():
                QUESTIONS.labels(strategy, "engine").inc()
            case Consulted():
                QUESTIONS.labels(strategy, "endpoint").inc()
            case _:
                pass


def _saved(run: "Run", finished: list[Candidate], aborted: list[int]) -> tuple[int, float]:
    """Samples that an early decision left undrawn, and about how many tokens it saved.

    What a sample would have had that was not drawn, or not to its end, nobody knows. Searches that
    draw answers in parts plan no number of them, and save nothing that could be counted.
    """
    strategy, most = run.selection.strategy, run.selection.limits.samples
    if strategy.stepwise or not finished or any(one.parent is not None for one in finished):
        return 0, 0.0
    planned = strategy.most() if most is None else min(strategy.most(), most)
    undrawn = max(0, planned - len(finished) - len(aborted))
    usual = mean(one.drawn for one in finished)
    return undrawn, undrawn * usual + sum(max(0.0, usual - tokens) for tokens in aborted)
