"""What a batch asks: JSON in; its lines, ready to run, and their budget out. All or nothing."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import ValidationError
from starlette.datastructures import Headers

from server.calibration.shelf import Shelf
from server.errors import nearest, refusal
from server.run import Selection
from server.selection import choose, equip, kind_of, parse
from server.settings import Settings
from server.wire import JSON, as_list, as_object
from strategies.compute_optimal import ComputeOptimal
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest, NotFound

Allocation = Literal["marginal", "equal"]
"""By gain per token over all prompts, or the same for each."""

CHAT = "/v1/chat/completions"

_OWN = ("requests", "allocation", "budget", "stream", "store")
_LINE = ("custom_id", "method", "url", "body")
_SHARED = ("model", "stream", "store")
"""Fields of a chat request that are the batch's; a line may repeat them."""

_LONGEST_ID = 512


class ChatReader(Protocol):
    """Reads chat requests as the server of the model does."""

    @property
    def fields(self) -> Collection[str]:
        """What a chat request may hold."""
        ...

    def read(self, body: JSON) -> object:
        """Raises `InvalidRequest` where the body is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One prompt."""

    custom_id: str
    body: JSON
    """As vLLM is to see it."""
    selection: Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A whole batch."""

    lines: tuple[Line, ...]
    limits: Limits
    """Of all lines together."""
    allocation: Allocation
    streamed: bool

    @property
    def share(self) -> Limits:
        """What an equal split gives to each line."""
        n, limits = len(self.lines), self.limits
        return Limits(
            tokens=None if limits.tokens is None else limits.tokens // n,
            samples=None if limits.samples is None else limits.samples // n,
        )


def read(
    kind: str,
    fields: JSON,
    *,
    models: Collection[str],
    headers: Headers,
    settings: Settings,
    shelf: Shelf,
    chat: ChatReader,
) -> Asked:
    """A batch of a strategy from the fields of a request.

    Raises:
        InvalidRequest: There is no such strategy, or a field of it or of a line is unknown or out
            of bounds; it is named.
        NotFound: There is no such model.
    """
    own = kind_of(kind).model_fields
    known = [*_OWN, *own, *chat.fields]
    for name in fields:
        if name not in known or name == "messages":
            raise InvalidRequest(
                f"'{name}' is neither a field of a batch, of {kind} nor of a chat request; "
                f"{nearest(name, known)}"
                if name != "messages"
                else "each line has its own messages: requests[…].body.messages",
                field=name,
            )
    streamed = fields.get("stream")
    if streamed not in (None, True, False):
        raise InvalidRequest("'stream' is true or false", field="stream")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("'model' is the name of a served model", field="model")
    if model not in models:
        raise NotFound(f"there is no model '{model[:200]}'; {nearest(model, sorted(models))}")
    strategy = parse(
        {name: fields[name] for name in fields if name in own} | {"kind": kind},
        inside="",
    )
    shared = {k: v for k, v in fields.items() if k not in (*_OWN, *own)}
    if "store" in fields:
        shared["store"] = fields["store"]
    shared["strategy"] = strategy.model_dump(mode="json", exclude_unset=True)
    requests = _requests(fields.get("requests"), settings.max_batch_prompts)
    limits = _limits(fields.get("budget"), len(requests), settings)
    lines: list[Line] = []
    for at, (custom_id, own_fields) in enumerate(requests):
        inside = f"requests.{at}.body"
        for name in own_fields:
            if name not in chat.fields:
                hint = nearest(name, list(chat.fields))
                raise InvalidRequest(
                    f"'{name}' is no field of a chat request; {hint}", field=f"{inside}.{name}"
                )
            if name in _SHARED and own_fields[name] not in (None, False, shared.get(name)):
                raise InvalidRequest(
                    f"'{name}' is the batch's, and this line has another", field=f"{inside}.{name}"
                )
        body = shared | {k: v for k, v in own_fields.items() if k not in _SHARED}
        try:
            asked, selection = choose(body, models, headers, CHAT, settings)
            assert selection is not None
            equip(selection, asked, shelf, settings)
            chat.read(asked)
        except InvalidRequest as error:
            if (field := error.field or "").split(".")[0] in own_fields:
                raise InvalidRequest(str(error), field=f"{inside}.{field}") from error
            raise
        selection.limits = Limits()  # the batch's hold
        lines.append(Line(custom_id=custom_id, body=asked, selection=selection))
    least = min((one.selection for one in lines), key=lambda one: one.calibration is not None)
    return Asked(
        lines=tuple(lines),
        limits=limits,
        allocation=_allocation(fields.get("allocation"), least),
        streamed=bool(streamed),
    )


def _requests(value: object, most: int) -> list[tuple[str, JSON]]:
    """The names and bodies of lines, as they stand in a batch file."""
    lines = as_list(value)
    if not lines:
        raise InvalidRequest("'requests' is a list of lines of a batch file", field="requests")
    if len(lines) > most:
        raise InvalidRequest(
            f"a batch has {most} prompts at most, not {len(lines)}", field="requests"
        )
    found: dict[str, JSON] = {}
    for at, value in enumerate(lines):
        field = f"requests.{at}"
        line = as_object(value)
        if line is None:
            raise InvalidRequest(f"'{field}' is an object", field=field)
        for name in line:
            if name not in _LINE:
                raise InvalidRequest(
                    f"a line has no field '{name}'; {nearest(name, list(_LINE))}",
                    field=f"{field}.{name}",
                )
        custom_id, body = line.get("custom_id"), as_object(line.get("body"))
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _LONGEST_ID:
            raise InvalidRequest(
                f"'custom_id' is 1 to {_LONGEST_ID} characters", field=f"{field}.custom_id"
            )
        if custom_id in found:
            raise InvalidRequest(
                f"'custom_id' {custom_id!r} comes twice", field=f"{field}.custom_id"
            )
        for name, only in (("method", "POST"), ("url", CHAT)):
            if line.get(name) not in (None, only):
                raise InvalidRequest(f"'{name}' is '{only}' here", field=f"{field}.{name}")
        if body is None:
            raise InvalidRequest("'body' is a chat request", field=f"{field}.body")
        if not as_list(body.get("messages")):
            raise InvalidRequest("'messages' is a list", field=f"{field}.body.messages")
        found[custom_id] = body
    return list(found.items())


def _limits(value: object, prompts: int, settings: Settings) -> Limits:
    """The budget of all, within so many requests' worth of the operator's limits."""
    try:
        asked = Limits.model_validate({} if value is None else value)
    except ValidationError as error:
        raise refusal(error, inside="budget") from error
    if asked.tokens is None and asked.samples is None:
        raise InvalidRequest(
            "a batch needs a budget of tokens or samples, for all prompts together", field="budget"
        )
    for name in ("tokens", "samples"):
        most = getattr(asked, name)
        if most is not None and most < prompts:
            raise InvalidRequest(
                f"{most} {name} are too few for {prompts} prompts", field=f"budget.{name}"
            )
    bounds: dict[str, Any] = settings.limits.model_dump(exclude_none=True)
    highest = {"tokens": 100_000_000, "seconds": 86_400, "samples": 100_000}
    return asked.capped(
        Limits(**{name: min(highest[name], bound * prompts) for name, bound in bounds.items()})
    )


def _allocation(value: object, least: Selection) -> Allocation:
    """By the line of which the least is known."""
    if value not in (None, "marginal", "equal"):
        raise InvalidRequest("'allocation' is 'marginal' or 'equal'", field="allocation")
    if least.calibration is None:
        if value == "marginal":
            raise InvalidRequest(
                "'marginal' needs a calibration of this model, at the temperature of every line: "
                "see mull calibrate, and GET /v1/calibrations"
                if isinstance(least.strategy, ComputeOptimal)
                else f"{least.strategy.kind} cannot tell where a token gains most; compute_optimal "
                "can",
                field="allocation",
            )
        return "equal"
    if value == "equal":
        return "equal"
    if isinstance(least.strategy, ComputeOptimal) and least.strategy.mean_tokens is not None:
        raise InvalidRequest(
            "the budget of all says what a prompt takes on average; drop 'mean_tokens'",
            field="mean_tokens",
        )
    return "marginal"
