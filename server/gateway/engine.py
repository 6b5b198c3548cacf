"""An upstream's model as `Engine`: one streamed `/v1/completions` a sequence, by token ids."""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from server.gateway.fleet import Fleet, Lost
from server.gateway.sequences import Sequences, Told, cached_tokens, choices, failure
from server.gateway.vocabulary import Vocabulary
from server.wire import JSON, as_list, as_object
from strategies.core.errors import EngineUnavailable, InvalidRequest
from strategies.core.types import Chunk, FinishReason, Generation, Labels, Turn

_PLAIN: JSON = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What leaves the model's probabilities alone, whatever its server's defaults."""

_GREEDY: JSON = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as its samples are to be drawn."""

    model: str
    fields: JSON
    """Of `/v1/completions`: what the client asked of each sample."""
    key: str | None
    """What the request belongs to: its upstream follows."""
    headers: Mapping[str, str]
    """For the upstream."""
    labels: Mapping[str, Labels] = field(default_factory=dict[str, Labels])
    """By the name of an adapter that judges."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the names of adapters mean in this request."""


class RemoteEngine:
    """An upstream's model, for one request. Siblings stay together while their upstream is well."""

    def __init__(
        self, fleet: Fleet, vocabulary: Vocabulary, asked: Asked, *, name: str, pieces: bool
    ) -> None:
        """`name` is unique to the run; with `pieces` every token is told at once."""
        self._fleet = fleet
        self._vocabulary = vocabulary
        self._asked = asked
        self._name = name
        self._pieces = pieces
        self._sequences = Sequences(
            fleet,
            path="/v1/completions",
            model=asked.model,
            key=asked.key,
            headers=asked.headers,
            name=name,
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`."""
        ends: Collection[int] = ()
        words: Sequence[str] = ()
        if generation.until is not None:
            ends = await self.tokens_with(generation.until)
        if generation.logprobs:
            words = await self._vocabulary.words(self._asked.headers)
        chunks = self._sequences.run(
            generation.index,
            self._body(generation, ends),
            lambda told: self._read(told, generation, ends, words),
            pieces=self._pieces or generation.piecewise,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def _read(
        self,
        told: Told,
        generation: Generation,
        ends: Collection[int],
        words: Sequence[str],
    ) -> AsyncGenerator[Chunk, None]:
        """A sequence in chunks; the last one waits for what the reply says of the prompt."""
        last: Chunk | None = None
        count = cached = 0
        broken = False
        try:
            async for event in told:
                if event is None:
                    broken = True
                    break
                if "error" in event:
                    raise failure(event)
                cached = cached_tokens(event) or cached
                for choice in choices(event):
                    if last is not None:
                        raise EngineUnavailable("an upstream went on after the end of a sequence")
                    chunk = self._chunk(choice, generation, ends, words)
                    count += len(chunk.token_ids)
                    if count > generation.max_tokens:
                        raise EngineUnavailable("an upstream generated more than it was to")
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        last = chunk
        except Lost:
            if last is None:  # else only what it says of the prompt is missing
                raise
        if last is None:
            if not broken:
                raise Lost("an upstream's stream ended in the midst of a sequence; try again")
            last = Chunk(finish_reason="abort")
        prompt = len(generation.token_ids) if count else 0
        yield replace(last, prompt_tokens=prompt, cached_tokens=cached)

    def _body(self, generation: Generation, ends: Collection[int]) -> JSON:
        asked = self._asked
        body: JSON = {} if generation.apart else dict(asked.fields)
        if generation.apart:
            body |= _PLAIN
        if generation.greedy or generation.labels:
            body |= _GREEDY
        adapter = generation.adapter
        body |= {
            "model": asked.model if adapter is None else asked.versions.get(adapter, adapter),
            "prompt": list(generation.token_ids),
            "max_tokens": generation.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "request_id": f"{self._name}-{generation.index}",
        }
        if generation.seed is not None:
            body["seed"] = generation.seed
        if generation.until is not None:
            body["stop_token_ids"] = [*(body.get("stop_token_ids") or ()), *ends]
            if len(generation.until.encode()) > 1:  # it may be spread over several tokens
                body["stop"] = [generation.until]
        if generation.logprobs is not None:
            body["logprobs"] = generation.logprobs
            body["return_tokens_as_token_ids"] = generation.logprobs > 0
        if generation.labels:
            body["logprobs"] = 0
            body["logprob_token_ids"] = list(generation.labels)
            body["return_tokens_as_token_ids"] = True
        if generation.choices:
            body["structured_outputs"] = {"choice": list(generation.choices)}
        return body

    def _chunk(
        self, choice: JSON, generation: Generation, ends: Collection[int], words: Sequence[str]
    ) -> Chunk:
        ids, text = as_list(choice.get("token_ids")), choice.get("text")
        if ids is None or not all(type(one) is int for one in ids) or not isinstance(text, str):
            raise EngineUnavailable("an upstream's piece has no tokens; it is no vLLM server")
        finish = self._finish(choice, generation, ends, ids)
        at_each = as_object(choice.get("logprobs")) or {}
        logprobs: tuple[float, ...] = ()
        pieces: tuple[str, ...] = ()
        top: list[list[tuple[int, float]]] = []
        likely: tuple[float, ...] = ()
        try:
            tops = [_by_id(one) for one in at_each.get("top_logprobs") or ()]
            if generation.labels:
                first = dict(tops[0]) if tops else {}
                likely = tuple(first[one] for one in generation.labels if one in first)
            elif generation.logprobs is not None:
                logprobs = tuple(map(float, at_each.get("token_logprobs") or ()))
                if generation.logprobs == 0:
                    pieces = tuple(map(str, at_each.get("tokens") or ()))
                else:
                    pieces = tuple(str(words[one]) if one < len(words) else "" for one in ids)
                    top = [_likeliest(one, generation.logprobs) for one in tops]
                if not len(logprobs) == len(pieces) == len(ids):
                    raise ValueError("not as many as tokens")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise EngineUnavailable("an upstream's log-probabilities cannot be read") from error
        return Chunk(
            text="" if generation.until or generation.continues is not None else text,
            token_ids=tuple(ids),
            logprobs=logprobs,
            pieces=pieces,
            top_logprobs=tuple(tuple(logprob for _, logprob in one) for one in top),
            top_token_ids=tuple(tuple(token for token, _ in one) for one in top),
            label_logprobs=likely,
            finish_reason=finish,
        )

    def _finish(
        self, choice: JSON, generation: Generation, ends: Collection[int], ids: Sequence[int]
    ) -> FinishReason | None:
        """Why a sequence ended, if it did; an end that was not known is learned."""
        said: Any = choice.get("finish_reason")
        if said not in (None, "stop", "length", "repetition", "abort"):
            raise EngineUnavailable(f"an upstream ended a sample with '{said}'")
        if said != "stop":
            return cast(FinishReason | None, said)
        reason = choice.get("stop_reason")
        own: Sequence[int] = self._asked.fields.get("stop_token_ids") or ()
        if generation.until is not None and (
            reason == generation.until or (reason in ends and reason not in own)
        ):
            return "step"
        if not generation.apart and ids and reason in (None, ids[-1]) and ids[-1] not in own:
            self._vocabulary.learn(ids[-1])
        return "stop"

    async def abort(self, indices: Collection[int]) -> None:
        """See `Engine.abort`, and `Sequences.abort`."""
        await self._sequences.abort(indices)

    @property
    def longest(self) -> int:
        """See `Engine.longest`."""
        return self._fleet.longest

    @property
    def ends(self) -> Sequence[int]:
        """See `Engine.ends`; the client's own stop tokens are among them."""
        own: Sequence[int] = self._asked.fields.get("stop_token_ids") or ()
        return (self._vocabulary.usual_end, *self._vocabulary.ends[1:], *own)

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """See `Engine.render`."""
        body = {"model": self._asked.model, "messages": [asdict(turn) for turn in turns]}
        ids = await self._vocabulary.prompt(body, self._asked.headers, self._asked.key)
        if len(ids) > self.longest:
            raise InvalidRequest(
                f"the conversation has {len(ids)} tokens; the model reads {self.longest}"
            )
        return tuple(ids)

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await self._vocabulary.encode(text, self._asked.headers)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """See `Engine.decode`; ends of sequences are not spelled unless the client wants them."""
        if self._asked.fields.get("skip_special_tokens", True):
            token_ids = [one for one in token_ids if one not in self._vocabulary.ends]
        return await self._vocabulary.decode(token_ids, self._asked.headers) if token_ids else ""

    def labels(self, adapter: str) -> Labels:
        """See `Engine.labels`."""
        return self._asked.labels[adapter]

    async def tokens_with(self, text: str) -> Collection[int]:
        """See `Engine.tokens_with`."""
        return await self._vocabulary.tokens_with(text, self._asked.headers)


def _by_id(top: Any) -> list[tuple[int, float]]:
    """Tokens, as `token_id:N`, with their log-probabilities."""
    return [
        (int(name.removeprefix("token_id:")), float(logprob))
        for name, logprob in (as_object(top) or {}).items()
        if name.startswith("token_id:")
    ]


def _likeliest(top: list[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    """The k likeliest of them, in the order given; the chosen token may be one more."""
    if len(top) <= k:
        return top
    least = sorted((logprob for _, logprob in top), reverse=True)[k - 1]
    found = [(token, logprob) for token, logprob in top if logprob >= least]
    while len(found) > k:  # a tie
        found.pop()
    return found
