"""Which strategy a request names, and the request that vLLM is to see instead.

A strategy is named by the body field `strategy` (an object with `kind`, or the kind alone) or by a
suffix of the model (`mull-tiny:self_consistency`), on every endpoint that generates. This is the
pure part: JSON in, JSON and a `Selection` out.
"""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from pydantic import ValidationError

from server.errors import nearest, refusal
from server.run import Selection
from server.verifiers.catalogue import resolve
from server.wire import JSON, as_list, as_object
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import Strategy
from strategies.registry import STRATEGIES

SELECTION: ContextVar[Selection | None] = ContextVar("selection", default=None)
"""Carries a request's choice across vLLM's handler into `generate()`."""

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

_REFUSED: dict[str, str] = {
    "n": "the strategy draws the samples: set its own 'n'",
    "best_of": "the strategy draws the samples: set its own 'n'",
    "use_beam_search": "choose one search: drop 'use_beam_search' or 'strategy'",
    "prompt_logprobs": "a search has many sequences; ask for prompt_logprobs without a strategy",
    "background": "a search runs within its request; drop 'background'",
}
"""Fields that a strategy cannot obey, unless they are at the value that asks for nothing."""

_ASKS_FOR_NOTHING = (None, False, 1)


def choose(body: JSON, models: Collection[str]) -> tuple[JSON, Selection | None]:
    """Split a request into what vLLM is to see and what the client chose of Mull.

    `models` are served names.

    Raises:
        InvalidRequest: The choice is unknown, contradictory or out of bounds; the field is named.
    """
    model, suffix = _split(body.get("model"), models)
    named = body.get("strategy")
    if named is None and suffix is None:
        if "budget" in body:
            raise InvalidRequest(
                "a budget bounds a strategy: name one in 'strategy'", field="budget"
            )
        return body, None
    strategy = _strategy(named, suffix)
    rest = {key: value for key, value in body.items() if key not in ("strategy", "budget")}
    if model is not None:
        rest["model"] = model
    return select(strategy, body.get("budget"), rest)


def select(strategy: Strategy, budget: Any, request: JSON) -> tuple[JSON, Selection]:
    """The request that vLLM is to see, and the strategy with its budget and verifier, ready to run.

    Raises:
        InvalidRequest: The budget, the verifier or a field of the request is refused; the field is
            named.
    """
    for field, reason in _REFUSED.items():
        if request.get(field) not in _ASKS_FOR_NOTHING:
            raise InvalidRequest(
                f"'{field}' cannot be combined with a strategy: {reason}", field=field
            )
    prompts = as_list(request.get("prompt"))
    # One list of token ids is one prompt; so is a list that holds one prompt.
    if prompts and len(prompts) > 1 and not all(isinstance(one, int) for one in prompts):
        raise InvalidRequest("a strategy takes one prompt per request", field="prompt")
    try:
        limits = Limits() if budget is None else Limits.model_validate(budget)
    except ValidationError as error:
        raise refusal(error, inside="budget") from error
    choice = strategy.judged_by()
    verifier = None if choice is None else resolve(choice)
    return _with_prompting(request, strategy), Selection(
        strategy, limits, verifier, _question(request)
    )


def parse(value: JSON, *, inside: str) -> Strategy:
    """A strategy from its wire form.

    Raises:
        InvalidRequest: Unknown kind or field, or a value out of bounds; the nearest valid name is
            given.
    """
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in STRATEGIES:
        hint = (
            nearest(str(kind), list(STRATEGIES))
            if kind is not None
            else f"known: {', '.join(STRATEGIES)}"
        )
        raise InvalidRequest(
            f"there is no strategy '{kind}'; {hint}"
            if kind is not None
            else f"a strategy needs a 'kind'; {hint}",
            field=f"{inside}.kind" if inside else "kind",
        )
    known = STRATEGIES[kind].model_fields
    for name in value:
        if name not in known:
            raise InvalidRequest(
                f"strategy '{kind}' has no field '{name}'; {nearest(name, list(known))}",
                field=f"{inside}.{name}" if inside else name,
            )
    try:
        return STRATEGIES[kind].model_validate(value)
    except ValidationError as error:
        raise refusal(error, inside=inside) from error


def _split(model: Any, models: Collection[str]) -> tuple[str | None, str | None]:
    """The served model and the strategy of `model:strategy`.

    A served name with a colon in it is left whole.
    """
    if not isinstance(model, str) or model in models or ":" not in model:
        return (model if isinstance(model, str) else None), None
    name, _, suffix = model.rpartition(":")
    if name not in models:
        return model, None
    if suffix not in STRATEGIES:
        raise InvalidRequest(
            f"there is no strategy '{suffix}' for model '{name}'; "
            f"{nearest(suffix, list(STRATEGIES))}",
            field="model",
        )
    return name, suffix


def _strategy(named: object, suffix: str | None) -> Strategy:
    if named is None:
        wire: JSON | None = {"kind": suffix}
    else:
        wire = {"kind": named} if isinstance(named, str) else as_object(named)
    if wire is None:
        raise InvalidRequest(
            "'strategy' is an object with a 'kind', or the kind alone", field="strategy"
        )
    strategy = parse(wire, inside="strategy")
    if suffix is not None and strategy.kind != suffix:
        raise InvalidRequest(
            f"'strategy' says {strategy.kind} and the model's suffix says {suffix}; name one",
            field="strategy",
        )
    return strategy


def _question(body: JSON) -> str:
    """The last thing that the user said, in words; empty where the prompt has none."""
    turns: object = body.get("messages", body.get("input", body.get("prompt", "")))
    if isinstance(turns, str):
        return turns
    for turn in reversed(as_list(turns) or []):
        if isinstance(turn, str):
            return turn
        if _role(turn) == "user":
            return _words(turn.get("content"))
    return ""


def _words(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = [as_object(part) or {} for part in as_list(content) or []]
    return "\n".join(str(part["text"]) for part in parts if "text" in part)


def _with_prompting(body: JSON, strategy: Strategy) -> JSON:
    """Put the strategy's worked examples before the question and its trigger after it."""
    examples, trigger = strategy.examples_shown(), strategy.trigger_shown()
    if not examples and trigger is None:
        return body
    place = next((name for name in ("messages", "input", "prompt") if name in body), "messages")
    turns: object = body.get(place)
    if isinstance(turns, str):
        shown = "".join(f"{one.question}\n{one.answer}\n\n" for one in examples)
        asked_for = "" if trigger is None else f"\n{trigger}"
        return body | {place: f"{shown}{turns}{asked_for}"}
    conversation = as_list(turns)
    if conversation is None or place == "prompt":
        raise InvalidRequest("examples and a trigger need a prompt in words", field=place)
    asked = max((at for at, turn in enumerate(conversation) if _role(turn) == "user"), default=None)
    if asked is None:
        raise InvalidRequest("examples and a trigger need a user's question", field=place)
    conversation = list(conversation)
    if trigger is not None:
        content: Any = conversation[asked].get("content")
        kind = "input_text" if place == "input" else "text"
        longer = (
            f"{content}\n{trigger}"
            if isinstance(content, str)
            else [*(as_list(content) or []), {"type": kind, "text": trigger}]
        )
        conversation[asked] = conversation[asked] | {"content": longer}
    start = next(
        (at for at, turn in enumerate(conversation) if _role(turn) not in ("system", "developer")),
        0,
    )
    shown_turns = [
        {"role": role, "content": text}
        for one in examples
        for role, text in (("user", one.question), ("assistant", one.answer))
    ]
    return body | {place: [*conversation[:start], *shown_turns, *conversation[start:]]}


def _role(turn: object) -> str | None:
    return (as_object(turn) or {}).get("role")
