"""One vLLM engine as `Engine`.

One sequence a call, token ids in and out, aborted when its reader leaves.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

from vllm.inputs import EngineInput, tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from strategies.core.errors import EngineUnavailable
from strategies.core.types import Chunk, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What a search needs of vLLM's `EngineClient`."""

    generate: Callable[..., AsyncGenerator[RequestOutput, None]]
    abort: Callable[[list[str]], Awaitable[None]]


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
        adapter: Callable[[str], LoRARequest],
        *,
        name: str,
        pieces: bool,
    ) -> None:
        """`name` is unique to the run; with `pieces` every token is told at once.

        Without, a sequence comes whole, which costs this process a fraction of the time.
        """
        self._client = client
        self._asked = asked
        self._adapter = adapter
        self._name = name
        self._kind = RequestOutputKind.DELTA if pieces else RequestOutputKind.FINAL_ONLY
        self._ended: set[int] = set()
        self._prompt_ids = tuple(cast(list[int], asked.prompt.get("prompt_token_ids")))
        self.outputs: dict[int, RequestOutput] = {}
        """By index of the sequence, what vLLM has given of it so far, merged."""
        self.latest: dict[int, RequestOutput] = {}
        """By index, the piece behind the last chunk."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. vLLM's own client errors pass through: they carry their status."""
        if generation.index in self._ended:
            yield Chunk(finish_reason="abort")
            return
        params = self._params(generation)
        prompt = self._asked.prompt
        if generation.token_ids != self._prompt_ids:
            prompt = tokens_input(list(generation.token_ids))
        options = dict(self._asked.options)
        options["priority"] = options.get("priority", 0) + generation.priority
        if generation.adapter is not None:
            options["lora_request"] = self._adapter(generation.adapter)
        sequence = self._client.generate(prompt, params, self._id(generation.index), **options)
        try:
            async with aclosing(sequence) as pieces:
                async for piece in pieces:
                    yield self._chunk(generation, piece)
        except EngineDeadError as error:
            raise EngineUnavailable(
                "the engine died; a new one is being started, try again"
            ) from error

    async def abort(self, indices: Collection[int]) -> None:
        """See `Engine.abort`."""
        self._ended |= set(indices)
        with suppress(EngineDeadError):  # then the readers know already
            await self._client.abort([self._id(index) for index in indices])

    def _id(self, index: int) -> str:
        return f"{self._name}-{index}"

    def _params(self, generation: Generation) -> SamplingParams:
        asked = self._asked.params
        params = asked.clone()
        params.n = 1
        params.output_kind = self._kind
        params.max_tokens = generation.max_tokens
        params.seed = generation.seed
        if generation.logprobs is not None and params.logprobs != -1:
            params.logprobs = max(params.logprobs or 0, generation.logprobs)
        if generation.stop:
            own = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
            params.stop = [*own, *generation.stop]
            params.include_stop_str_in_output = True
        return params

    def _chunk(self, generation: Generation, piece: RequestOutput) -> Chunk:
        output = piece.outputs[0]
        self._keep(generation.index, piece)
        logprobs: tuple[float, ...] = ()
        pieces: tuple[str, ...] = ()
        top: tuple[tuple[float, ...], ...] = ()
        if generation.logprobs is not None and output.logprobs is not None:
            at_each = cast(list[dict[int, Logprob]], output.logprobs)
            chosen = [at[token] for at, token in zip(at_each, output.token_ids, strict=True)]
            logprobs = tuple(one.logprob for one in chosen)
            pieces = tuple(one.decoded_token or "" for one in chosen)
            if generation.logprobs > 0:
                top = tuple(
                    tuple(
                        one.logprob for one in at.values() if (one.rank or 0) <= generation.logprobs
                    )
                    for at in at_each
                )
        return Chunk(
            text=output.text,
            token_ids=tuple(output.token_ids),
            logprobs=logprobs,
            pieces=pieces,
            top_logprobs=top,
            finish_reason=_finish(output.finish_reason),
            # A sequence that was aborted before its first token never had its prompt computed.
            prompt_tokens=len(piece.prompt_token_ids or ()) if output.token_ids else 0,
            cached_tokens=piece.num_cached_tokens or 0,
        )

    def _keep(self, index: int, piece: RequestOutput) -> None:
        self.latest[index] = piece
        known = self.outputs.get(index)
        if known is None:
            # A copy of its own: merging must not change the piece that a stream sends on.
            self.outputs[index] = twin(piece)
        else:
            known.add(piece, aggregate=True)


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
