"""Mull's own Prometheus metrics, beside vLLM's on `/metrics`: folds over finished runs."""

from prometheus_client import Counter, Gauge, Histogram

from server.run import Run
from strategies.core.events import Chosen, Failed

RUNS = Counter("mull_runs", "Finished strategy requests.", ["strategy", "stopped"])
TOKENS = Counter("mull_tokens", "Generated tokens by fate.", ["strategy", "fate"])
PROMPT_TOKENS = Counter("mull_prompt_tokens", "Prompt tokens of all engine calls.", ["strategy"])
CALLS = Counter("mull_engine_calls", "Sequences asked of the engine.", ["strategy"])
SECONDS = Histogram("mull_run_seconds", "Wall time of strategy requests.", ["strategy"])
ALIASED = Counter("mull_adapter_requests", "Requests by alias.", ["alias", "version"])
UNARCHIVED = Counter("mull_traces_lost", "Runs that could not be kept on disk.")
RUNNING = Gauge("mull_running_requests", "Strategy requests that search now.")
CANDIDATES = Gauge("mull_running_candidates", "Candidates that run now.")


def count(run: Run) -> None:
    """Add a run that is over."""
    strategy, usage = run.selection.strategy.kind, run.usage()
    _, last = run.trace.events[-1]
    stopped = last.stopped if isinstance(last, Chosen | Failed) else "error"
    RUNS.labels(strategy, stopped).inc()
    for fate in ("kept", "discarded", "aborted", "verifier"):
        TOKENS.labels(strategy, fate).inc(getattr(usage, fate))
    PROMPT_TOKENS.labels(strategy).inc(usage.prompt)
    CALLS.labels(strategy).inc(usage.engine_calls)
    SECONDS.labels(strategy).observe(run.trace.seconds)
