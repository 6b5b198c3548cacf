"""vLLM's serving objects, as our routes and searches use them."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import (
    with_cancellation,  # pyright: ignore[reportUnknownVariableType]
)
from vllm.exceptions import GracefulHTTPError, VLLMClientError

from server.errors import refusal
from server.selection import SELECTION
from strategies.core.errors import InvalidRequest
from strategies.core.types import Reading


def teach(serving: Any, make: str) -> None:
    """Let a search read each sample as vLLM will read the winner.

    `make` names the method of a serving object that makes a request's parser, which tells reasoning
    and tool calls from content. Parsers keep state, so each sample gets a new one.
    """
    parser = getattr(serving, make)

    def made(request: Any, *args: Any, **kwargs: Any) -> Any:
        selection, fresh = SELECTION.get(), partial(parser, request, *args, **kwargs)
        first = fresh()
        if selection is not None and first is not None:
            selection.read = partial(_read, fresh, request, serving.enable_auto_tools)
        return first

    setattr(serving, make, made)


def _read(
    fresh: Callable[[], Any], request: Any, tools: bool, text: str, token_ids: Sequence[int]
) -> Reading:
    _, content, calls = fresh().parse(
        text, request, enable_auto_tools=tools, model_output_token_ids=list(token_ids)
    )
    if calls:
        return Reading(call=canonical(calls), content="")
    forced = getattr(request, "tool_choice", None) not in (None, "none", "auto")
    return Reading(call=None, content="" if forced else content or "")


def canonical(calls: Sequence[Any]) -> str:
    """Tool calls in one spelling: names and arguments, whatever their order and white space."""
    read = [{"name": call.name, "arguments": _arguments(call.arguments)} for call in calls]
    spelled = sorted(json.dumps(one, sort_keys=True, ensure_ascii=False) for one in read)
    return f"[{', '.join(spelled)}]"


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def render(serving: Any, messages: list[dict[str, Any]]) -> tuple[int, ...]:
    """A conversation as the model reads it, by vLLM's own template and limits.

    Raises:
        InvalidRequest: vLLM refuses it.
    """
    request = ChatCompletionRequest.model_validate({"messages": messages})
    try:
        rendered: Any = await serving.render_chat_request(request)
    except VLLMClientError as error:
        raise InvalidRequest(str(error)) from error
    if isinstance(rendered, ErrorResponse):
        raise InvalidRequest(rendered.error.message)
    _, [prompt] = rendered
    return tuple(prompt["prompt_token_ids"])


class Chat:
    """Chat completions without HTTP in between."""

    fields = frozenset(ChatCompletionRequest.model_fields)
    """What a chat request may hold."""

    def read(self, body: dict[str, Any]) -> ChatCompletionRequest:
        """A body as vLLM reads it.

        Raises:
            InvalidRequest: It is no chat request.
        """
        try:
            return ChatCompletionRequest.model_validate(body)
        except ValidationError as error:
            raise refusal(error, inside="") from error

    async def complete(
        self, body: dict[str, Any], raw_request: Request, *, watch: bool
    ) -> dict[str, Any] | JSONResponse:
        """A whole reply as JSON, or vLLM's refusal. With `watch`, a client that leaves aborts it.

        Raises:
            InvalidRequest: The body is no chat request.
        """
        request = self.read(body)
        try:
            reply: Any = await (_watched if watch else _complete)(request, raw_request)
        except (VLLMClientError, GracefulHTTPError) as error:
            reply = create_error_response(error)
        if isinstance(reply, ChatCompletionResponse):
            return reply.model_dump()
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), status_code=reply.error.code)
        raise TypeError("vLLM streamed a reply that was not asked to be a stream")


async def _complete(request: ChatCompletionRequest, raw_request: Request) -> Any:
    return await raw_request.app.state.openai_serving_chat.create_chat_completion(
        request, raw_request
    )


_watched: Any = with_cancellation(_complete)  # pyright: ignore[reportUnknownVariableType]
