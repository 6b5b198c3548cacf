"""Replies are folds over a run: the `mull` field, the exact usage, the native reply."""

from server.run import Run, Selection
from server.trace import Usage
from server.wire import JSON
from strategies.core.events import Aborted, Started
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
        "usage": {
            "kept_tokens": usage.kept,
            "discarded_tokens": usage.discarded,
            "aborted_tokens": usage.aborted,
            "verifier_tokens": usage.verifier,
            "engine_calls": usage.engine_calls,
            "engine_prompt_tokens": usage.prompt,
            "engine_cached_tokens": usage.cached,
        },
    }
    if run.outcome is not None:
        field |= {
            "answer": run.outcome.chosen.answer,
            "stopped": run.outcome.stopped,
            "candidates": len(run.outcome.candidates),
            "votes": dict(run.outcome.votes),
            "confidence": run.outcome.confidence,
        }
    return field


def exact(usage: JSON, spent: Usage) -> JSON:
    """A usage object of any of vLLM's endpoints, counting everything that was generated.

    `reasoning_tokens` are those that are not in the returned answer.
    """
    hidden = spent.generated - spent.kept
    if "completion_tokens" in usage:  # chat and text completions
        usage["completion_tokens"] = spent.generated
        usage["total_tokens"] = usage.get("prompt_tokens", 0) + spent.generated
        usage["completion_tokens_details"] = (usage.get("completion_tokens_details") or {}) | {
            "reasoning_tokens": hidden
        }
    elif (
        "output_tokens" in usage
    ):  # Responses, and Anthropic's Messages, which have no total and no details
        usage["output_tokens"] = spent.generated
        if "total_tokens" in usage:
            usage["total_tokens"] = usage.get("input_tokens", 0) + spent.generated
            usage["output_tokens_details"] = (usage.get("output_tokens_details") or {}) | {
                "reasoning_tokens": hidden
            }
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
            "total_seconds": round(run.trace.events[-1][0], 6),
        },
    }


def _candidate(candidate: Candidate, run: Run) -> JSON:
    assert run.outcome is not None
    return {
        "index": candidate.index,
        "fate": "kept" if candidate.index == run.outcome.chosen.index else "discarded",
        "tokens": len(candidate.token_ids),
        "text": candidate.text,
        "answer": candidate.answer,
        "score": run.outcome.scores.get(candidate.index),
        "finish_reason": candidate.finish_reason,
    }
