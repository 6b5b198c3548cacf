"""`mull batch`: answer a file of prompts under one budget; a run that was cut off goes on."""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.batch.file import Output, Row, Spent, Unusable, rows
from server.wire import JSON, as_object

_PATH = "/v1/strategies/compute_optimal/batch"

_SILENCE_SECONDS = 120
"""A server that says nothing for so long, not even that it lives, is gone."""

_AGAIN = ("budget_exhausted",)
"""Refusals of a prompt that another run may not meet with."""


class _Stopped(Exception):
    """The run cannot go on."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what may be asked."""
    parser.add_argument(
        "input",
        type=Path,
        help="an OpenAI batch file, or lines of {messages}, {prompt} or {question}",
    )
    parser.add_argument(
        "output", type=Path, help="lines as OpenAI writes them; what is there is not asked again"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--api-key", help="the server's; default: MULL_API_KEY")
    parser.add_argument("--model", help="a served model, adapter or alias; default: the lines'")
    parser.add_argument("--tokens", type=int, help="for all prompts and runs together")
    parser.add_argument("--samples", type=int, help="the same in samples")
    parser.add_argument("--seconds", type=float, help="for this run")
    parser.add_argument(
        "--allocation", choices=("marginal", "equal"), help="default: marginal if calibrated"
    )
    parser.add_argument(
        "--fields",
        type=json.loads,
        default={},
        metavar="JSON",
        help='compute_optimal\'s and sampling fields, as \'{"n": 32, "max_tokens": 512}\'',
    )
    parser.add_argument(
        "--together", type=int, default=1000, help="prompts that share at most (default 1000)"
    )


def run(options: argparse.Namespace, key: SecretStr | None) -> int:
    """Do it; return the exit status: 0 if every prompt has its answer on disk."""
    console = Console()
    try:
        asked = rows(options.input)
        model = _model(asked, options.model)
        settings = _settings(options, model)
        with Output(options.output, source=options.input, asked=settings) as output:
            return asyncio.run(_answer(options, key, asked, settings, output, console))
    except (Unusable, OSError) as error:
        console.print(f"[red]cannot begin:[/] {error}", soft_wrap=True)
        return 2
    except (_Stopped, httpx.HTTPError) as error:
        said = str(error) or type(error).__name__
        console.print(f"[red]stopped:[/] {said}; run it again to go on", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("[red]stopped[/]; run it again to go on")
        return 130


def _model(asked: Sequence[Row], named: str | None) -> str:
    """The one model of all lines."""
    names = {str(row.body["model"]) for row in asked if "model" in row.body}
    if named is not None:
        names.add(named)
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "none: name it with --model"
        raise Unusable(f"a batch is of one model, and the lines and --model name {found}")
    return names.pop()


def _settings(options: argparse.Namespace, model: str) -> JSON:
    """What decides how prompts are answered, but for the budget, which may be raised."""
    fields = as_object(options.fields)
    if fields is None or fields.keys() & {"model", "requests", "budget", "stream", "allocation"}:
        raise Unusable("--fields is a JSON object of compute_optimal's and sampling fields")
    if options.tokens is None and options.samples is None:
        raise Unusable("name the budget of all prompts: --tokens, --samples, or both")
    chosen = {} if options.allocation is None else {"allocation": options.allocation}
    return {"model": model, **fields, **chosen}


async def _answer(
    options: argparse.Namespace,
    key: SecretStr | None,
    asked: Sequence[Row],
    settings: JSON,
    output: Output,
    console: Console,
) -> int:
    """Ask for all that has no answer yet, so many at once, each stretch with its part."""
    secret = options.api_key or (None if key is None else key.get_secret_value())
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    timeout = httpx.Timeout(_SILENCE_SECONDS, connect=10)
    failed: dict[str, str] = {}
    shown = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    columns = [TextColumn(one) if isinstance(one, str) else one for one in shown]
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=timeout) as client:
        for name in output.open:
            await _closed(client, output, name)
        coming = [row for row in asked if row.custom_id not in output.done]
        with progress:
            bar = progress.add_task("", total=len(asked), completed=len(asked) - len(coming))
            while coming:
                now, rest = coming[: options.together], coming[options.together :]
                budget = _budget(options, output.spent, deadline, len(now), len(coming))
                async for event, said in _asked(client, output, settings, now, budget):
                    if event == "result":
                        _take(said, output, failed)
                        progress.update(bar, completed=len(output.done) + len(failed))
                    spent = output.spent
                    words = f"{spent.tokens:,} tokens" + (
                        "" if options.tokens is None else f" of {options.tokens:,}"
                    )
                    progress.update(bar, description=words)
                coming = rest
    spent = output.spent
    console.print(
        f"[green]{len(output.done)} of {len(asked)} answered[/] for {spent.tokens:,} tokens "
        f"and {spent.samples:,} samples: {options.output}"
    )
    if failed:
        name, why = next(iter(failed.items()))
        console.print(
            f"[red]{len(failed)} are to be asked again[/], as '{name}': {why}", soft_wrap=True
        )
    return 1 if failed else 0


def _budget(
    options: argparse.Namespace, spent: Spent, deadline: float | None, prompts: int, coming: int
) -> JSON:
    """What so many of the coming prompts may spend: their part of what is left."""
    budget: JSON = {}
    for name, all_of_it, gone in (
        ("tokens", options.tokens, spent.tokens),
        ("samples", options.samples, spent.samples),
    ):
        if all_of_it is not None:
            budget[name] = max(0, all_of_it - gone) * prompts // coming
            if budget[name] < prompts:
                raise _Stopped(
                    f"of {all_of_it:,} {name}, {gone:,} are spent, and {coming} prompts have no "
                    f"answer: raise --{name}"
                )
    if deadline is not None:
        budget["seconds"] = (deadline - time.monotonic()) * prompts / coming
        if budget["seconds"] <= 0:
            raise _Stopped(f"the time is over, and {coming} prompts have no answer")
    return budget


async def _asked(
    client: httpx.AsyncClient, output: Output, settings: JSON, asked: Sequence[Row], budget: JSON
) -> AsyncGenerator[tuple[str, JSON], None]:
    """One stretch, whose account goes to the journal."""
    name = uuid.uuid4().hex
    lines = [
        {"custom_id": row.custom_id, "body": {k: v for k, v in row.body.items() if k != "model"}}
        for row in asked
    ]
    body = settings | {"requests": lines, "budget": budget, "stream": True}
    output.begin(name)
    async with client.stream("POST", _PATH, json=body, headers={"X-Request-Id": name}) as reply:
        if reply.status_code != 200:
            output.tell(name, _NOTHING, over=True)
            await reply.aread()
            raise _Stopped(f"the server refuses it ({reply.status_code}): {_reason(reply)}")
        event = ""
        async for line in reply.aiter_lines():
            if line.startswith("event: "):
                event = line[len("event: ") :]
            elif line.startswith("data: "):
                said: JSON = json.loads(line[len("data: ") :])
                if event in ("progress", "done"):
                    output.tell(name, said, over=event == "done")
                if event == "error":
                    raise _Stopped(said["error"]["message"])
                yield event, said
                if event == "done":
                    return
    raise _Stopped("the server ended in the middle")


_NOTHING: JSON = {"spent": {"tokens": 0, "samples": 0}, "leased": 0}


async def _closed(client: httpx.AsyncClient, output: Output, name: str) -> None:
    """Ask what a stretch has spent that was cut off; a server that was restarted does not know."""
    while True:
        reply = await client.get(f"{_PATH}/{name}")
        if reply.status_code == 404:
            output.lost(name)
            return
        account: JSON = reply.raise_for_status().json()
        if account["over"]:
            output.tell(name, account, over=True)
            return
        await asyncio.sleep(0.1)  # it has not seen yet that nobody listens


def _take(said: JSON, output: Output, failed: dict[str, str]) -> None:
    """Write an answer, and a refusal that would come again; the rest is for another run."""
    status, error = said["response"]["status_code"], as_object(said["error"]) or {}
    if status == 429 or status >= 500 or error.get("code") in _AGAIN:
        failed[said["custom_id"]] = error.get("message", "")
        return
    output.write({key: value for key, value in said.items() if key != "index"})


def _reason(reply: httpx.Response) -> Any:
    try:
        error: JSON = reply.json()["error"]
        return f"{error['message']} ({error['param']})" if error.get("param") else error["message"]
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
