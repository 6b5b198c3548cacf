"""A stretch of a batch: prompts that a server answers under one budget, and how it is asked."""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.batch.file import Row
from server.wire import JSON, as_object

_SILENCE_SECONDS = 120
"""A server that says nothing for so long, not even that it lives, is gone."""

_AGAIN = ("budget_exhausted",)
"""Refusals of a prompt that another run may not meet with."""

NOTHING: JSON = {"spent": {"tokens": 0, "samples": 0}, "leased": 0}
"""The account of a stretch that was refused."""


class Stopped(Exception):
    """The run cannot go on."""


class Refused(Stopped):
    """A server takes no such stretch, and has spent nothing on it."""


class Busy(Refused):
    """It takes none now; another may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Some prompts, under the name by which the server knows their account."""

    name: str
    rows: Sequence[Row]
    budget: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all stretches of a batch have in common."""

    kind: str
    """The strategy."""
    fields: JSON
    """The model, the strategy's and sampling fields."""
    key: str | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """Where they are asked."""
        return f"/v1/strategies/{self.kind}/batch"

    def client(self, url: str) -> httpx.AsyncClient:
        """A client of a server."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=10)
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout)


async def ask(
    client: httpx.AsyncClient, terms: Terms, stretch: Stretch
) -> AsyncGenerator[tuple[str, JSON], None]:
    """The server's events, `done` the last.

    Raises:
        Refused: It does not take the stretch.
        Stopped: It ended before `done`; so it may have by `httpx.HTTPError`.
    """
    lines = [
        {"custom_id": row.custom_id, "body": {k: v for k, v in row.body.items() if k != "model"}}
        for row in stretch.rows
    ]
    body = terms.fields | {"requests": lines, "budget": stretch.budget, "stream": True}
    headers = {"X-Request-Id": stretch.name}
    async with client.stream("POST", terms.path, json=body, headers=headers) as reply:
        if reply.status_code != 200:
            await reply.aread()
            now = reply.status_code == 429 or reply.status_code >= 500
            kind = Busy if now else Refused
            raise kind(f"the server refuses it ({reply.status_code}): {_reason(reply)}")
        event = ""
        async for line in reply.aiter_lines():
            if line.startswith("event: "):
                event = line[len("event: ") :]
            elif line.startswith("data: "):
                said: JSON = json.loads(line[len("data: ") :])
                if event == "error":
                    raise Stopped(said["error"]["message"])
                yield event, said
                if event == "done":
                    return
    raise Stopped("the server ended in the middle")


def final(result: JSON) -> bool:
    """Whether asking again would bring nothing else: an answer, or a refusal of the prompt."""
    status, error = result["response"]["status_code"], as_object(result["error"]) or {}
    return status != 429 and status < 500 and error.get("code") not in _AGAIN


def _reason(reply: httpx.Response) -> Any:
    try:
        error: JSON = reply.json()["error"]
        return f"{error['message']} ({error['param']})" if error.get("param") else error["message"]
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
