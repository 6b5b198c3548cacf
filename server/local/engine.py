"""One vLLM engine as `Engine`.

One sequence a call, token ids in and out, aborted when its reader leaves.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from vllm.inputs import EngineInput, tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from server.adapters.manifest import MANIFEST, LabelTokens, read_manifest
from server.tracing import TRACEPARENT, below, call
from strategies.core.errors import EngineUnavailable, InvalidRequest
from strategies.core.types import Candidate, Chunk, Generation, Labels, Turn

MOST_ENDS = 8192
"""Tokens that may end a step: vLLM looks through them at every token."""

_KEPT = 64
"""Delimiters whose tokens are remembered."""


class Adapter(Protocol):
    """The loaded adapter of a name; None for the base model's own."""

    def __call__(self, name: str, field: str = "verifier.adapter") -> LoRARequest | None:
        """It raises `InvalidRequest` about the field if nothing has that name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What a search needs of vLLM's `EngineClient`."""

    generate: Callable[..., AsyncGenerator[RequestOutput, None]]
    abort: Callable[[list[str]], Awaitable[None]]
    render: Callable[[list[dict[str, Any]]], Awaitable[tuple[int, ...]]]
    """A conversation as the model reads it."""
    vocabulary: "Vocabulary"
    judges: "Judges"
    longest: int
    """Tokens that a prompt may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as vLLM's handler put it to the engine."""

    prompt: EngineInput
    params: SamplingParams
    request_id: str
    options: dict[str, Any]
    """The remaining keyword arguments of `generate`: adapter, trace headers, priority and so on."""


class LocalEngine:
    """vLLM in this process, for one request: every sample inherits what the client asked."""

    def __init__(
        self,
        client: Client,
        asked: Asked,
        adapter: Adapter,
        *,
        name: str,
        pieces: bool,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """`name` is unique to the run; with `pieces` every token is told at once.

        `versions` are what the names of adapters mean in this run. Without `pieces`, a sequence
        comes whole, which costs this process a fraction of the time.
        """
        self._client = client
        self._asked = asked
        self._adapter = adapter
        self._name = name
        self._versions = versions or {}
        self._kind = RequestOutputKind.DELTA if pieces else RequestOutputKind.FINAL_ONLY
        self._ended: set[int] = set()
        self._prompt_ids = tuple(cast(list[int], asked.prompt.get("prompt_token_ids")))
        self._continues: dict[int, int] = {}
        self.outputs: dict[int, RequestOutput] = {}
        """By index of the sequence, what vLLM has given of it so far, merged."""
        self.latest: dict[int, RequestOutput] = {}
        """By index, the piece behind the last chunk."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. vLLM's own client errors pass through: they carry their status."""
        if generation.index in self._ended:
            yield Chunk(finish_reason="abort")
            return
        if generation.apart:
            async with aclosing(self._apart(generation)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        ends: Collection[int] = ()
        if generation.until is not None:
            ends = await self.tokens_with(generation.until)
            if generation.index in self._ended:  # meanwhile
                yield Chunk(finish_reason="abort")
                return
        if generation.continues is not None:
            self._continues[generation.index] = generation.continues
        async with aclosing(self._pieces(generation, self._params(generation, ends))) as pieces:
            async for piece in pieces:
                yield self._chunk(generation, piece, ends)

    async def _pieces(
        self, generation: Generation, params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        prompt = self._asked.prompt
        if generation.token_ids != self._prompt_ids:
            salt = cast(str | None, prompt.get("cache_salt"))
            prompt = tokens_input(list(generation.token_ids), cache_salt=salt)
        options = dict(self._asked.options)
        options["priority"] = options.get("priority", 0) + generation.priority
        if generation.adapter is not None:
            options["lora_request"] = self._adapter(self._version(generation.adapter))
        name = call(self._name, generation.index)
        known: dict[str, str] = options.get("trace_headers") or {}
        if TRACEPARENT in known:  # vLLM makes spans, so its own are below ours
            options["trace_headers"] = {**known, **below(known[TRACEPARENT], name)}
        sequence = self._client.generate(prompt, params, name, **options)
        try:
            async with aclosing(sequence) as pieces:
                async for piece in pieces:
                    yield piece
        except EngineDeadError as error:
            raise EngineUnavailable(
                "the engine died; a new one is being started, try again"
            ) from error

    async def abort(self, indices: Collection[int]) -> None:
        """See `Engine.abort`."""
        self._ended |= set(indices)
        with suppress(EngineDeadError):  # then the readers know already
            await self._client.abort([call(self._name, index) for index in indices])

    async def _apart(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """A sequence of which nothing is kept for the answer."""
        params = SamplingParams(
            max_tokens=generation.max_tokens,
            temperature=0.0 if generation.greedy or generation.labels else 1.0,
            seed=generation.seed,
            detokenize=not generation.labels,
            logprob_token_ids=list(generation.labels) or None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if generation.choices:
            params.structured_outputs = StructuredOutputsParams(choice=list(generation.choices))
        async with aclosing(self._pieces(generation, params)) as pieces:
            async for piece in pieces:
                output = piece.outputs[0]
                at = cast(list[dict[int, Logprob]], output.logprobs or [{}])[0]
                yield Chunk(
                    text=output.text,
                    token_ids=tuple(output.token_ids),
                    label_logprobs=tuple(at[one].logprob for one in generation.labels if one in at),
                    finish_reason=_finish(output.finish_reason),
                    prompt_tokens=len(piece.prompt_token_ids or ()) if output.token_ids else 0,
                    cached_tokens=piece.num_cached_tokens or 0,
                )

    @property
    def ends(self) -> Sequence[int]:
        """See `Engine.ends`; the client's own stop tokens are among them."""
        return (*self._client.vocabulary.ends, *(self._asked.params.stop_token_ids or ()))

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """See `Engine.render`."""
        return await self._client.render([asdict(turn) for turn in turns])

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await self._client.vocabulary.encode(text)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        special = self._asked.params.skip_special_tokens
        return await self._client.vocabulary.decode(token_ids, skip_special_tokens=special)

    def labels(self, adapter: str) -> Labels:
        """See `Engine.labels`."""
        return self._client.judges.labels(self._version(adapter))

    def _version(self, adapter: str) -> str:
        return self._versions.get(adapter, adapter)

    @property
    def longest(self) -> int:
        """See `Engine.longest`."""
        return self._client.longest

    async def tokens_with(self, text: str) -> Collection[int]:
        """See `Engine.tokens_with`."""
        return await self._client.vocabulary.tokens_with(text)

    def whole(self, index: int) -> RequestOutput:
        """A sequence and what it goes on with, as one output: a copy."""
        path = [index]
        while self._continues.get(path[-1]) in self.outputs:
            path.append(self._continues[path[-1]])
        merged, *others = (twin(self.outputs[at]) for at in reversed(path))
        merged.prompt_token_ids = list(self._prompt_ids)
        [output] = merged.outputs
        for other in others:
            before = output.cumulative_logprob
            merged.add(other, aggregate=True)
            if before is not None and output.cumulative_logprob is not None:
                output.cumulative_logprob += before
            output.finish_reason = other.outputs[0].finish_reason
            output.stop_reason = other.outputs[0].stop_reason
            merged.num_cached_tokens = other.num_cached_tokens
        return merged

    def answer(self, candidate: Candidate) -> RequestOutput:
        """A candidate as an output: a copy."""
        if candidate.index in self.outputs:
            merged = self.whole(candidate.index)
        else:
            merged = RequestOutput(
                request_id="",
                prompt=None,
                prompt_token_ids=list(self._prompt_ids),
                prompt_logprobs=None,
                outputs=[
                    CompletionOutput(
                        index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None
                    )
                ],
                finished=True,
            )
        [output] = merged.outputs
        output.text = candidate.text
        if tuple(output.token_ids) != candidate.token_ids:  # chosen from what was likely
            output.token_ids = list(candidate.token_ids)
            output.cumulative_logprob = sum(candidate.logprobs)
        if candidate.inherited:
            output.stop_reason = None
        cut = candidate.finish_reason == "step"  # by the end of the search, not by a step's
        output.finish_reason = "length" if cut else candidate.finish_reason
        return merged

    def _params(self, generation: Generation, ends: Collection[int]) -> SamplingParams:
        asked = self._asked.params
        params = asked.clone()
        params.n = 1
        params.output_kind = RequestOutputKind.DELTA if generation.piecewise else self._kind
        params.max_tokens = generation.max_tokens
        params.seed = generation.seed
        known = params.logprob_token_ids and generation.logprobs == 0  # with each token's own
        if generation.logprobs is not None and params.logprobs != -1 and not known:
            params.logprobs = max(params.logprobs or 0, generation.logprobs)
        if generation.greedy:
            params.temperature, params.top_p, params.top_k, params.min_p = 0.0, 1.0, 0, 0.0
        if generation.until is not None:
            params.stop_token_ids = [*(params.stop_token_ids or ()), *ends]
            if len(generation.until.encode()) > 1:  # it may be spread over several tokens
                params.stop = [generation.until]
        return params

    def _chunk(self, generation: Generation, piece: RequestOutput, ends: Collection[int]) -> Chunk:
        output, asked = piece.outputs[0], self._asked.params
        finish = _finish(output.finish_reason)
        if finish == "stop" and generation.until is not None:
            reason, own = output.stop_reason, asked.stop_token_ids or ()
            if reason == generation.until or (reason in ends and reason not in own):
                finish = "step"
        self._keep(generation.index, piece)
        logprobs: tuple[float, ...] = ()
        pieces: tuple[str, ...] = ()
        top: tuple[tuple[tuple[int, float], ...], ...] = ()
        wanted = generation.logprobs is not None or not asked.logprob_token_ids
        if wanted and output.logprobs is not None:
            at_each = cast(list[dict[int, Logprob]], output.logprobs)
            chosen = [at[token] for at, token in zip(at_each, output.token_ids, strict=True)]
            logprobs = tuple(one.logprob for one in chosen)
            pieces = tuple(one.decoded_token or "" for one in chosen)
            if generation.logprobs:
                top = tuple(
                    tuple(
                        (token, one.logprob)
                        for token, one in at.items()
                        if (one.rank or 0) <= generation.logprobs
                    )
                    for at in at_each
                )
        return Chunk(
            # vLLM begins to spell with the end of the prompt, so a step's text may have some of it.
            text="" if generation.until or generation.continues is not None else output.text,
            token_ids=tuple(output.token_ids),
            logprobs=logprobs,
            pieces=pieces,
            top_logprobs=tuple(tuple(logprob for _, logprob in at) for at in top),
            top_token_ids=tuple(tuple(token for token, _ in at) for at in top),
            finish_reason=finish,
            # A sequence that was aborted before its first token never had its prompt computed.
            prompt_tokens=len(piece.prompt_token_ids or ()) if output.token_ids else 0,
            cached_tokens=piece.num_cached_tokens or 0,
        )

    def _keep(self, index: int, piece: RequestOutput) -> None:
        known = self.outputs.get(index)
        self.latest[index] = piece
        if known is None:
            # A copy of its own: merging must not change the piece that a stream sends on.
            self.outputs[index] = twin(piece)
            if index in self._continues:
                self.outputs[index].prompt_token_ids = None  # long, and told by the first step's
                del self.latest[index]
        else:
            known.add(piece, aggregate=True)


class Vocabulary:
    """What the model's tokens say."""

    def __init__(self, tokenizer: Callable[[], Any], ends: Sequence[int]) -> None:
        """`ends` are the tokens with which the model ends a sequence, the usual one first."""
        self.ends = ends
        self._tokenizer = tokenizer
        self._searching = asyncio.Lock()
        self._words: list[str] | None = None
        self._found: dict[str, frozenset[int]] = {}

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Engine.encode`."""
        ids = await asyncio.to_thread(self._tokenizer().encode, text, add_special_tokens=False)
        return tuple(ids)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See `Engine.decode`."""
        return await asyncio.to_thread(
            self._tokenizer().decode, list(token_ids), skip_special_tokens=skip_special_tokens
        )

    async def tokens_with(self, text: str) -> frozenset[int]:
        """See `Engine.tokens_with`."""
        async with self._searching:
            if text not in self._found:
                if len(self._found) == _KEPT:
                    del self._found[next(iter(self._found))]
                self._found[text] = await asyncio.to_thread(self._search, text)
            found = self._found[text]
        if len(found) > MOST_ENDS:
            raise InvalidRequest(
                f"{len(found)} tokens of the model hold {text!r}; choose a delimiter that "
                f"{MOST_ENDS} hold at most",
                field="strategy.delimiter",
            )
        return found

    def _search(self, text: str) -> frozenset[int]:
        words = self._words
        if words is None:
            tokenizer = self._tokenizer()
            words = self._words = tokenizer.batch_decode([[at] for at in range(len(tokenizer))])
        return frozenset(at for at, word in enumerate(words) if text in word)


class Judges:
    """The labels of the adapters that judge, read from their folders as they are asked for."""

    def __init__(self, adapter: Adapter, tokenizer: Callable[[], Any]) -> None:
        self._adapter = adapter
        self._tokenizer = tokenizer
        self._known: dict[str, Labels] = {}
        """By folder: an adapter's files do not change."""

    def labels(self, name: str) -> Labels:
        """See `Engine.labels`; a short file is read, once."""
        adapter = self._adapter(name)
        if adapter is None:
            raise InvalidRequest(f"'{name}' is the base model", field="verifier.adapter")
        folder = adapter.path
        if folder not in self._known:
            self._known[folder] = self._read(name, folder)
        return self._known[folder]

    def _read(self, name: str, folder: str) -> Labels:
        manifest = read_manifest(Path(folder))
        judging = None if manifest is None else manifest.judging
        if judging is None:
            raise InvalidRequest(
                f"adapter '{name}' does not judge: it has no {MANIFEST} that says how",
                field="verifier.adapter",
            )
        tokenizer = self._tokenizer()
        good, bad = token_ids(tokenizer, judging.labels)
        opening = None
        if judging.opening is not None:
            answers, verdicts = (
                tuple(tokenizer.encode(text, add_special_tokens=False))
                for text in (judging.opening.answers, judging.opening.verdicts)
            )
            opening = (answers, verdicts)
        return Labels(good=good, bad=bad, delimiter=judging.delimiter, opening=opening)


def token_ids(tokenizer: Any, labels: LabelTokens) -> tuple[int, int]:
    """The ids of a verifier's labels.

    Raises:
        InvalidRequest: One is no token of the model.
    """
    good, bad = (tokenizer.convert_tokens_to_ids(token) for token in (labels.good, labels.bad))
    if None in (good, bad) or tokenizer.unk_token_id in (good, bad):
        raise InvalidRequest(
            f"the labels of the verifier, '{labels.good}' and '{labels.bad}', are no tokens of "
            "the model",
            field="verifier.adapter",
        )
    return good, bad


def twin(piece: RequestOutput) -> RequestOutput:
    """A copy that can grow, or be dressed for the client, without changing the original."""
    output = copy(piece.outputs[0])
    output.token_ids = list(output.token_ids)
    output.logprobs = copy(output.logprobs)
    other = copy(piece)
    other.outputs = [output]
    return other


def _finish(reason: str | None) -> Any:
    """Take over vLLM's reason, but for its errors, which never pass as an answer."""
    if reason not in (None, "stop", "length", "repetition", "abort"):
        raise EngineUnavailable(f"the engine ended a sample with '{reason}'")
    return reason
