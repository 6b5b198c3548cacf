"""A request with a strategy, from the client's fields to OpenAI's reply, over a fleet."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from fastapi import Request
from starlette.responses import Response

from server.errors import nearest
from server.gateway.engine import Asked, RemoteEngine
from server.gateway.fleet import SESSION, Fleet
from server.gateway.names import FleetNames
from server.gateway.vocabulary import Vocabularies
from server.gateway.words import FIRST_PROMPT, UNBOUNDED, WordsEngine, check_words
from server.reply import usage_of
from server.run import Selection
from server.search import Searches, Winner, check_fields
from server.selection import SELECTION, uncalibrated
from server.sse import gone
from server.verifiers.catalogue import adapters, talkers
from server.wire import JSON, as_list, as_object
from strategies.core.aio import Background
from strategies.core.engine import Engine
from strategies.core.errors import EngineUnavailable, InvalidRequest
from strategies.core.events import Event, Grown
from strategies.core.types import Candidate, Labels, Outcome, Problem

Kind = Literal["chat", "text"]

SAMPLING = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "priority",
        "repetition_detection",
        "repetition_penalty",
        "response_format",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "structured_outputs",
        "temperature",
        "thinking_token_budget",
        "top_k",
        "top_p",
        "vllm_xargs",
    }
)
"""What each sample is asked with."""

RENDERING = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
    }
)
"""What a conversation is rendered with."""

OWN = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "seed",
        "stream",
        "stream_options",
        "user",
    }
)
"""What is obeyed here."""

_IDLE: dict[str, tuple[object, ...]] = {
    "include_reasoning": (True,),
    "parallel_tool_calls": (True,),
    "stream_interval": (1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "suffix": ("",),
}
"""Values besides null and false that ask for nothing, of fields that are refused."""

_WORDS = ("text", "input_text", "output_text", "refusal")
"""Parts of a message that are nothing but words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A search that is about to begin, and the shape that its reply is to have."""

    kind: Kind
    selection: Selection
    problem: Problem
    engine: Engine
    model: str
    name: str
    stream_usage: bool = False


class Answering:
    """What all requests with a strategy share."""

    fields = SAMPLING | RENDERING | OWN | _IDLE.keys()
    """What a chat request may hold."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        names: FleetNames | None,
        searches: Searches,
    ) -> None:
        self._fleet = fleet
        self._names = names
        self._searches = searches
        self._vocabularies = Vocabularies(fleet)

    def read(self, body: JSON) -> None:
        """See that a chat request can be obeyed, as far as that can be told without an upstream.

        Raises:
            InvalidRequest: A field is refused, by name.
        """
        sampling_fields("chat", body)
        _messages(body)

    async def complete(
        self, body: JSON, raw_request: Request, *, watch: bool
    ) -> dict[str, Any] | Response:
        """A whole chat reply as JSON. With `watch`, a client that leaves aborts it."""
        answer = await self.prepared("chat", body, raw_request.headers)
        if not watch:
            return await self.whole(answer)
        return await self.watched(answer, raw_request)

    async def watched(self, answer: Answer, request: Request) -> dict[str, Any] | Response:
        """A whole reply, unless the client leaves before."""
        working = Background(self.whole(answer))
        async with working as work, Background(gone(request.receive)) as leaving:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
        return Response(status_code=499)  # to nobody

    async def prepared(self, kind: Kind, body: JSON, headers: Mapping[str, str]) -> Answer:
        """A request as a problem, with an engine to solve it.

        Raises:
            InvalidRequest: A field is refused, by name.
            EngineUnavailable: No upstream is well.
        """
        selection = SELECTION.get()
        assert selection is not None
        stream = _boolean(body, "stream")
        options = as_object(body.get("stream_options")) or {}
        fields = sampling_fields(kind, body)
        check_fields(selection, _looked_up(fields), tokens=True, logprobs=False)
        if not self._fleet.known:
            raise EngineUnavailable("no upstream is well; try again")
        model = body.get("model")
        if not isinstance(model, str):
            model = str(self._fleet.cards[0].get("id"))
        self._adapted(selection, model)
        name = f"run-{uuid.uuid4().hex}"
        answers = _integer(body, "n", least=1) or 1
        put = self._in_tokens if self._fleet.tokens else self._in_words
        engine, ids, room = await put(
            kind, body, fields, headers, model=model, name=name, pieces=stream and answers == 1
        )
        wanted = _most_tokens(kind, body)
        return Answer(
            kind=kind,
            selection=selection,
            problem=Problem(
                token_ids=tuple(ids),
                text=selection.question,
                max_tokens=room if wanted is None else min(wanted, room),
                seed=_integer(body, "seed"),
                answers=answers,
            ),
            engine=engine,
            model=model,
            name=name,
            stream_usage=bool(options.get("include_usage")),
        )

    async def _in_tokens(
        self,
        kind: Kind,
        body: JSON,
        fields: JSON,
        headers: Mapping[str, str],
        *,
        model: str,
        name: str,
        pieces: bool,
    ) -> tuple[Engine, Sequence[int], int]:
        """An engine of tokens, the prompt, and the tokens that may follow it."""
        selection = SELECTION.get()
        assert selection is not None
        session = headers.get(SESSION.lower())
        said = self._fleet.headers(headers, session)
        vocabulary = self._vocabularies.of(model)
        longest = self._fleet.longest
        ids = await self._prompt(kind, body, model, said)
        if not 0 < len(ids) <= longest:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; the model reads 1 to {longest}",
                field="messages" if kind == "chat" else "prompt",
            )
        await vocabulary.probe(said)
        key = session or _digest(model, ids)
        asked = Asked(
            model=model,
            fields=fields,
            key=key,
            headers=self._fleet.headers(headers, key),
            labels=await self._labels(selection, model, said),
            versions=selection.versions,
        )
        engine = RemoteEngine(self._fleet, vocabulary, asked, name=name, pieces=pieces)
        return engine, ids, longest + 1 - len(ids)

    async def _in_words(
        self,
        kind: Kind,
        body: JSON,
        fields: JSON,
        headers: Mapping[str, str],
        *,
        model: str,
        name: str,
        pieces: bool,
    ) -> tuple[Engine, Sequence[int], int]:
        """The same of an upstream that knows no tokens."""
        selection = SELECTION.get()
        assert selection is not None
        check_words(selection)
        if kind == "chat":
            prompt = {"messages": _messages(body)}
            prompt |= {field: body[field] for field in RENDERING if field in body}
        elif isinstance(body.get("prompt"), str):
            prompt = {"prompt": body["prompt"]}
        else:
            raise InvalidRequest(
                "'prompt' is text: this gateway's upstream knows no token ids", field="prompt"
            )
        key = headers.get(SESSION.lower()) or _digest(model, prompt)
        engine = WordsEngine(
            self._fleet,
            kind=kind,
            model=model,
            fields=fields,
            prompt=prompt,
            key=key,
            headers=self._fleet.headers(headers, key),
            name=name,
        )
        return engine, (FIRST_PROMPT,), UNBOUNDED

    async def whole(self, answer: Answer) -> JSON:
        """A whole reply."""
        outcome: Outcome | None = None
        running = self._searches.run(
            answer.selection, answer.problem, answer.engine, name=answer.name
        )
        async with aclosing(running) as told:
            async for piece in told:
                outcome = piece
        assert isinstance(outcome, Outcome)
        choices = [
            _choice(answer.kind, rank, one.text, _ended(one))
            for rank, one in enumerate(outcome.ranked)
        ]
        kind = "chat.completion" if answer.kind == "chat" else "text_completion"
        return _head(answer, kind) | {"choices": choices, "usage": _usage(answer)}

    async def stream(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """A reply in events: the winner's words from the moment that nothing else can win."""
        kind = "chat.completion.chunk" if answer.kind == "chat" else "text_completion"
        head = _head(answer, kind)
        written: dict[int, str] = {}
        winner = Winner[str](
            whole=lambda index: written.get(index, ""), grown=lambda event: event.chunk.text
        )

        def tell(event: Event) -> str | None:
            if isinstance(event, Grown):
                written[event.index] = written.get(event.index, "") + event.chunk.text
            return winner(event)

        sent = ""
        outcome: Outcome | None = None
        running = self._searches.run(
            answer.selection,
            answer.problem,
            answer.engine,
            name=answer.name,
            tell=tell if answer.problem.answers == 1 else None,
        )
        async with aclosing(running) as told:
            async for piece in told:
                if isinstance(piece, Outcome):
                    outcome = piece
                elif piece:
                    if not sent and answer.kind == "chat":
                        yield _event(head | {"choices": [_opened(0)]})
                    sent += piece
                    yield _event(head | {"choices": [_piece(answer.kind, 0, piece, None)]})
        assert outcome is not None
        for rank, one in enumerate(outcome.ranked):
            if not (rank == 0 and sent) and answer.kind == "chat":
                yield _event(head | {"choices": [_opened(rank)]})
            rest = one.text[len(sent) :] if rank == 0 else one.text
            if rest:
                yield _event(head | {"choices": [_piece(answer.kind, rank, rest, None)]})
            yield _event(head | {"choices": [_piece(answer.kind, rank, "", _ended(one))]})
        if answer.stream_usage:
            yield _event(head | {"choices": [], "usage": _usage(answer)})
        yield b"data: [DONE]\n\n"

    def _adapted(self, selection: Selection, model: str) -> None:
        """Say which adapter answers, and refuse those that are not there."""
        known = {*self._fleet.models, *(() if self._names is None else self._names.names)}
        versions = selection.versions
        for field, every in (
            ("verifier.adapter", talkers(selection.verifier)),
            ("strategy.models", selection.strategy.drawn_from()),
        ):
            for name in every:
                if name not in versions and name not in known:
                    hint = nearest(name, sorted(known))
                    raise InvalidRequest(f"there is no adapter '{name[:200]}'; {hint}", field=field)
        registered = self._names is not None and self._names.meant(model) is not None
        selection.model = model if registered or self._fleet.adapts(model) else None
        known_plan = selection.calibration
        if known_plan is not None and known_plan.digests.get("adapter") != selection.model:
            uncalibrated(selection)  # it is of another version

    async def _labels(
        self, selection: Selection, model: str, headers: Mapping[str, str]
    ) -> dict[str, Labels]:
        """The labels of the adapters that judge, from the registry that the fleet shares."""
        found: dict[str, Labels] = {}
        for name in adapters(selection.verifier):
            version = selection.versions.get(name, name)
            if self._names is None or self._names.meant(version) is None:
                raise InvalidRequest(
                    f"how '{name[:200]}' judges stands in its manifest, which a gateway reads in "
                    "the registry that its upstreams share (MULL_ADAPTERS)",
                    field="verifier.adapter",
                )
            folder = await asyncio.to_thread(self._names.folder, version)
            found[name] = await self._vocabularies.of(model).judge(name, folder, headers)
        return found

    async def _prompt(
        self, kind: Kind, body: JSON, model: str, headers: Mapping[str, str]
    ) -> Sequence[int]:
        vocabulary = self._vocabularies.of(model)
        if kind == "chat":
            rendering = {name: body[name] for name in RENDERING if name in body}
            asked = {"model": model, "messages": _messages(body), **rendering}
            return await vocabulary.prompt(asked, headers, None)
        prompt: Any = body.get("prompt")
        several = as_list(prompt)
        if several and len(several) == 1 and not isinstance(several[0], int):
            prompt = several[0]
        if isinstance(prompt, str):
            special = body.get("add_special_tokens", True)
            asked = {"model": model, "prompt": prompt, "add_special_tokens": special}
            return await vocabulary.prompt(asked, headers, None)
        ids = as_list(prompt)
        if not ids or not all(type(one) is int and one >= 0 for one in ids):
            raise InvalidRequest("'prompt' is text, or a list of token ids", field="prompt")
        return ids


def sampling_fields(kind: Kind, body: JSON) -> JSON:
    """What each sample is asked with.

    Raises:
        InvalidRequest: A field cannot be obeyed over a fleet, and asks for something.
    """
    known = SAMPLING | OWN | (RENDERING if kind == "chat" else {"prompt", "add_special_tokens"})
    for name, value in body.items():
        if name in known or value is None or value is False or value in _IDLE.get(name, ()):
            continue
        raise InvalidRequest(
            f"'{name}' is not obeyed by a gateway beside a strategy: drop one of them", field=name
        )
    return {name: body[name] for name in SAMPLING if body.get(name) is not None}


def _looked_up(fields: JSON) -> Callable[[str], object]:
    """A field's value as vLLM will take it."""

    def asked(name: str) -> object:
        value = fields.get(name)
        if name == "stop" and value == "":
            return None
        if name == "structured_outputs" and value is None:
            form = as_object(fields.get("response_format")) or {}
            return None if form.get("type") in (None, "text") else form
        return value

    return asked


def _messages(body: JSON) -> list[Any]:
    """The conversation, of words alone."""
    messages = as_list(body.get("messages"))
    if not messages:
        raise InvalidRequest("'messages' is a list of messages", field="messages")
    for at, message in enumerate(messages):
        parts = as_list((as_object(message) or {}).get("content"))
        for part in parts or []:
            if not isinstance(part, str) and (as_object(part) or {}).get("type") not in _WORDS:
                raise InvalidRequest(
                    "a gateway searches for answers to words: pictures and sounds are not passed "
                    "on beside a strategy",
                    field=f"messages.{at}.content",
                )
    return messages


def _most_tokens(kind: Kind, body: JSON) -> int | None:
    if kind == "chat" and body.get("max_completion_tokens") is not None:
        return _integer(body, "max_completion_tokens", least=1)
    wanted = _integer(body, "max_tokens", least=1)
    return 16 if wanted is None and kind == "text" else wanted  # as OpenAI's


def _integer(body: JSON, name: str, *, least: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or (least is not None and value < least):
        above = "" if least is None else f" of {least} or more"
        raise InvalidRequest(f"'{name}' is a whole number{above}", field=name)
    return value


def _boolean(body: JSON, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise InvalidRequest(f"'{name}' is true or false", field=name)
    return bool(value)


def _digest(model: str, prompt: object) -> str:
    return blake2b(f"{model} {prompt}".encode(), digest_size=16).hexdigest()


def _head(answer: Answer, kind: str) -> JSON:
    prefix = "chatcmpl" if answer.kind == "chat" else "cmpl"
    return {
        "id": f"{prefix}-{answer.name.removeprefix('run-')}",
        "object": kind,
        "created": int(time.time()),
        "model": answer.model,
    }


def _usage(answer: Answer) -> JSON:
    """As vLLM says it; what was generated is counted by whoever completes the reply."""
    spent = usage_of(answer.selection)
    prompt, generated = len(answer.problem.token_ids), 0 if spent is None else spent.generated
    if isinstance(answer.engine, WordsEngine):
        prompt = answer.engine.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0 if spent is None else spent.answer_cached},
    }


def _ended(candidate: Candidate) -> str:
    return "length" if candidate.finish_reason == "step" else candidate.finish_reason


def _choice(kind: Kind, index: int, text: str, ended: str) -> JSON:
    said = {"message": {"role": "assistant", "content": text, "refusal": None}}
    shape: JSON = said if kind == "chat" else {"text": text}
    return {"index": index, **shape, "logprobs": None, "finish_reason": ended}


def _opened(index: int) -> JSON:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _piece(kind: Kind, index: int, text: str, ended: str | None) -> JSON:
    shape: JSON = {"delta": {"content": text} if text else {}} if kind == "chat" else {"text": text}
    return {"index": index, **shape, "logprobs": None, "finish_reason": ended}


def _event(chunk: JSON) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
