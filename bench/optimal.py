"""Compute-optimal against fixed strategies: accuracy by tokens, confidence, batches, overhead.

`--calibrations DIR` holds what `mull calibrate` has learned of the model, from problems that are
not those asked here. Fixed numbers of samples are read off one pool of 32 samples a problem, judged
by the calibration's verifier: the mean over choices of n of them. Compute-optimal answers for real,
with the tokens of n samples as each problem's budget, and as `mean_tokens`. JSON: `rows` has one
object per method and family ("all" for all), with `accuracy` and `tokens` (verifiers' included) as
[value, standard error]. `reach`: the tokens that fixed majority and best-of-n take at 16 samples
over those that compute-optimal takes to be as accurate, interpolated, with a 95 % interval over
resampled problems; null where it never is. `equal_tokens`: points of compute-optimal over each
fixed curve at its own tokens. `calibration`: by budget and for all, by tenth of confidence `[runs,
mean confidence, share right]` and the expected error. `abstention`: accuracy of the surest share of
the answers. `overhead`: the share of a run's wall time that planning takes, median. `batches`: by
budget, accuracy of `--batch` problems under one budget by marginal gain and in equal parts, paired
differences in points to that and to fixed strategies with as many tokens, and tokens spent of those
allowed.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench import bare
from bench.plot import panels
from bench.pool import FIXED, Pool, fixed, pooled
from bench.search import groups
from bench.serving import ask_all, bar, server
from bench.stats import calibration_error, mean, median, shares, standard_error, tenths
from finetune.tiny.problems import FAMILIES, exam, grade
from finetune.tiny.solution import Item

NS = (1, 2, 4, 8, 16, 32)
"""Samples of fixed strategies; their tokens are the budgets."""

BATCHED = (2, 4, 8)
"""Samples whose tokens are a batch's budget a problem."""

OURS = ("compute-optimal, each", "compute-optimal, mean")
"""With the tokens of n samples as each problem's budget, and as what all are to take on average."""

Curve = dict[int, list["Answered"]]
"""By number of samples, the answers to all problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one problem; of a pool, the mean over choices."""

    right: float
    tokens: float
    confidence: float = 0.0
    planning: float = 0.0
    """The share of the wall time."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrations", metavar="DIR", help="what the server is to plan by; with --url, its own"
    )
    parser.add_argument("--batch", type=int, default=200, help="problems under one budget")
    parser.add_argument("--plot", metavar="PNG", help="draw the curves there")


def run(options: argparse.Namespace) -> None:
    if not options.calibrations and not options.url:
        raise SystemExit("--calibrations DIR, as `mull calibrate` writes it, or --url")
    items = exam(options.seed, options.problems)
    known = {"MULL_CALIBRATIONS": options.calibrations} if options.calibrations else {}
    with server(options.url, options.path, **known) as base:
        curves, batches = asyncio.run(_measure(base, items, options))
    figures = {
        "seed": options.seed,
        "rows": [
            {"method": method, "n": n, "family": family, **_row([answers[at] for at in chosen])}
            for method, curve in curves.items()
            for n, answers in curve.items()
            for family, chosen in groups(items)
        ],
        "reach": _reach(curves, len(items), options.seed),
        "equal_tokens": _equal_tokens(curves, items),
        "calibration": [row for ours in OURS for row in _calibration(ours, curves[ours])],
        "abstention": _abstention(curves[OURS[1]]),
        "overhead": median(
            [one.planning for ours in OURS for of in curves[ours].values() for one in of]
        ),
        "batches": batches,
    }
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures, options.plot)


async def _measure(
    base: str, items: list[Item], options: argparse.Namespace
) -> tuple[dict[str, Curve], list[dict[str, Any]]]:
    places = {item.identity: at for at, item in enumerate(items)}
    async with httpx.AsyncClient(base_url=base, timeout=3600) as client:
        listed = (await client.get("/v1/calibrations")).raise_for_status().json()["data"]
        of_model = [one for one in listed if one["model"] == options.model]
        if len(of_model) != 1:
            raise SystemExit(f"the server has {len(of_model)} calibrations of {options.model}")
        verifier = of_model[0]["verifier"]

        def body(item: Item) -> dict[str, Any]:
            seed = options.seed + 1000 * places[item.identity]
            return bare.question(options.model, item, seed=seed)

        async def said(kind: str, asked: dict[str, Any]) -> dict[str, Any]:
            reply = await client.post(f"/v1/strategies/{kind}", json=asked)
            if reply.is_error:
                raise SystemExit(f"{kind}: {reply.text}")
            return reply.json()

        async def optimal(item: Item, fields: dict[str, Any]) -> Answered:
            began = time.monotonic()
            found = await said("compute_optimal", body(item) | fields | {"trace": "full"})
            seconds = time.monotonic() - began
            return Answered(
                right=float(grade(item, found["text"])),
                tokens=found["usage"]["completion_tokens"],
                confidence=found["confidence"] or 0.0,
                planning=_planning(found["mull"]["trace"]) / seconds,
            )

        with bar() as progress:

            async def all_of(ask: Callable[[Item], Any], label: str) -> list[Any]:
                return await ask_all(
                    items, ask, clients=options.clients, progress=progress, label=label
                )

            pool = await all_of(
                lambda item: pooled(client, body(item) | {"n": NS[-1]}, item, verifier),
                f"{NS[-1]} samples, judged",
            )
            curves: dict[str, Curve] = {
                method: {n: [_fixed(method, n, one) for one in pool] for n in NS}
                for method in (FIXED[:1] if verifier is None else FIXED)
            }
            each = mean([one.tokens for one in curves[[*curves][-1]][1]])
            for ours in OURS:
                curves[ours] = {}
                for n in NS[1:]:
                    tokens = round(n * each)
                    each_own = {"budget": {"tokens": tokens}}
                    fields = each_own if ours == OURS[0] else {"mean_tokens": tokens}
                    curves[ours][n] = await all_of(
                        lambda item, fields=fields: optimal(item, fields), f"{ours}, {n} samples"
                    )
            some = random.Random(options.seed).sample(items, min(options.batch, len(items)))
            task = progress.add_task("batches", total=2 * len(BATCHED))
            batches: list[dict[str, Any]] = []
            for n in BATCHED:
                found: dict[str, tuple[list[float], int]] = {}
                for allocation in ("marginal", "equal"):
                    asked = {
                        "model": options.model,
                        "max_tokens": 400,
                        "budget": {"tokens": round(n * each) * len(some)},
                        "allocation": allocation,
                        "requests": [
                            {
                                "custom_id": item.identity,
                                "body": {key: body(item)[key] for key in ("messages", "seed")},
                            }
                            for item in some
                        ],
                    }
                    found[allocation] = _batch(await said("compute_optimal/batch", asked), some)
                    progress.advance(task)
                fixed_at = {
                    method: [curve[n][places[item.identity]].right for item in some]
                    for method, curve in curves.items()
                    if method not in OURS
                }
                batches.append(_compared(n, round(n * each) * len(some), found, fixed_at))
    return curves, batches


def _planning(trace: list[dict[str, Any]]) -> float:
    """Seconds from what was last known to what was planned, and on to what was then begun."""
    seconds = 0.0
    for before, after in pairwise(trace):
        if "planned" in (before["event"], after["event"]):
            seconds += after["seconds"] - before["seconds"]
    return seconds


def _fixed(method: str, n: int, pool: Pool) -> Answered:
    """The mean over choices of n samples."""
    right, tokens = fixed(method, n, pool)
    return Answered(right=right, tokens=tokens)


def _batch(reply: dict[str, Any], items: Sequence[Item]) -> tuple[list[float], int]:
    """Which were right, and tokens spent."""
    texts = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
        for one in reply["data"]
        if one["error"] is None
    }
    right = [float(grade(one, texts.get(one.identity) or "")) for one in items]
    return right, reply["spent"]["tokens"]


def _compared(
    n: int,
    allowed: int,
    found: dict[str, tuple[list[float], int]],
    fixed_at: dict[str, list[float]],
) -> dict[str, Any]:
    def points(others: Sequence[float]) -> list[float]:
        both = zip(found["marginal"][0], others, strict=True)
        return _with_error([100 * (a - b) for a, b in both])

    return {
        "samples": n,
        "tokens": allowed,
        **{
            name: {"accuracy": _with_error(right), "spent": spent}
            for name, (right, spent) in found.items()
        },
        "points": points(found["equal"][0]),
        "over_fixed": {method: points(right) for method, right in fixed_at.items()},
    }


def _with_error(values: Sequence[float]) -> list[float]:
    return [mean(values), standard_error(values)]


def _row(answers: Sequence[Answered]) -> dict[str, Any]:
    return {
        "accuracy": _with_error([one.right for one in answers]),
        "tokens": _with_error([one.tokens for one in answers]),
    }


def _reach(curves: dict[str, Curve], problems: int, seed: int) -> list[dict[str, Any]]:
    """Of each fixed method at 16 samples."""
    rng = random.Random(seed)
    everything = range(problems)
    drawn = [[rng.randrange(problems) for _ in everything] for _ in range(500)]
    rows: list[dict[str, Any]] = []
    for ours in OURS:
        for method in [one for one in curves if one not in OURS]:
            pair = curves[ours], curves[method]
            again = sorted(_times(*pair, chosen) or 0.0 for chosen in drawn)
            rows.append(
                {
                    "ours": ours,
                    "method": f"{method}, n=16",
                    "times": _times(*pair, everything),
                    "interval": [again[len(again) // 40], again[-1 - len(again) // 40]],
                }
            )
    return rows


def _times(ours: Curve, other: Curve, chosen: Sequence[int]) -> float | None:
    """How many times our tokens a fixed method takes; None: ours is never as good."""
    right, tokens = _at(other[16], chosen)
    points = sorted((t, r) for r, t in (_at(of, chosen) for of in ours.values()))
    if points[0][1] >= right:
        return tokens / points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if below < right <= above:
            part = (right - below) / (above - below)
            return tokens / exp(log(low) + part * log(high / low))
    return None


def _at(answers: Sequence[Answered], chosen: Sequence[int]) -> tuple[float, float]:
    """Accuracy and tokens."""
    return fmean(answers[at].right for at in chosen), fmean(answers[at].tokens for at in chosen)


def _equal_tokens(curves: dict[str, Curve], items: list[Item]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs = [(ours, n, of) for ours in OURS for n, of in curves[ours].items()]
    for ours, n, mine in runs:
        for family, chosen in groups(items):
            tokens = _at(mine, chosen)[1]
            for method in [one for one in curves if one not in OURS]:
                curve = [curves[method][one] for one in NS]
                weights = shares([_at(of, chosen)[1] for of in curve], tokens)
                both = [*zip(weights, curve, strict=True)]
                points = [
                    100 * (mine[at].right - sum(w * of[at].right for w, of in both))
                    for at in chosen
                ]
                rows.append(
                    {
                        "ours": ours,
                        "budget": n,
                        "family": family,
                        "tokens": tokens,
                        "method": method,
                        "points": _with_error(points),
                    }
                )
    return rows


def _calibration(ours: str, curve: Curve) -> list[dict[str, Any]]:
    by_budget = [(str(n), answers) for n, answers in curve.items()]
    everything = [one for answers in curve.values() for one in answers]
    return [
        {"ours": ours, "budget": budget, "tenths": found, "error": calibration_error(found)}
        for budget, answers in [*by_budget, ("all", everything)]
        for found in [tenths((one.confidence, bool(one.right)) for one in answers)]
    ]


def _abstention(curve: Curve) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n, answers in curve.items():
        surest = sorted(answers, key=lambda one: -one.confidence)
        for share in (0.25, 0.5, 0.75, 1.0):
            kept = surest[: max(1, round(share * len(surest)))]
            accuracy = fmean(one.right for one in kept)
            rows.append({"budget": n, "share": share, "accuracy": accuracy})
    return rows


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=150)
    rows = Table(title="± is one standard error over problems")
    for heading in ("method", "n", "family", "accuracy", "tokens"):
        rows.add_column(heading)
    for row in figures["rows"]:
        accuracy = "{:.3f} ± {:.3f}".format(*row["accuracy"])
        tokens = "{:.0f} ± {:.0f}".format(*row["tokens"])
        rows.add_row(row["method"], str(row["n"]), row["family"], accuracy, tokens)
    console.print(rows)
    for row in figures["reach"]:
        low, high = row["interval"]
        times = "never" if row["times"] is None else f"{row['times']:.2f} ({low:.2f}-{high:.2f})"
        console.print(f"tokens of {row['method']} over those of {row['ours']}: {times}")
    equal = Table(title="Compute-optimal over fixed strategies at its own tokens, points")
    for heading in ("method", "budget", "family", "tokens", "against", "points"):
        equal.add_column(heading)
    for row in figures["equal_tokens"]:
        points = "{:+.1f} ± {:.1f}".format(*row["points"])
        tokens = f"{row['tokens']:.0f}"
        cells = (row["ours"], str(row["budget"]), row["family"], tokens, row["method"], points)
        equal.add_row(*cells)
    console.print(equal)
    for row in figures["calibration"]:
        title = f"calibration error of {row['ours']}, budget {row['budget']}"
        console.print(f"{title}: {row['error']:.3f}")
    console.print(f"planning takes {100 * figures['overhead']:.2f} % of the wall time")
    batches = Table(title="Many problems under one budget")
    fixed_ones = [*figures["batches"][0]["over_fixed"]]
    over = [f"over {method}" for method in ("equal", *fixed_ones)]
    for heading in ("samples' tokens", "marginal", "equal", *over, "spent", "of"):
        batches.add_column(heading)
    for row in figures["batches"]:
        batches.add_row(
            str(row["samples"]),
            *("{:.3f} ± {:.3f}".format(*row[one]["accuracy"]) for one in ("marginal", "equal")),
            *(
                "{:+.1f} ± {:.1f}".format(*points)
                for points in (row["points"], *row["over_fixed"].values())
            ),
            f"{row['marginal']['spent']:,}, {row['equal']['spent']:,}",
            f"{row['tokens']:,}",
        )
    console.print(batches)


def _plot(figures: dict[str, Any], path: str) -> None:
    with panels(path, 2, 3, (16, 9)) as axes:
        methods = list(dict.fromkeys(row["method"] for row in figures["rows"]))
        for axis, family in zip(axes[0], (*FAMILIES, "all"), strict=True):
            for method in methods:
                mine = [
                    row
                    for row in figures["rows"]
                    if (row["method"], row["family"]) == (method, family)
                ]
                axis.errorbar(
                    [row["tokens"][0] for row in mine],
                    [row["accuracy"][0] for row in mine],
                    yerr=[row["accuracy"][1] for row in mine],
                    marker="o",
                    capsize=3,
                    label=method,
                )
            axis.set(xscale="log", title=f"{family} problems", xlabel="tokens per problem")
            axis.set_ylabel("accuracy")
            axis.legend(fontsize=8)
        reliability, abstaining, unused = axes[1]
        unused.set_axis_off()
        parts = figures["calibration"][-1]["tenths"]
        reliability.plot([0, 1], [0, 1], color="grey")
        reliability.plot([said for _, said, _ in parts], [so for *_, so in parts], marker="o")
        reliability.set(title="all budgets", xlabel="confidence", ylabel="share right")
        for n in dict.fromkeys(row["budget"] for row in figures["abstention"]):
            mine = [row for row in figures["abstention"] if row["budget"] == n]
            abstaining.plot(
                [row["share"] for row in mine],
                [row["accuracy"] for row in mine],
                marker="o",
                label=f"budget of {n} samples",
            )
        abstaining.set(xlabel="share answered, surest first", ylabel="accuracy", title="abstention")
        abstaining.legend(fontsize=8)
