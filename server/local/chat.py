"""vLLM's chat handler as a function, for the routes of our own that speak in messages."""

from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    with_cancellation,  # pyright: ignore[reportUnknownVariableType]
)


class Chat:
    """Chat completions without HTTP in between."""

    fields = frozenset(ChatCompletionRequest.model_fields)
    """What a chat request may hold."""

    async def complete(
        self, body: dict[str, Any], raw_request: Request
    ) -> dict[str, Any] | JSONResponse:
        """A whole reply as JSON, or vLLM's refusal. A client that leaves aborts it.

        Raises:
            pydantic.ValidationError: The body is no chat request.
        """
        reply = await _complete(ChatCompletionRequest.model_validate(body), raw_request)
        if isinstance(reply, ChatCompletionResponse):
            return reply.model_dump()
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), status_code=reply.error.code)
        raise TypeError("vLLM streamed a reply that was not asked to be a stream")


@with_cancellation
async def _complete(request: ChatCompletionRequest, raw_request: Request) -> Any:
    return await raw_request.app.state.openai_serving_chat.create_chat_completion(
        request, raw_request
    )
