"""A batch at work: every prompt a run of its own, all in one market, each told when decided."""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, contextmanager
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from server.admission import Admission, Place
from server.batch.asked import Asked, Line
from server.errors import shape, status_of
from server.reply import exact, mull_field
from server.selection import SELECTION, owner
from server.store import alone
from server.wire import JSON, as_object
from strategies.core.aio import Arrivals, Background
from strategies.core.budget import Budget
from strategies.core.errors import MullError, NotFound
from strategies.core.market import Bidder, Market

_log = logging.getLogger(__name__)

_TELL_SECONDS = 0.25
"""Between two reports of progress."""

_KEPT = 256
"""Batches whose account can be asked for."""


class Chat(Protocol):
    """Answers chat requests."""

    async def complete(self, body: JSON, raw_request: Request, *, watch: bool) -> JSON | Response:
        """A whole reply, or a refusal."""
        ...


class Running:
    """One batch. Changes only between awaits."""

    def __init__(self, asked: Asked, *, running: int, owner: str) -> None:
        self.kind = asked.lines[0].selection.strategy.kind
        self.owner = owner
        self.over = False
        self._asked = asked
        self._budget = Budget(asked.limits)
        self._market = Market(self._budget, prompts=len(asked.lines), running=running)
        self._decided = 0
        self._failed = 0
        self._prompt_tokens = 0

    def account(self) -> JSON:
        """How far it is, and what it has spent."""
        budget, limits = self._budget, self._asked.limits
        spent: JSON = {"tokens": budget.spent, "samples": budget.samples}
        return {
            "object": "batch",
            "allocation": self._asked.allocation,
            "over": self.over,
            "prompts": len(self._asked.lines),
            "probed": self._market.probed,
            "decided": self._decided,
            "failed": self._failed,
            "budget": limits.model_dump(exclude_none=True),
            "spent": spent,
            "leased": budget.reserved if limits.tokens is not None else 0,
            "usage": {
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": budget.spent,
                "total_tokens": self._prompt_tokens + budget.spent,
            },
        }

    async def events(
        self, chat: Chat, request: Request, place: Place
    ) -> AsyncGenerator[tuple[str, JSON], None]:
        """`result` for each prompt as it is decided, `progress` in between, `done` at the end."""
        heard: asyncio.Queue[tuple[int, JSON] | None] = asyncio.Queue()
        told, last = self.account(), time.monotonic()
        yield "progress", told
        try:
            async with Background(self._work(chat, request, place, heard)) as working:
                working.add_done_callback(lambda _: heard.put_nowait(None))
                while True:
                    found, silent = None, False
                    try:
                        found = await asyncio.wait_for(heard.get(), _TELL_SECONDS)
                    except TimeoutError:
                        silent = True
                    if found is not None:
                        yield "result", {"index": found[0]} | found[1]
                    elif not silent:
                        break
                    if time.monotonic() - last >= _TELL_SECONDS and (now := self.account()) != told:
                        told, last = now, time.monotonic()
                        yield "progress", told
                await working
        finally:
            self.over = True
        yield "done", self.account()

    async def _work(
        self,
        chat: Chat,
        request: Request,
        place: Place,
        heard: "asyncio.Queue[tuple[int, JSON] | None]",
    ) -> None:
        async with Arrivals[tuple[int, JSON]]() as arrivals:
            for at in range(len(self._asked.lines)):
                arrivals.start(self._one(at, chat, request, place))
            async for found in arrivals:
                heard.put_nowait(found)

    async def _one(self, at: int, chat: Chat, request: Request, place: Place) -> tuple[int, JSON]:
        """One prompt to its end; what goes wrong with it is its own."""
        asked, line = self._asked, self._asked.lines[at]
        equal = asked.allocation == "equal"
        SELECTION.set(line.selection)  # this task's own
        with Bidder(self._market, at, share=asked.share, equal=equal) as bidder:
            line.selection.bidder, line.selection.place = bidder, place
            try:
                reply = await chat.complete(line.body, request, watch=False)
                status, body = (
                    (reply.status_code, json.loads(bytes(reply.body)))
                    if isinstance(reply, Response)
                    else (200, self._whole(reply, line))
                )
            except Exception as error:
                if not isinstance(error, MullError):
                    _log.exception("a prompt of a batch failed")
                status, body = status_of(error), shape(error)
        self._decided += 1
        self._failed += status != 200
        return at, result(line, status, body)

    def _whole(self, reply: JSON, line: Line) -> JSON:
        run = line.selection.runs[-1]
        self._prompt_tokens += reply["usage"].get("prompt_tokens") or 0
        usage = exact(reply["usage"], run.usage())
        return reply | {"usage": usage, "mull": mull_field(line.selection)}


def result(line: Line, status: int, body: JSON) -> JSON:
    """A line of a batch's output, as OpenAI writes them; a failure stands in `error` as well."""
    runs = line.selection.runs
    name = runs[-1].id if runs else line.custom_id
    failure: JSON | None = None
    if status != 200:
        said = as_object(body.get("error")) or {}
        failure = {"code": str(said.get("type") or status), "message": said.get("message") or ""}
    return {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": failure,
    }


class Batches:
    """The batches that run, and those that ended last, by the `X-Request-Id` that they came with.

    So that who lost the connection can ask what was spent.
    """

    def __init__(self, processes: int = 1) -> None:
        """See `Store`."""
        self._processes = processes
        self._known: OrderedDict[str, Running] = OrderedDict()

    @contextmanager
    def keeping(self, name: str | None, batch: Running) -> Generator[None]:
        """Know a batch by its name, from now on."""
        if name:
            self._known[name] = batch
        try:
            yield
        finally:
            batch.over = True
            over = [name for name, one in self._known.items() if one.over]
            for name in over[: max(0, len(over) - _KEPT)]:
                del self._known[name]

    def find(self, kind: str, name: str, owner: str) -> Running:
        """The newest of that name and strategy.

        Raises:
            NotFound: There is none, or another key started it; or another process may know it.
        """
        alone(self._processes)
        found = self._known.get(name)
        if found is None or (found.kind, found.owner) != (kind, owner):
            raise NotFound(f"there is no batch '{name[:100]}' of yours")
        return found


async def course(
    asked: Asked, chat: Chat, request: Request, admission: Admission, batches: Batches
) -> AsyncGenerator[tuple[str, JSON], None]:
    """Admit a batch as one request, and run it.

    Raises:
        Busy: Too much runs already.
    """
    admission.check()
    running = Running(asked, running=max(1, admission.slots // 2), owner=owner(request.headers))
    name = request.headers.get("x-request-id")
    with admission.enter(asked.lines[0].selection.tab) as place, batches.keeping(name, running):
        async with aclosing(running.events(chat, request, place)) as events:
            async for one in events:
                yield one
