"""An upstream without a network: vLLM's routes over the shipped fake engine, for httpx."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx

from strategies.core.testing import FakeEngine
from strategies.core.types import Chunk, Generation

MODEL = "fake"


class Stream(httpx.AsyncByteStream):
    """A reply's body as a generator makes it."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self._source = source

    async def __aiter__(self):
        async for piece in self._source:
            yield piece

    async def aclose(self) -> None:
        await self._source.aclose()


class FakeUpstream(httpx.AsyncBaseTransport):
    """Knows the generation behind a request by its name where tests tell it, else by the body.

    `before` is called with the path of every request, and may raise or reply in its place; what
    `spoil` makes of a stream is what the gateway hears.
    """

    def __init__(
        self,
        engine: FakeEngine,
        *,
        aborts: bool = True,
        tokens: bool = True,
        before: Callable[[httpx.Request], Awaitable[httpx.Response | None]] | None = None,
        spoil: Callable[[AsyncGenerator[bytes, None]], AsyncGenerator[bytes, None]] | None = None,
    ) -> None:
        self.engine = engine
        self.aborts = aborts
        self.tokens = tokens
        self.before = before
        self.spoil = spoil
        self.generations: dict[str, Generation] = {}
        self.requests: list[httpx.Request] = []

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was asked of a path."""
        return [json.loads(one.content) for one in self.requests if one.url.path == path]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append(request)
        if self.before is not None and (reply := await self.before(request)) is not None:
            return reply
        body = json.loads(request.content) if request.content else {}
        match request.url.path:
            case "/v1/models":
                return _json({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            case "/tokenize" if self.tokens:
                text = body.get("prompt") or json.dumps(body.get("messages"))
                ids = list(await self.engine.encode(text))
                return _json({"tokens": ids, "count": len(ids), "max_model_len": 10_000})
            case "/detokenize" if self.tokens:
                return _json({"prompt": await self.engine.decode(body["tokens"])})
            case "/inference/v1/abort_requests" if self.aborts:
                await self.engine.abort([_index(name) for name in body["request_ids"]])
                return _json({})
            case "/v1/chat/completions" if not self.tokens:
                index = _index(request.headers["x-request-id"])
                return httpx.Response(200, stream=Stream(self._words(index, body)))
            case "/v1/completions" if not body.get("stream"):
                ended = {"token_ids": [1, *self.engine.ends], "finish_reason": "stop"}
                return _json({"choices": [ended]})
            case "/v1/completions":
                source = self._events(body)
                if self.spoil is not None:
                    source = self.spoil(source)
                return httpx.Response(200, stream=Stream(source))
            case _:
                return _json({"error": {"message": "no such route", "code": 404}}, 404)

    async def _words(self, index: int, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        assert not {"return_token_ids", "logprobs", "stop_token_ids"} & body.keys()
        most = body.get("max_tokens", 1000)
        generation = Generation(index=index, token_ids=(), max_tokens=most, seed=body.get("seed"))
        count = 0
        async with aclosing(self.engine.generate(generation)) as chunks:
            async for chunk in chunks:
                count += len(chunk.token_ids)
                delta = {"content": chunk.text}
                choice = {"index": 0, "delta": delta, "finish_reason": chunk.finish_reason}
                yield _event({"choices": [choice]})
        usage = {"prompt_tokens": 5, "completion_tokens": count}
        yield _event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        name = body["request_id"]
        generation = self.generations.get(name) or Generation(
            index=_index(name),
            token_ids=tuple(body["prompt"]),
            max_tokens=body["max_tokens"],
            seed=body.get("seed"),
            logprobs=body.get("logprobs"),
        )
        assert body["prompt"] == list(generation.token_ids)
        assert body["max_tokens"] == generation.max_tokens
        assert body["stream"]
        assert body.get("seed") == generation.seed
        async with aclosing(self.engine.generate(generation)) as chunks:
            async for chunk in chunks:
                yield _event({"choices": [_choice(chunk, generation, body)]})
        yield _event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 0}}})
        yield b"data: [DONE]\n\n"


def _choice(chunk: Chunk, generation: Generation, body: dict[str, Any]) -> dict[str, Any]:
    by_id = body.get("return_tokens_as_token_ids")
    logprobs: dict[str, Any] | None = None
    if generation.labels:
        at = zip(generation.labels, chunk.label_logprobs, strict=True)
        top = {f"token_id:{token}": logprob for token, logprob in at}
        logprobs = {"token_logprobs": [-1.0], "tokens": ["token_id:0"], "top_logprobs": [top]}
    elif generation.logprobs is not None:
        tops = zip(chunk.top_token_ids, chunk.top_logprobs, strict=True)
        logprobs = {
            "token_logprobs": list(chunk.logprobs),
            "tokens": [f"token_id:{one}" for one in chunk.token_ids] if by_id else chunk.pieces,
            "top_logprobs": [
                {f"token_id:{one}": of for one, of in zip(ids, likely, strict=True)}
                for ids, likely in tops
            ],
        }
    ended = chunk.finish_reason
    return {
        "index": 0,
        "text": chunk.text,
        "token_ids": list(chunk.token_ids),
        "logprobs": logprobs,
        "finish_reason": "stop" if ended == "step" else ended,
        "stop_reason": generation.until if ended == "step" else None,
    }


def _index(name: str) -> int:
    """Of the sequence, in `RUN-INDEX` or `cmpl-RUN-INDEX-0`."""
    rest = name.removeprefix("cmpl-").removesuffix("-0") if name.startswith("cmpl-") else name
    run, _, number = rest.rpartition("-")
    return -int(number) if run.endswith("-") else int(number)


def _event(said: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(said)}\n\n".encode()


def _json(said: dict[str, Any], status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=said)


async def never() -> None:
    """Hang."""
    await asyncio.Event().wait()
