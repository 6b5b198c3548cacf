"""Which strategy a request names, and the request that vLLM is to see instead.

A strategy is named by the body field `strategy`, the header `X-Mull-Strategy`, a suffix of the
model (`mull-tiny:self_consistency`) or `vllm_xargs.strategy`, on every endpoint that generates:
each time a kind, a preset, or a whole strategy as JSON. This is the pure part: JSON in, JSON and a
`Selection` out.
"""

import json
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import Headers

from server.calibration.shelf import Shelf
from server.errors import nearest, refusal
from server.keys.keyring import digest, presented
from server.run import Selection
from server.settings import Settings
from server.trace import Detail
from server.verifiers.catalogue import resolve
from server.verifiers.judge import Judge
from server.wire import JSON, as_list, as_object
from strategies.compute_optimal import ComputeOptimal
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.ensemble import Ensemble
from strategies.registry import STRATEGIES

SELECTION: ContextVar[Selection | None] = ContextVar("selection", default=None)
"""Carries a request's choice across vLLM's handler into `generate()`."""

_ONE_ANSWER = ("/v1/responses", "/v1/messages")
_CHUNKED = ("/v1/chat/completions", "/v1/completions")
"""Endpoints whose streams have room for what happens."""

ENDPOINTS = (*_CHUNKED, *_ONE_ANSWER, "/invocations")

MANY = ("/v1/chat/completions/batch",)
"""Endpoints of many prompts, where a strategy is refused."""

_NOBODY = "?"
"""Owns a run whose asker is not known: no key's digest, nor the owner of those who send none."""

_HEADER = "x-mull-strategy"
_EFFORT = "reasoning_effort"
_LONGEST = 16_384
"""Characters of a strategy in a header or in `vllm_xargs`."""

_REFUSED: dict[str, str] = {
    "best_of": "the strategy draws the samples: set its own 'n'",
    "echo": "the prompt is no part of an answer",
    "use_beam_search": "choose one search: drop 'use_beam_search' or 'strategy'",
    "length_penalty": "it belongs to 'use_beam_search'",
    "prompt_logprobs": "a search has many sequences; ask for prompt_logprobs without a strategy",
    "kv_transfer_params": "a transfer has one sequence, a search has many",
    "ec_transfer_params": "a transfer has one sequence, a search has many",
    "background": "a search runs within its request; drop 'background'",
}
"""Fields that a strategy cannot obey, unless they are at the value that asks for nothing."""

_ONE_IS_NOTHING = ("best_of", "length_penalty")

_SHAPES: dict[str, tuple[object, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop": ([], ""),
    "ignore_eos": (False,),
}
"""What changes the probabilities of tokens, or ends them by words, with what leaves them alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One place in a request that names a strategy."""

    place: str
    strategy: Strategy
    budget: Limits = default(default_factory=Limits)
    """A preset's."""
    bare: bool = False
    """Whether it names no more than a kind, and so agrees with all of that kind."""


def choose(
    body: JSON, models: Collection[str], headers: Headers, path: str, settings: Settings
) -> tuple[JSON, Selection | None]:
    """Split a request into what vLLM is to see and what the client chose of Mull.

    `models` are served names.

    Raises:
        InvalidRequest: The choice is unknown, contradictory or out of bounds; the field is named.
    """
    settings.bounds(body)
    model, suffix = _split(body.get("model"), models)
    xargs = as_object(body.get("vllm_xargs")) or {}
    said = headers.getlist(_HEADER)
    choices = [
        _named(named, field, settings)
        for field, named in (
            ("strategy", body.get("strategy")),
            *(("X-Mull-Strategy", _loaded(_text(one), "X-Mull-Strategy")) for one in said),
            ("vllm_xargs.strategy", _loaded(xargs.get("strategy"), "vllm_xargs.strategy")),
            ("model", suffix),
        )
        if named is not None
    ]
    budget = _budget(body.get("budget"), _loaded(xargs.get("budget"), "vllm_xargs.budget"))
    if not choices and (effort := _effort(body, model, settings)) is not None:
        choices = [effort]
    if not choices:
        for field, words in (("budget", "bounds"), ("trace", "shows the progress of")):
            if field in body or (field == "budget" and budget is not None):
                raise InvalidRequest(
                    f"'{field}' {words} a strategy: name one in 'strategy'", field=field
                )
        return body, None
    if path in MANY:
        raise InvalidRequest("a strategy takes one prompt per request", field="strategy")
    choice = _agreed(choices)
    ours = ("strategy", "budget", "trace", *(() if path == "/v1/responses" else ("store",)))
    if choice.place == _EFFORT:  # it has been obeyed, and is no longer for the template
        ours = (*ours, _EFFORT, "reasoning")
    rest = {key: value for key, value in body.items() if key not in ours}
    if model is not None:
        rest["model"] = model
    if xargs:
        rest["vllm_xargs"] = {k: v for k, v in xargs.items() if k not in ("strategy", "budget")}
        if not rest["vllm_xargs"]:
            del rest["vllm_xargs"]
    if path in _ONE_ANSWER and rest.get("n") not in (None, 1):
        raise InvalidRequest(f"{path} gives one answer; drop 'n'", field="n")
    trace = traced(body)
    if trace and body.get("stream") and path not in _CHUNKED:
        raise InvalidRequest(f"a stream of {path} has no room for a trace", field="trace")
    limits = (budget or Limits()).over(choice.budget).capped(settings.limits)
    asked, selection = select(choice.strategy, limits, rest, settings)
    _sign(selection, body, headers)
    selection.trace = trace
    return asked, selection


def from_xargs(extra: JSON, settings: Settings) -> Selection | None:
    """The choice in `vllm_xargs` on an endpoint that has no other; None if it names no strategy.

    Raises:
        InvalidRequest: The choice is unknown or out of bounds.
    """
    named = _loaded(extra.get("strategy"), "vllm_xargs.strategy")
    if named is None:
        return None
    choice = _named(named, "vllm_xargs.strategy", settings)
    budget = _budget(None, _loaded(extra.get("budget"), "vllm_xargs.budget")) or Limits()
    limits = budget.over(choice.budget).capped(settings.limits)
    _, selection = select(choice.strategy, limits, {}, settings)
    selection.owner = _NOBODY
    return selection


def owner(headers: Mapping[str, str]) -> str:
    """A digest of the key that a request came with; empty if there was none.

    It is the key that the guard reads, wherever it stands; other credentials count, too.
    """
    key = presented(headers) or headers.get("authorization")
    return digest(key) if key else ""


def traced(body: JSON) -> Detail | None:
    """How much of what happens the reply is to show; `true` is everything.

    Raises:
        InvalidRequest: It is none of these.
    """
    match body.get("trace"):
        case None | False:
            return None
        case True | "full":
            return "full"
        case "summary":
            return "summary"
        case _:
            raise InvalidRequest("'trace' is true, false, 'full' or 'summary'", field="trace")


def select(
    strategy: Strategy, limits: Limits, request: JSON, settings: Settings
) -> tuple[JSON, Selection]:
    """The request that vLLM is to see, and the strategy with its budget and verifier, ready to run.

    Raises:
        InvalidRequest: The verifier or a field of the request is refused; the field is named.
    """
    for field, reason in _REFUSED.items():
        value = request.get(field)
        idle = value is None or value is False or (field in _ONE_IS_NOTHING and value == 1)
        if not idle:
            raise InvalidRequest(
                f"'{field}' cannot be combined with a strategy: {reason}", field=field
            )
    if not strategy.random():
        for field, harmless in _SHAPES.items():
            if (value := request.get(field)) is not None and value not in harmless:
                raise InvalidRequest(
                    f"'{field}' cannot be combined with {strategy.kind} over tokens, which goes by "
                    "the model's own probabilities",
                    field=field,
                )
    answers = request.get("n")
    if isinstance(answers, int) and not 1 <= answers <= strategy.most():
        raise InvalidRequest(
            f"{strategy.kind} draws {strategy.most()} samples at most, so it gives 1 to "
            f"{strategy.most()} distinct answers, not {answers}",
            field="n",
        )
    prompts = as_list(request.get("prompt"))
    # One list of token ids is one prompt; so is a list that holds one prompt.
    if prompts and len(prompts) > 1 and not all(isinstance(one, int) for one in prompts):
        raise InvalidRequest("a strategy takes one prompt per request", field="prompt")
    choice = strategy.judged_by()
    verifier = None if choice is None else resolve(choice, settings.allowed)
    if verifier is not None and strategy.stepwise and not verifier.stepwise:
        raise InvalidRequest(
            f"{strategy.kind} needs a verifier that judges single steps, and '{verifier.kind}' "
            "as chosen judges whole answers",
            field="verifier.kind",
        )
    if verifier is not None and verifier.logprobs is not None and not strategy.scores_tokens():
        raise InvalidRequest(
            f"'{verifier.kind}' judges by how likely the model found its own words, which nobody "
            "knows of words from elsewhere",
            field="verifier.kind",
        )
    if (
        isinstance(verifier, Ensemble | Judge)
        and verifier.relative
        and not strategy.judges_together()
    ):
        raise InvalidRequest(
            f"{strategy.kind} does not judge all answers at once, so they cannot be compared with "
            "each other: an ensemble is to agree by 'mean' or 'min', a judge to 'grade'",
            field="verifier",
        )
    return _with_prompting(request, strategy), Selection(
        strategy=strategy,
        limits=limits,
        verifier=verifier,
        question=_question(request),
        conversation=_conversation(request),
    )


def equip(selection: Selection, request: JSON, shelf: Shelf, settings: Settings) -> None:
    """Give a strategy that plans what is known of the request's model, and who judged then.

    Nothing is known of it at another temperature.

    Raises:
        InvalidRequest: The request asks for what only a calibration can give, and there is none.
    """
    strategy = selection.strategy
    if not isinstance(strategy, ComputeOptimal):
        return
    model = request.get("model")
    known = shelf.find(model) if isinstance(model, str) else None
    if known is not None and known.temperature == request.get("temperature"):
        judged = None if known.verifier is None else VerifierChoice.model_validate(known.verifier)
        if strategy.verifier in (None, judged):
            selection.calibration = known
            selection.verifier = None if judged is None else resolve(judged, settings.allowed)
            return
    uncalibrated(selection)


def uncalibrated(selection: Selection) -> None:
    """Let a strategy that plans go without: nothing is known of the model as it is served.

    Raises:
        InvalidRequest: The request asks for what only a calibration can give.
    """
    strategy = selection.strategy
    selection.calibration = selection.verifier = None
    for field in ("verifier", "mean_tokens", "target_confidence", "min_confidence"):
        if getattr(strategy, field) is not None:
            raise InvalidRequest(
                f"'{field}' needs a calibration of this model at this temperature"
                + (" with this verifier" if field == "verifier" else "")
                + ": see mull calibrate, and GET /v1/calibrations",
                field=f"strategy.{field}",
            )


def kind_of(path: str) -> type[Strategy]:
    """The strategy that a path names.

    Raises:
        InvalidRequest: There is none of that name; the nearest is given.
    """
    if path not in STRATEGIES:
        hint = nearest(path, list(STRATEGIES))
        raise InvalidRequest(f"there is no strategy '{path[:200]}'; {hint}", field="kind")
    return STRATEGIES[path]


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
    """The served model and the choice of `model:choice`.

    A served name with a colon in it is left whole.
    """
    if not isinstance(model, str) or model in models or ":" not in model:
        return (model if isinstance(model, str) else None), None
    name, _, suffix = model.rpartition(":")
    return (name, suffix) if name in models else (model, None)


def _text(header: str) -> str:
    """Starlette reads a header's bytes as Latin-1, but JSON is UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        raise InvalidRequest("'X-Mull-Strategy' is not UTF-8", field="X-Mull-Strategy") from None


def _loaded(named: object, field: str) -> object:
    """A choice that came as text: JSON, or a name."""
    if not isinstance(named, str):
        if named is not None:
            raise InvalidRequest(f"'{field}' is a name, or JSON as text", field=field)
        return None
    if len(named) > _LONGEST:
        raise InvalidRequest(f"'{field}' is longer than {_LONGEST} characters", field=field)
    if not named.lstrip().startswith("{"):
        return named.strip()
    try:
        return json.loads(named)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"'{field}' is not JSON", field=field) from None


def _named(named: object, field: str, settings: Settings) -> Choice:
    """What one place of a request chooses."""
    if isinstance(named, str):
        if (preset := settings.presets.get(named)) is not None:
            return Choice(place=field, strategy=preset.strategy, budget=preset.budget)
        if named not in STRATEGIES:
            hint = nearest(named, [*STRATEGIES, *settings.presets])
            inside = "strategy.kind" if field == "strategy" else field
            raise InvalidRequest(f"there is no strategy '{named[:100]}'; {hint}", field=inside)
        return Choice(place=field, strategy=parse({"kind": named}, inside=field), bare=True)
    wire = as_object(named)
    if wire is None:
        raise InvalidRequest(f"'{field}' is an object with a 'kind', or a name alone", field=field)
    return Choice(place=field, strategy=parse(wire, inside=field), bare=wire.keys() == {"kind"})


def _effort(body: JSON, model: str | None, settings: Settings) -> Choice | None:
    """What an effort means for a model that the operator has given budgets."""
    budgets = settings.efforts.get(model or "")
    effort = body.get(_EFFORT) or (as_object(body.get("reasoning")) or {}).get("effort")
    if budgets is None or effort is None:
        return None
    if not isinstance(effort, str) or effort not in budgets:
        raise InvalidRequest(
            f"'{_EFFORT}' is one of {', '.join(budgets)} with '{model}'", field=_EFFORT
        )
    return Choice(place=_EFFORT, strategy=ComputeOptimal(), budget=budgets[effort], bare=True)


def _agreed(choices: list[Choice]) -> Choice:
    """The one choice that all places make."""
    best, *others = sorted(choices, key=lambda one: one.bare)
    for other in others:
        same_kind = other.strategy.kind == best.strategy.kind
        if not (same_kind and (other.bare or other.strategy == best.strategy)):
            one, later = sorted((best, other), key=choices.index)
            raise InvalidRequest(
                f"'{one.place}' says {one.strategy.kind} and '{later.place}' says "
                f"{later.strategy.kind}"
                + (" with other parameters" if same_kind else "")
                + "; name one",
                field=later.place,
            )
    first, *others = [one for one in choices if one.budget != Limits()] or [best]
    for other in others:
        if other.budget != first.budget:
            raise InvalidRequest(
                f"the presets in '{first.place}' and '{other.place}' have different budgets; "
                "name one",
                field=other.place,
            )
    return replace(best, budget=first.budget)


def _budget(body: object, xargs: object) -> Limits | None:
    """The budget that the client names, once or twice the same."""
    found: list[Limits] = []
    for field, budget in (("budget", body), ("vllm_xargs.budget", xargs)):
        if budget is not None:
            try:
                found.append(Limits.model_validate(budget))
            except ValidationError as error:
                raise refusal(error, inside=field) from error
    if len(found) == 2 and found[0] != found[1]:
        raise InvalidRequest(
            "'budget' and 'vllm_xargs.budget' differ; name one", field="vllm_xargs.budget"
        )
    return found[0] if found else None


def _sign(selection: Selection, body: JSON, headers: Mapping[str, str]) -> None:
    """Put on record who asks, and how."""
    user = body.get("user")
    selection.owner = owner(headers)
    selection.request_id = headers.get("x-request-id")
    selection.traceparent = headers.get("traceparent")
    selection.user = user if isinstance(user, str) else None
    if (stored := body.get("store")) not in (None, True, False):
        raise InvalidRequest("'store' is true or false", field="store")
    selection.stored = stored is not False


def _question(body: JSON) -> str:
    """What the user asks, in words; of a longer conversation, all of it. Empty without words."""
    turns: object = body.get("messages", body.get("input", body.get("prompt", "")))
    if isinstance(turns, str):
        return turns
    said = [
        (_role(turn), turn if isinstance(turn, str) else _words(turn.get("content")))
        for turn in as_list(turns) or []
        if isinstance(turn, str) or _role(turn) in ("user", "assistant")
    ]
    while said and said[-1][0] == "assistant":  # the beginning of the answer
        said.pop()
    if len(said) == 1 or (said and said[-1][0] is None):
        return said[-1][1]
    return "\n\n".join(f"{role}: {words}" for role, words in said)


def _conversation(body: JSON) -> list[JSON] | str | None:
    """What is asked, in words; None if there is more to it, as pictures, tools or token ids."""
    if body.get("tools"):
        return None
    if "prompt" in body:
        return body["prompt"] if isinstance(body["prompt"], str) else None
    first = body.get("instructions", body.get("system"))  # of Responses, of Messages
    opening: list[object] = [] if first is None else [{"role": "system", "content": first}]
    turns: object = body.get("messages", body.get("input"))
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    found: list[JSON] = []
    for turn in (*opening, *(as_list(turns) or ())):
        said = as_object(turn) or {}
        parts = as_list(said.get("content"))
        worded = isinstance(said.get("content"), str) or (
            parts is not None and all("text" in (as_object(part) or {}) for part in parts)
        )
        if not worded or said.get("role") not in ("system", "developer", "user", "assistant"):
            return None
        found.append({"role": said["role"], "content": _words(said["content"])})
    return found or None


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
