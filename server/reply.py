"""Replies are folds over a run: the `mull` field, the exact usage, the native reply."""

from server.run import Run, Selection
from server.trace import Usage, planned, told
from server.wire import JSON, as_object
from strategies.core.events import Aborted, Planned, Started
from strategies.core.types import Candidate


def usage_of(selection: Selection) -> Usage | None:
    """The usage of a request's run; None as long as none has begun."""
    if not selection.runs:
        return None
    run = selection.runs[-1]
    return run.usage()


def mull_field(selection: Selection) -> JSON:
    """What OpenAI's shape has no place for: why the run stopped, the vote, and tokens by fate."""
    run = selection.runs[-1]
    usage = run.usage()
    field: JSON = {
        "run": run.id,
        "strategy": selection.strategy.kind,
        "budget": selection.limits.model_dump(exclude_none=True),
        "usage": {
            "kept_tokens": usage.kept,
            "discarded_tokens": usage.discarded,
            "aborted_tokens": usage.aborted,
            "verifier_tokens": usage.verifier,
            "engine_calls": usage.engine_calls,
            "verifier_calls": usage.verifier_calls,
            "engine_prompt_tokens": usage.prompt,
            "engine_cached_tokens": usage.cached,
            "continuation_prompt_tokens": usage.continued,
            "continuation_cached_tokens": usage.continued_cached,
        },
    }
    if selection.model is not None:
        field["adapter"] = selection.model
    if selection.versions:
        field["adapters"] = dict(selection.versions)
    if usage.consultations:
        field["endpoints"] = {
            "calls": usage.consultations,
            "prompt_tokens": usage.consulted_prompt,
            "completion_tokens": usage.consulted,
        }
    if run.outcome is not None:
        field |= {
            "answer": run.outcome.chosen.answer,
            **({} if run.outcome.chosen.model is None else {"model": run.outcome.chosen.model}),
            "answers": [one.answer for one in run.outcome.ranked],
            "stopped": run.outcome.stopped,
            "candidates": len(run.outcome.candidates),
            "votes": dict(run.outcome.votes),
            "confidence": run.outcome.confidence,
        }
        if run.outcome.abstained:
            field["abstained"] = True
    if plan := [event for _, event in run.trace.events if isinstance(event, Planned)]:
        field["plan"] = [planned(event) for event in plan]
    if selection.trace is not None:
        field["tree"] = run.trace.tree(selection.trace)
    if selection.trace == "full":
        field["trace"] = [told(timed) for timed in run.trace.events]
    return field


def exact(usage: JSON, spent: Usage) -> JSON:
    """A usage object of any of vLLM's endpoints, counting everything that was generated.

    Reasoning tokens are those that are not in the returned answers: whole samples, and what vLLM's
    reasoning parser counted in the answers themselves.
    """
    read, written = "prompt_tokens", "completion_tokens"
    if written not in usage:  # Responses, and Messages, which has no total and no details
        read, written = "input_tokens", "output_tokens"
    usage[written] = spent.generated
    if usage.get(f"{read}_details", 0) is None:  # as in streams, where nothing was cached
        usage[f"{read}_details"] = {"cached_tokens": spent.answer_cached}
    if "total_tokens" in usage:
        usage["total_tokens"] = usage.get(read, 0) + spent.generated
        details = as_object(usage.get(f"{written}_details")) or {}
        hidden = spent.generated - spent.kept + (details.get("reasoning_tokens") or 0)
        usage[f"{written}_details"] = details | {"reasoning_tokens": hidden}
    return usage


def native(run: Run, selection: Selection, *, model: str, usage: JSON) -> JSON:
    """The reply of `POST /v1/strategies/{kind}`."""
    assert run.outcome is not None
    began = {
        event.index: seconds for seconds, event in run.trace.events if isinstance(event, Started)
    }
    aborted = [
        {
            "index": event.index,
            "fate": "aborted",
            "tokens": event.tokens,
            "text": None,
            "answer": None,
            "score": None,
        }
        for _, event in run.trace.events
        if isinstance(event, Aborted)
    ]
    finished = [_candidate(one, run) for one in run.outcome.candidates]
    return {
        "id": run.id,
        "object": "strategy.run",
        "model": model,
        "strategy": selection.strategy.model_dump(mode="json"),
        "answer": run.outcome.chosen.answer,
        "text": run.outcome.chosen.text,
        "finish_reason": run.outcome.chosen.finish_reason,
        "stopped": run.outcome.stopped,
        "votes": dict(run.outcome.votes),
        "confidence": run.outcome.confidence,
        "candidates": sorted(finished + aborted, key=lambda one: one["index"]),
        "usage": usage,
        "mull": mull_field(selection),
        "timings": {
            "first_sample_seconds": round(min(began.values(), default=0.0), 6),
            "total_seconds": round(run.trace.seconds, 6),
        },
    }


def _candidate(candidate: Candidate, run: Run) -> JSON:
    assert run.outcome is not None
    return {
        "index": candidate.index,
        "fate": "kept" if candidate in run.outcome.ranked else "discarded",
        "tokens": len(candidate.token_ids),
        "text": candidate.text,
        "answer": candidate.answer,
        "score": run.outcome.scores.get(candidate.index),
        "finish_reason": candidate.finish_reason,
        **({} if candidate.likelihood is None else {"likelihood": candidate.likelihood}),
        **({} if candidate.model is None else {"model": candidate.model}),
    }


def summary(run: Run) -> JSON:
    """The reply of `GET /v1/traces/{id}`."""
    return {
        "object": "strategy.trace",
        "over": run.trace.over,
        "seconds": round(run.trace.seconds, 6),
        "request_id": run.selection.request_id,
        "user": run.selection.user,
        "mull": mull_field(run.selection),
        "events": [told(timed) for timed in run.trace.events],
    }
