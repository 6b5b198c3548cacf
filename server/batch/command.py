"""`mull batch`: answer a file of prompts under one budget; a run that was cut off goes on."""

import argparse
import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.batch import spread
from server.batch.file import Output, Row, Unusable, rows
from server.batch.stretch import NOTHING, Refused, Stopped, Stretch, Terms, ask, final
from server.wire import JSON, as_object

_TOGETHER = 1000
_TOGETHER_SPREAD = 100
"""Prompts in a stretch; on a cluster fewer, so that there is one for each server."""


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
    parser.add_argument(
        "--url",
        nargs="+",
        default=["http://127.0.0.1:8000"],
        help="a server, or with --ray several (default http://127.0.0.1:8000)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="let workers of a Ray cluster ask the servers; 'local' for one on this machine",
    )
    parser.add_argument("--api-key", help="the server's; default: MULL_API_KEY")
    parser.add_argument("--model", help="a served model, adapter or alias; default: the lines'")
    parser.add_argument(
        "--strategy",
        default="compute_optimal",
        metavar="NAME|JSON",
        help="of all prompts (default %(default)s)",
    )
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
        help='sampling fields, and the strategy\'s, as \'{"n": 32, "max_tokens": 512}\'',
    )
    parser.add_argument(
        "--together",
        type=int,
        help=f"prompts that share at most (default {_TOGETHER}, with --ray {_TOGETHER_SPREAD})",
    )


def run(options: argparse.Namespace, key: SecretStr | None) -> int:
    """Do it; return the exit status: 0 if every prompt has its answer on disk."""
    console = Console()
    try:
        asked = rows(options.input)
        model = _model(asked, options.model)
        terms = _terms(options, key, model)
        settings = {"strategy": terms.kind} | terms.fields
        with Output(options.output, source=options.input, asked=settings) as output:
            return _Run(options, terms, asked, output, console).run()
    except (Unusable, OSError) as error:
        console.print(f"[red]cannot begin:[/] {error}", soft_wrap=True)
        return 2
    except (Stopped, httpx.HTTPError) as error:
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


def _terms(options: argparse.Namespace, key: SecretStr | None, model: str) -> Terms:
    """What decides how prompts are answered, but for the budget, which may be raised."""
    named = options.strategy
    try:
        strategy = json.loads(named) if named.startswith("{") else {"kind": named}
    except ValueError as error:
        raise Unusable(f"--strategy is no JSON: {error}") from None
    kind, fields = strategy.pop("kind", None), as_object(options.fields)
    if not isinstance(kind, str):
        raise Unusable("--strategy names a kind")
    if fields is None or fields.keys() & {"model", "requests", "budget", "stream", "allocation"}:
        raise Unusable("--fields is a JSON object of the strategy's and sampling fields")
    if options.tokens is None and options.samples is None:
        raise Unusable("name the budget of all prompts: --tokens, --samples, or both")
    if len(options.url) > 1 and options.ray is None:
        raise Unusable("several servers are asked with --ray, or through mull gateway")
    chosen = {} if options.allocation is None else {"allocation": options.allocation}
    return Terms(
        kind=kind,
        fields={"model": model, **strategy, **fields, **chosen},
        key=options.api_key or (None if key is None else key.get_secret_value()),
    )


_TRIES = 2
"""Times that a cluster is asked for a prompt in one run."""


class _Run:
    """One run over all that has no answer yet."""

    def __init__(
        self,
        options: argparse.Namespace,
        terms: Terms,
        asked: Sequence[Row],
        output: Output,
        console: Console,
    ) -> None:
        self._options = options
        self._terms = terms
        self._asked = asked
        self._output = output
        self._console = console
        self._failed: dict[str, str] = {}
        """By prompt, why it is to be asked again."""
        seconds = options.seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        usual = _TOGETHER if options.ray is None else _TOGETHER_SPREAD
        self._together = options.together or usual

    def run(self) -> int:
        """Ask; say what came of it; return the exit status."""
        if self._options.ray is not None:
            try:
                spread.connect(self._options.ray)
            except ImportError:
                why = "Ray is not installed; in the checkout: pip install '.[ray]'"
                raise Unusable(why) from None
            except ConnectionError as error:
                raise Unusable(f"no Ray cluster answers: {error}") from None
        asyncio.run(self._close_open())
        coming = [row for row in self._asked if row.custom_id not in self._output.done]
        shown = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
        columns = [TextColumn(one) if isinstance(one, str) else one for one in shown]
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            bar = progress.add_task(
                "", total=len(self._asked), completed=len(self._asked) - len(coming)
            )

            def show() -> None:
                most, spent = self._options.tokens, self._output.spent
                words = f"{spent.tokens:,} tokens" + ("" if most is None else f" of {most:,}")
                completed = len(self._output.done) + len(self._failed)
                progress.update(bar, description=words, completed=completed)

            if self._options.ray is None:
                asyncio.run(self._answer(coming, show))
            else:
                self._spread(coming, show)
        return self._told()

    def _told(self) -> int:
        spent, failed = self._output.spent, self._failed
        self._console.print(
            f"[green]{len(self._output.done)} of {len(self._asked)} answered[/] for "
            f"{spent.tokens:,} tokens and {spent.samples:,} samples: {self._options.output}"
        )
        if failed:
            name, why = next(iter(failed.items()))
            self._console.print(
                f"[red]{len(failed)} are to be asked again[/], as '{name}': {why}", soft_wrap=True
            )
        return 1 if failed else 0

    async def _answer(self, coming: Sequence[Row], show: Callable[[], None]) -> None:
        """Ask one server, so many prompts at once, each stretch with its part."""
        output = self._output
        async with self._terms.client(self._options.url[0]) as client:
            while coming:
                now, rest = coming[: self._together], coming[self._together :]
                seconds = self._seconds(len(now), len(coming))
                stretch = self._begun(now, coming=len(coming), seconds=seconds)
                try:
                    async for event, said in ask(client, self._terms, stretch):
                        if event == "result":
                            self._take(said)
                        else:
                            output.tell(stretch.name, said, over=event == "done")
                        show()
                except Refused:
                    output.tell(stretch.name, NOTHING, over=True)
                    raise
                coming = rest

    def _spread(self, coming: Sequence[Row], show: Callable[[], None]) -> None:
        """Let a cluster ask several servers, so many stretches at once."""
        urls, output, most = self._options.url, self._output, self._together
        tries = Counter[str]()
        while coming:
            wave = coming[: most * spread.WAVE * len(urls)]
            seconds = self._seconds(len(wave), len(coming))
            coming, begun = [*coming[len(wave) :]], dict[str, Stretch]()
            tries.update(row.custom_id for row in wave)
            for at in range(0, len(wave), most):
                now = wave[at : at + most]
                left = len(wave) - at + len(coming)
                one = self._begun(now, coming=left, seconds=seconds, leased=True)
                begun[one.name] = one
            for done in spread.spread([*begun.values()], self._terms, urls):
                stretch = begun.pop(done["name"])
                output.tell(stretch.name, done["account"], over=True)
                for said in done["results"]:
                    self._take(said)
                self._unanswered(stretch, done["error"] or "no budget was left for it")
                show()
            for stretch in begun.values():
                output.lost(stretch.name)
                self._unanswered(stretch, "its worker died")
            coming += [
                row
                for row in wave
                if self._failed.get(row.custom_id) and tries[row.custom_id] < _TRIES
            ]

    def _unanswered(self, stretch: Stretch, why: str) -> None:
        for row in stretch.rows:
            if row.custom_id not in self._output.done:
                self._failed[row.custom_id] = why

    def _begun(
        self, rows: Sequence[Row], *, coming: int, seconds: float | None, leased: bool = False
    ) -> Stretch:
        """A stretch with its part of what is left for the `coming` prompts, in the journal.

        `leased`: nobody will tell how it goes until it is over.

        Raises:
            Stopped: There is too little left.
        """
        budget: JSON = {}
        for name, most, gone in (
            ("tokens", self._options.tokens, self._output.spent.tokens),
            ("samples", self._options.samples, self._output.spent.samples),
        ):
            if most is not None:
                budget[name] = max(0, most - gone) * len(rows) // coming
                if budget[name] < len(rows):
                    raise Stopped(
                        f"of {most:,} {name}, {gone:,} are spent, and {coming} prompts have no "
                        f"answer: raise --{name}"
                    )
        if seconds is not None:
            budget["seconds"] = seconds
        stretch = Stretch(name=uuid.uuid4().hex, rows=rows, budget=budget)
        self._output.begin(stretch.name, budget if leased else {})
        return stretch

    def _seconds(self, prompts: int, coming: int) -> float | None:
        """The part of the time left that is for so many of the coming prompts.

        Raises:
            Stopped: There is none.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Stopped(f"the time is over, and {coming} prompts have no answer")
        return left * prompts / coming

    async def _close_open(self) -> None:
        """Ask what stretches have spent that were cut off; who was restarted does not know."""
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(self._terms.client(url))
                for url in self._options.url
            ]
            for name in self._output.open:
                names = (name, *(spread.attempt_of(name, at) for at in range(len(clients))))
                found = [
                    account
                    for client in clients
                    for one in names
                    if (account := await self._account(client, one)) is not None
                ]
                if found:
                    spent = [account["spent"] for account in found]
                    total = {key: sum(one[key] for one in spent) for key in ("tokens", "samples")}
                    self._output.tell(name, {"spent": total, "leased": 0}, over=True)
                else:
                    self._output.lost(name)

    async def _account(self, client: httpx.AsyncClient, name: str) -> JSON | None:
        """Of a stretch that is over; None if the server knows none."""
        while True:
            try:
                reply = await client.get(f"{self._terms.path}/{name}")
            except httpx.TransportError as error:
                raise Stopped(
                    f"{client.base_url} may know what was spent on '{name}', and does not answer: "
                    f"{error or type(error).__name__}; if it is gone for good, leave out its --url"
                ) from error
            if reply.status_code == 404:
                return None
            account: JSON = reply.raise_for_status().json()
            if account["over"]:
                return account
            await asyncio.sleep(0.1)  # it has not seen yet that nobody listens

    def _take(self, said: JSON) -> None:
        """Write an answer, and a refusal that would come again; the rest is for another run."""
        if final(said):
            self._output.write({key: value for key, value in said.items() if key != "index"})
            self._failed.pop(said["custom_id"], None)
        else:
            error = as_object(said["error"]) or {}
            self._failed[said["custom_id"]] = error.get("message") or "no reason was given"
