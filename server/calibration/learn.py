"""From problems and a server to a calibration: ask, fit, test out of fold, report."""

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.calibration.fit import (
    FOLDS,
    Pooled,
    Spent,
    best_rule,
    calibration_error,
    cells,
    fit,
    right,
    simulate,
)
from server.calibration.pool import Grade, Pool, Refused
from strategies.core.answers import Answers
from strategies.core.calibration import Calibration, Rule
from strategies.core.sandbox import Sandbox

_DRAWS = 8
"""States of each problem at each stage."""
_BUDGETS = (2, 4, 8, 16, 32)
"""Samples whose tokens are the budgets that are reported."""


def run(options: argparse.Namespace) -> int:
    """Ask, fit, report; return the exit status."""
    console = Console()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in options.problems.read_text().splitlines()]
        grade = None if options.grader is None else _grader(options.grader)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        console.print(f"[red]cannot begin:[/] {error}")
        return 2
    if len(rows) < 4 * FOLDS or options.samples < 4:
        console.print(f"[red]too few:[/] {4 * FOLDS} problems and 4 samples at least")
        return 2
    try:
        pool, adapter, weights = asyncio.run(_collect(options, rows, grade, console))
    except (Refused, httpx.HTTPError) as error:
        console.print(f"[red]stopped:[/] {error}; what was asked is kept: run it again to go on")
        return 1
    rule = best_rule(pool, n=16, seed=options.seed)
    digests = {"problems": sha256(options.problems.read_bytes()).hexdigest()}
    digests |= {} if weights is None else {"weights": weights}
    digests |= {} if adapter is None else {"adapter": adapter}
    held = _out_of_fold(pool, rule, options)
    whole = _calibration(pool, rule, options, digests, _evaluation(held))
    options.out.write_text(whole.model_dump_json(indent=1) + "\n")
    console.print(_table(whole, held))
    picture = options.out.with_suffix(".png")
    _plot(whole, pool, held, picture)
    console.print(f"[green]written[/] {options.out} and {picture}")
    return 0


async def _collect(
    options: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    grade: Grade | None,
    console: Console,
) -> tuple[list[Pooled], str | None, str | None]:
    """The pool, the version that answered, and the digest of the weights that are served."""
    sandbox = Sandbox()
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=3600) as client:
            shelf = (await client.get("/v1/calibrations")).raise_for_status().json()
            pool = Pool(
                options.out.with_suffix(".pool.jsonl"),
                client,
                Answers(sandbox),
                model=options.model,
                n=options.samples,
                verifier=options.verifier or None,
                searches=options.searches if options.verifier else {},
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                grade=grade,
            )
            shown = ("asking", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            columns = [TextColumn(one) if isinstance(one, str) else one for one in shown]
            with Progress(*columns, console=console) as progress:
                found = await pool.collect(rows, clients=options.clients, progress=progress)
    finally:
        await sandbox.close()
    return found, pool.adapter, shelf["weights"]


def _calibration(
    pool: Sequence[Pooled],
    rule: Rule,
    options: argparse.Namespace,
    digests: dict[str, str],
    evaluation: dict[str, float],
) -> Calibration:
    found = fit(pool, rule, bins=options.bins, draws=_DRAWS, seed=options.seed)
    verifier = options.verifier or None
    return Calibration(
        name=options.out.stem,
        model=options.model,
        digests=digests,
        verifier={"kind": verifier} if isinstance(verifier, str) else verifier,
        temperature=options.temperature,
        rule=rule,
        bins=found.bins,
        stages=found.stages,
        searches=dict(options.searches) if verifier else {},
        cells=cells(pool, found.bins, rule, seed=options.seed),
        fixed=found.fixed,
        evaluation=evaluation,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Runs on problems that were not fitted to, at one budget, and fixed numbers of samples."""

    samples: int
    budget: float
    optimal: list[Spent]
    ruled: list[bool]
    majority: list[bool]


def _out_of_fold(pool: Sequence[Pooled], rule: Rule, options: argparse.Namespace) -> list[_Held]:
    sizes = [n for n in _BUDGETS if n <= options.samples]
    runs: dict[int, list[Spent]] = {n: [] for n in sizes}
    rng = random.Random(options.seed)
    order = rng.sample(range(len(pool)), len(pool))
    costs = {n: fmean(one.cost(one.samples[:n]) for one in pool) for n in sizes}
    for fold in range(FOLDS):
        held = [pool[at] for at in order[fold::FOLDS]]
        rest = [pool[at] for k, at in enumerate(order) if k % FOLDS != fold]
        fitted = _calibration(rest, rule, options, {}, {})
        for n in sizes:
            runs[n] += [
                simulate(one, fitted, budget=costs[n], rng=rng) for one in held for _ in range(2)
            ]
    drawn = {n: [rng.sample(one.samples, n) for one in pool for _ in range(2)] for n in sizes}
    return [
        _Held(
            samples=n,
            budget=costs[n],
            optimal=runs[n],
            ruled=[right(votes, rule) for votes in drawn[n]],
            majority=[right(votes, "votes") for votes in drawn[n]],
        )
        for n in sizes
    ]


def _evaluation(held: Sequence[_Held]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in held:
        at = f"at {one.samples} samples"
        found |= {
            f"accuracy, {at}": fmean(run.right for run in one.optimal),
            f"tokens, {at}": fmean(run.tokens for run in one.optimal),
            f"tokens of the fixed number, {at}": one.budget,
            f"accuracy of the fixed number, {at}": fmean(one.ruled),
            f"accuracy of the majority, {at}": fmean(one.majority),
        }
    found["calibration_error"] = calibration_error([run for one in held for run in one.optimal])
    return found


def _table(whole: Calibration, held: Sequence[_Held]) -> Table:
    table = Table(title=f"out of fold, {FOLDS} folds; the rule is '{whole.rule}'")
    for heading in ("budget", "compute-optimal", "its tokens", "fixed", "majority", "fixed tokens"):
        table.add_column(heading, justify="right")
    for one in held:
        table.add_row(
            f"{one.samples} samples",
            f"{fmean(run.right for run in one.optimal):.3f}",
            f"{fmean(run.tokens for run in one.optimal):,.0f}",
            f"{fmean(one.ruled):.3f}",
            f"{fmean(one.majority):.3f}",
            f"{one.budget:,.0f}",
        )
    table.caption = f"expected calibration error {whole.evaluation['calibration_error']:.3f}"
    return table


def _plot(whole: Calibration, pool: Sequence[Pooled], held: Sequence[_Held], path: Path) -> None:
    from matplotlib import pyplot

    plots = cast(Any, pyplot)
    plots.switch_backend("agg")
    bins = len(whole.bins)
    figure, axes = plots.subplots(2, max(3, bins), figsize=(3.4 * max(3, bins), 7), squeeze=False)
    frontier, reliability, abstaining = axes[0][:3]
    for label, xs, ys in (
        (
            "compute-optimal",
            [fmean(run.tokens for run in one.optimal) for one in held],
            [fmean(run.right for run in one.optimal) for one in held],
        ),
        (f"fixed, {whole.rule}", [one.budget for one in held], [fmean(o.ruled) for o in held]),
        ("majority", [one.budget for one in held], [fmean(one.majority) for one in held]),
    ):
        frontier.plot(xs, ys, marker="o", label=label)
    frontier.set(xscale="log", xlabel="tokens", ylabel="accuracy", title="out of fold")
    frontier.legend(fontsize=7)
    runs = sorted((run for one in held for run in one.optimal), key=lambda run: run.confidence)
    parts = [runs[len(runs) * k // 10 : len(runs) * (k + 1) // 10] for k in range(10)]
    reliability.plot([0, 1], [0, 1], color="grey")
    reliability.plot(
        [fmean(run.confidence for run in part) for part in parts if part],
        [fmean(run.right for run in part) for part in parts if part],
        marker="o",
    )
    reliability.set(xlabel="confidence", ylabel="accuracy", title="reliability")
    last = sorted(held[-1].optimal, key=lambda run: -run.confidence)
    shares = [k / 20 for k in range(1, 21)]
    kept = [fmean(run.right for run in last[: max(1, round(s * len(last)))]) for s in shares]
    abstaining.plot(shares, kept, marker=".")
    abstaining.set(xlabel="share answered", ylabel="accuracy of those", title="abstention")
    for axis in axes[0][3:]:
        axis.set_axis_off()
    for at, axis in enumerate(axes[1]):
        if at >= bins:
            axis.set_axis_off()
            continue
        for cell in whole.cells:
            color = "C0" if cell.name.startswith("majority") else "C1"
            color = "C2" if cell.name in whole.searches else color
            low, high = cell.accuracy[at] - cell.low[at], cell.high[at] - cell.accuracy[at]
            axis.errorbar(
                cell.tokens[at],
                cell.accuracy[at],
                [[max(0, low)], [max(0, high)]],
                marker="o",
                color=color,
                capsize=2,
            )
        axis.set(xscale="log", xlabel="tokens", title=f"samples right < {whole.bins[at].below:.2f}")
    axes[1][0].set_ylabel("accuracy (majority, rule, search)")
    for axis in (frontier, *axes[1][:bins]):
        axis.minorticks_off()  # whose labels would overlap
        axis.set_xticks([10.0**k * step for k in range(1, 6) for step in (1, 2, 5)], minor=False)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        low, high = axis.dataLim.intervalx
        axis.set_xlim(low / 1.2, high * 1.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plots.close(figure)


def _grader(name: str) -> Grade:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
