"""Model servers that the operator names, which verifiers may ask over HTTP."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from server.wire import JSON, as_object
from strategies.core.errors import VerifierFailed

Api = Literal["chat", "classify", "score", "pooling"]

_PATHS: dict[Api, str] = {
    "chat": "/v1/chat/completions",
    "classify": "/classify",
    "score": "/score",
    "pooling": "/pooling",
}


_URL = r"^https?://[^\s/]+(/\S*)?$"


def check_url(url: str) -> None:
    """Whether there can be a server at an address.

    Raises:
        ValueError: There cannot.
    """
    if re.match(_URL, url) is None:
        raise ValueError(f"'{url}' is no address of a server, such as http://10.0.0.5:8000")
    try:
        port = httpx.URL(url).port
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"there is no port {port}")


class Endpoint(BaseModel):
    """A model on another server: what it is asked by, and what of its answers counts.

    `chat` judges in words, on any OpenAI-compatible server. The others are reward models on a vLLM
    server with a pooling runner: `classify` and `score` judge whole answers, `pooling` each step
    (a process reward model).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    api: Api
    url: str = Field(pattern=_URL, description="Without the API's path.")
    model: str = Field(min_length=1, max_length=200, description="As that server calls it.")
    api_key: SecretStr | None = Field(default=None, description="Sent as a bearer token.")
    timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    label: int = Field(
        default=-1, ge=-1, le=1000, description="The class whose probability counts; -1: the last."
    )
    separator: str = Field(
        default="\n\n",
        min_length=1,
        max_length=100,
        description="For `pooling`: put after each step; the model scores what stands there.",
    )

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        check_url(url)
        return url


class Endpoints:
    """The connections to them; each is opened when it is first needed."""

    def __init__(self, known: Mapping[str, Endpoint]) -> None:
        self._known = known
        self._clients: dict[str, httpx.AsyncClient] = {}

    async def post(
        self, name: str, body: Mapping[str, object], headers: Mapping[str, str] | None = None
    ) -> JSON:
        """See `strategies.core.engine.Remote`."""
        endpoint = self._known[name]
        client = self._clients.get(name)
        if client is None:
            own: dict[str, str] = {}
            if endpoint.api_key is not None:
                own["Authorization"] = f"Bearer {endpoint.api_key.get_secret_value()}"
            client = httpx.AsyncClient(
                base_url=endpoint.url.rstrip("/"),
                headers=own,
                timeout=endpoint.timeout_seconds,
            )
            self._clients[name] = client
        try:
            reply = await client.post(
                _PATHS[endpoint.api], json={"model": endpoint.model, **body}, headers=headers
            )
            reply.raise_for_status()
            said: Any = reply.json()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise VerifierFailed(f"endpoint '{name}' answered with status {status}") from error
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            what = type(error).__name__
            raise VerifierFailed(f"endpoint '{name}' gave no proper answer: {what}") from error
        found = as_object(said)
        if found is None:
            raise VerifierFailed(f"endpoint '{name}' answered with something else than an object")
        return found

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()


class Asking:
    """The same for one run, as `Remote`: what they are asked says which call of the run it is."""

    def __init__(self, endpoints: Endpoints, headers: Callable[[int], Mapping[str, str]]) -> None:
        self._endpoints = endpoints
        self._headers = headers

    async def post(self, name: str, body: Mapping[str, object], index: int) -> JSON:
        """See `Remote.post`."""
        return await self._endpoints.post(name, body, self._headers(index))
