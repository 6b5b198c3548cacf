"""Stretches on a Ray cluster: Ray Data hands them out, its workers ask the servers.

A server that dies in the middle of a stretch is left, and another one is asked for the rest. A
worker that dies takes its stretch with it: nothing is done twice behind the back of the budget.
"""

import asyncio
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import httpx

from server.batch.file import Row
from server.batch.stretch import NOTHING, Busy, Refused, Stopped, Stretch, Terms, ask, final
from server.wire import JSON

_CPUS = 0.1
"""Of a worker, which waits for a server most of the time."""

_EACH = 2
"""Stretches that a server has at once, so that the end of one leaves it no hole."""

WAVE = 4
"""Stretches for each server that are begun together: what a killed run may lose the account of."""


_UNKNOWN: JSON = {"response": {"status_code": 503}, "error": None}
"""What is said of a prompt of which a server has said nothing."""


def connect(address: str) -> None:
    """Join a cluster; 'local' starts one on this machine.

    Raises:
        ImportError: Ray is not installed.
    """
    import ray

    cast(Any, ray).init(
        address=None if address == "local" else address,
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level="ERROR",
    )


def spread(stretches: Sequence[Stretch], terms: Terms, urls: Sequence[str]) -> Iterator[JSON]:
    """What came of each stretch, as they end: its name, results, account, and error if any.

    Those whose worker died are missing.
    """
    from ray import data as ray_data

    data = cast(Any, ray_data)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one already
    context.max_errored_blocks = -1
    rows = [{"at": at, "stretch": json.dumps(asdict(one))} for at, one in enumerate(stretches)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of `max_retries`, whose successor there is none yet
        done = data.from_items(rows, override_num_blocks=len(rows)).map(
            partial(_work, terms=terms, urls=list(urls)),
            compute=data.TaskPoolStrategy(size=_EACH * len(urls)),
            num_cpus=_CPUS,
            max_retries=0,
        )
    for row in done.iter_rows():
        yield json.loads(row["done"])


def _work(row: dict[str, Any], *, terms: Terms, urls: Sequence[str]) -> dict[str, str]:
    said = json.loads(row["stretch"])
    stretch = Stretch(**said | {"rows": [Row(**one) for one in said["rows"]]})
    first = int(row["at"]) % len(urls)
    done = asyncio.run(answered(stretch, terms, [*urls[first:], *urls[:first]]))
    return {"done": json.dumps(done)}


async def answered(stretch: Stretch, terms: Terms, urls: Sequence[str]) -> JSON:
    """Have a stretch answered by the first server that can, the rest of it by the next."""
    results: dict[str, JSON] = {}
    spent = dict(NOTHING["spent"])
    failed: str | None = None
    rows = list(stretch.rows)
    for attempt, url in enumerate(urls):
        budget = _left(stretch.budget, spent, len(rows))
        if budget is None:
            break
        told = NOTHING
        part = replace(stretch, name=attempt_of(stretch.name, attempt), rows=rows, budget=budget)
        failed = None
        try:
            async with terms.client(url) as client:
                async for event, said in ask(client, terms, part):
                    if event == "result":
                        results[said["custom_id"]] = said
                    else:
                        told = said
        except (Stopped, httpx.HTTPError) as error:
            failed = f"{url}: {error or type(error).__name__}"
            if isinstance(error, Refused) and not isinstance(error, Busy):
                break  # so would the others
        spent["tokens"] += told["spent"]["tokens"] + (told["leased"] if failed else 0)
        spent["samples"] += told["spent"]["samples"]
        rows = [row for row in rows if not final(results.get(row.custom_id, _UNKNOWN))]
        if not rows:
            break
    return {
        "name": stretch.name,
        "results": [*results.values()],
        "account": {"spent": spent, "leased": 0},
        "error": failed,
    }


def attempt_of(name: str, attempt: int) -> str:
    """The name by which a server knows an attempt at a stretch."""
    return f"{name}.{attempt}"


def _left(budget: JSON, spent: JSON, prompts: int) -> JSON | None:
    """The rest of a budget; None where it is too little for so many prompts."""
    rest = {name: most - spent.get(name, 0) for name, most in budget.items()}
    short = any(rest.get(name, prompts) < prompts for name in ("tokens", "samples"))
    return None if short else rest
