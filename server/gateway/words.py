"""An upstream that knows no token ids, as `Engine`: one chat completion a sample, in words.

What goes on from tokens, or by what a model thinks of them, is refused by name.
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, NoReturn, cast

from server.gateway.fleet import Fleet, Lost
from server.gateway.sequences import Sequences, Told, cached_tokens, choices, failure
from server.run import Selection
from server.search import searches_steps
from server.wire import JSON, as_object
from strategies.core.errors import EngineUnavailable, InvalidRequest
from strategies.core.types import Chunk, FinishReason, Generation, Labels, Turn

UNBOUNDED = 1 << 30
"""Tokens of a sample to which the upstream itself sets the limit."""

FIRST_PROMPT = 1 << 40
"""Stands for what the client asks; the numbers above it for further conversations."""

_TOKEN = 0
"""Stands for a token whose id nobody knows."""


def check_words(selection: Selection) -> None:
    """Refuse a search that goes on from tokens.

    Raises:
        InvalidRequest: It does.
    """
    if searches_steps(selection) or selection.strategy.rereads:
        _refuse(f"{selection.strategy.kind} goes on from the tokens of answers")


def _refuse(what: str) -> NoReturn:
    raise InvalidRequest(
        f"{what}, and this gateway's upstream gives words alone, as it is no vLLM server: choose a "
        "search of whole answers, and a verifier that reads words",
        field="strategy",
    )


class WordsEngine:
    """A chat model, for one request. A prompt's one token stands for a whole conversation."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        kind: str,
        model: str,
        fields: JSON,
        prompt: JSON,
        key: str | None,
        headers: Mapping[str, str],
        name: str,
    ) -> None:
        """`prompt` is the body's part that says what is asked; the first of the prompts."""
        self._chat = kind == "chat"
        self._model = model
        self._fields = fields
        self._prompts = [prompt]
        self.prompt_tokens = 0
        """Of the client's own prompt, once an upstream has counted them."""
        self._sequences = Sequences(
            fleet,
            path="/v1/chat/completions" if self._chat else "/v1/completions",
            model=model,
            key=key,
            headers=headers,
            name=name,
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`."""
        chunks = self._sequences.run(
            generation.index,
            self._body(generation),
            lambda told: self._read(told, generation),
            pieces=True,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def _body(self, generation: Generation) -> JSON:
        if generation.until is not None or generation.continues is not None:
            _refuse("this search goes on from the tokens of a step")
        if generation.labels or generation.logprobs is not None:
            _refuse("this goes by the probabilities of tokens")
        if generation.choices:
            _refuse("this makes the model choose among given words")
        if generation.adapter is not None:
            _refuse("this uses an adapter")
        place = generation.token_ids[0] - FIRST_PROMPT if len(generation.token_ids) == 1 else -1
        if not 0 <= place < len(self._prompts):
            _refuse("this search writes prompts of tokens")
        body = {} if generation.apart else dict(self._fields)
        body |= self._prompts[place] | {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if generation.max_tokens < UNBOUNDED:
            body["max_tokens"] = generation.max_tokens
        if generation.seed is not None:
            body["seed"] = generation.seed
        if generation.greedy:
            body["temperature"] = 0.0
        return body

    async def _read(self, told: Told, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """A sequence in pieces; its tokens are counted by the upstream, at the end.

        Of one that is broken off, each piece counts as a token.
        """
        ended: Any = None
        pieces = cached = 0
        counted: int | None = None
        prompt = 0
        try:
            async for event in told:
                if event is None:
                    ended = ended or "abort"
                    break
                if "error" in event:
                    raise failure(event)
                usage = as_object(event.get("usage")) or {}
                counted = _count(usage, "completion_tokens") or counted
                prompt = _count(usage, "prompt_tokens") or prompt
                cached = cached_tokens(event) or cached
                for choice in choices(event):
                    ended = choice.get("finish_reason") or ended
                    said = choice if not self._chat else as_object(choice.get("delta")) or {}
                    text = said.get("content" if self._chat else "text")
                    pieces += bool(text)
                    if text:
                        yield Chunk(text=str(text))
        except Lost:
            if ended is None:
                raise
        if ended is None:
            raise Lost("an upstream's stream ended in the midst of a sequence; try again")
        if ended not in ("stop", "length", "abort"):
            raise EngineUnavailable(f"an upstream ended a sample with '{ended}'")
        count = pieces if counted is None else counted
        if count > generation.max_tokens:
            raise EngineUnavailable("an upstream generated more than it was to")
        if generation.token_ids == (FIRST_PROMPT,):
            self.prompt_tokens = prompt or self.prompt_tokens
        yield Chunk(
            token_ids=(_TOKEN,) * count,
            finish_reason=cast(FinishReason, ended),
            prompt_tokens=prompt,
            cached_tokens=cached,
        )

    async def abort(self, indices: Collection[int]) -> None:
        """See `Sequences.abort`: the streams are closed."""
        await self._sequences.abort(indices)

    @property
    def longest(self) -> int:
        """The upstream says so itself."""
        return UNBOUNDED

    @property
    def ends(self) -> Sequence[int]:
        """A token that nobody knows."""
        return (_TOKEN,)

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """One token, which stands for the conversation."""
        if not self._chat:
            _refuse("this asks the model in a conversation")
        self._prompts.append({"messages": [asdict(turn) for turn in turns]})
        return (FIRST_PROMPT + len(self._prompts) - 1,)

    async def encode(self, text: str) -> tuple[int, ...]:
        """One token, which stands for them all."""
        return (_TOKEN,) if text else ()

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Refused."""
        _refuse("this search reads tokens")

    def labels(self, adapter: str) -> Labels:
        """Refused."""
        _refuse("this verifier reads tokens")

    async def tokens_with(self, text: str) -> Collection[int]:
        """Refused."""
        _refuse("this search ends steps by tokens")


def _count(usage: JSON, name: str) -> int | None:
    count = usage.get(name)
    return count if type(count) is int and count >= 0 else None
