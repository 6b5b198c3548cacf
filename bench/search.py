"""Search against best-of-N with the same verifier: accuracy, tokens, wall time, cached prompts.

Every method answers the same held-out problems. `--verifier NAME=PATH` serves a verifier adapter;
with it everything is measured by likelihood, by the adapter, and by both together. JSON: `rows`
has one object per method and family ("all" for all): `problems`, `accuracy` and
`tokens` (generated per problem, verifiers' included) as [value, standard error], `seconds`
(median per problem), `cached` (share of the engine's prompt tokens that were in the prefix cache).
`differences`: accuracy in points as [value, standard error], paired by problem. `equal_tokens`:
each search against best-of-N at its own number of tokens, interpolated on the curve of best-of-N.
`pace`: for each search, how many times the seconds of best-of-16 it takes for a token, the median
over problems that were asked one at a time. `cached`: of beam search after so many worked examples,
`prompt` (tokens before the first step, mean), and of the prompt tokens of all continuations, which
`share` came from the prefix cache.
"""

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench import bare
from bench.plot import panels
from bench.serving import ask_all, bar, server
from bench.stats import mean, median, shares, standard_error
from finetune.tiny.problems import FAMILIES, draw, exam, grade
from finetune.tiny.solution import Item, solution

NS = (4, 8, 16, 32)
"""Samples of best-of-N, whose curve searches are compared with."""

PACED = 24
"""Problems of each family that are asked one at a time."""

SHOTS = (0, 2, 4)
"""Worked examples before the question, where the prefix cache is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one problem; `tokens` are all that were generated."""

    right: bool
    tokens: int
    seconds: float
    prompt: int
    cached: int
    continued: int
    continued_cached: int


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verifier", metavar="NAME=PATH", help="a verifier adapter to serve and to judge by"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy against tokens there")


def run(options: argparse.Namespace) -> None:
    if options.url and options.verifier and "=" in options.verifier:
        raise SystemExit("a running --url serves its own adapters: give --verifier its name alone")
    items = exam(options.seed, options.problems)
    flags = ["--enable-lora", "--lora-modules", options.verifier] if options.verifier else []
    adapter = options.verifier.split("=")[0] if options.verifier else None
    methods = _methods(adapter)
    with server(options.url, options.path, [] if options.url else flags) as base:
        measuring = _measure(base, items, methods, verifiers(adapter), options)
        answered, paced, shown = asyncio.run(measuring)
    rows = [
        {"method": method, "family": family, **_row([answers[at] for at in chosen])}
        for method, answers in answered.items()
        for family, chosen in groups(items)
    ]
    figures = {
        "seed": options.seed,
        "clients": options.clients,
        "methods": methods,
        "rows": rows,
        "differences": _differences(answered, items, verifiers(adapter)),
        "equal_tokens": _equal_tokens(answered, items, verifiers(adapter)),
        "pace": _pace(paced, verifiers(adapter)),
        "cached": [
            {"examples": shots, "prompt": prompt, "share": _share(answers)}
            for shots, (prompt, answers) in shown.items()
        ],
    }
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures, verifiers(adapter), options.plot)


def verifiers(adapter: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"likelihood": "likelihood"}
    if adapter:
        of = {"kind": "adapter", "adapter": adapter}
        found["adapter"] = of
        found["both"] = {"kind": "ensemble", "of": ["likelihood", of]}
    return found


def _methods(adapter: str | None) -> dict[str, dict[str, Any]]:
    """The fields that each method adds to a request."""
    methods: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "majority, n=16": {
            "strategy": {"kind": "self_consistency", "n": 16, "early_stop": "never"}
        },
    }
    beam = {"kind": "beam_search", "score": "min"}
    for name, verifier in verifiers(adapter).items():
        judged = {"verifier": verifier}
        for n in NS:
            methods[f"best-of-{n} by {name}"] = {"strategy": {"kind": "best_of_n", "n": n} | judged}
        vote = {"kind": "best_of_n", "n": 16, "select": "weighted"}
        methods[f"weighted vote of 16 by {name}"] = {"strategy": vote | judged}
        for title, search in {
            "beam 4 x 4": beam | {"width": 4, "branch": 4},
            "balanced 4 x 4": beam | {"width": 4, "branch": 4, "allocate": "balanced"},
            "diverse 4 x 4": beam | {"width": 4, "branch": 4, "allocate": "diverse"},
            "particles 16": beam | {"width": 16, "branch": 1, "allocate": "resample"},
            "tree, best first": {"kind": "tree_of_thoughts", "search": "best_first", "branch": 4},
        }.items():
            methods[f"{title} by {name}"] = {"strategy": search | judged}
    return methods


def _searches(name: str, answered: dict[str, Any]) -> list[str]:
    """The step-wise searches by a verifier."""
    return [
        method
        for method in answered
        if method.endswith(f" by {name}") and not method.startswith(("best-of", "weighted"))
    ]


async def _measure(
    base: str,
    items: list[Item],
    methods: dict[str, dict[str, Any]],
    verifiers: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[
    dict[str, list[Answered]], dict[str, list[Answered]], dict[int, tuple[float, list[Answered]]]
]:
    """By method, of all items at once, and of some one at a time with the methods in turns.

    Then by number of worked examples: tokens of the prompt, and beam searches after them.
    """
    places = {item.identity: at for at, item in enumerate(items)}
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        async def ask(item: Item, fields: dict[str, Any]) -> Answered:
            began = time.monotonic()
            seed = options.seed + 1000 * places[item.identity]
            body = await bare.ask(client, options.model, item, seed=seed, **fields)
            usage = body.get("mull", {}).get("usage", {})
            return Answered(
                right=grade(item, body["choices"][0]["message"]["content"]),
                tokens=body["usage"]["completion_tokens"],
                seconds=time.monotonic() - began,
                prompt=usage.get("engine_prompt_tokens", 0),
                cached=usage.get("engine_cached_tokens", 0),
                continued=usage.get("continuation_prompt_tokens", 0),
                continued_cached=usage.get("continuation_cached_tokens", 0),
            )

        async def length(messages: list[dict[str, str]]) -> int:
            body = {"model": options.model, "messages": messages}
            reply = await client.post("/tokenize", json=body)
            return reply.raise_for_status().json()["count"]

        with bar() as progress:
            answered = {
                method: await ask_all(
                    items,
                    lambda item, fields=fields: ask(item, fields),
                    clients=options.clients,
                    progress=progress,
                    label=method,
                )
                for method, fields in methods.items()
            }
            some = [item for one in FAMILIES for item in items if item.family == one]
            some = some[:: max(1, len(some) // (PACED * len(FAMILIES)))]
            timed = [name for name in methods if name.startswith("best-of-16")]
            for name in verifiers:
                timed += _searches(name, methods)
            paced: dict[str, list[Answered]] = {method: [] for method in timed}
            task = progress.add_task("one at a time", total=len(some) * len(paced))
            for item in some:
                for method, answers in paced.items():
                    answers.append(await ask(item, methods[method]))
                    progress.advance(task)
            shown: dict[int, tuple[float, list[Answered]]] = {}
            task = progress.add_task("cached prompts", total=len(some) * len(SHOTS))
            for shots in SHOTS:
                asked = [_after(shots, item, options.seed) for item in some]
                lengths = [float(await length(messages)) for messages in asked]
                fields = methods["beam 4 x 4 by likelihood"]
                shown[shots] = (mean(lengths), [])
                for item, messages in zip(some, asked, strict=True):
                    answer = await ask(item, fields | {"messages": messages})
                    shown[shots][1].append(answer)
                    progress.advance(task)
    return answered, paced, shown


def _after(shots: int, item: Item, seed: int) -> list[dict[str, str]]:
    """A problem after worked examples of its family."""
    rng = random.Random(seed)
    worked = [draw(rng, held_out=False, family=item.family) for _ in range(shots)]
    turns = [
        turn for one in worked for turn in (("user", one.prompt), ("assistant", solution(one, rng)))
    ]
    return [{"role": role, "content": text} for role, text in (*turns, ("user", item.prompt))]


def _share(answers: list[Answered]) -> float:
    return sum(one.continued_cached for one in answers) / sum(one.continued for one in answers)


def groups(items: list[Item]) -> list[tuple[str, list[int]]]:
    families = [
        (one, [at for at, item in enumerate(items) if item.family == one]) for one in FAMILIES
    ]
    return [*families, ("all", list(range(len(items))))]


def _row(answers: list[Answered]) -> dict[str, Any]:
    prompt = sum(one.prompt for one in answers)
    return {
        "problems": len(answers),
        "accuracy": _with_error([float(one.right) for one in answers]),
        "tokens": _with_error([float(one.tokens) for one in answers]),
        "seconds": median([one.seconds for one in answers]),
        "cached": sum(one.cached for one in answers) / prompt if prompt else None,
    }


def _with_error(values: list[float]) -> list[float]:
    return [mean(values), standard_error(values)]


def _differences(
    answered: dict[str, list[Answered]], items: list[Item], verifiers: dict[str, Any]
) -> list[dict[str, Any]]:
    """Best-of-16 against greedy and against the majority, and searches against best-of-16."""
    pairs: list[tuple[str, str]] = []
    for name in verifiers:
        best = f"best-of-16 by {name}"
        for choice in (best, f"weighted vote of 16 by {name}"):
            pairs += [(choice, "majority, n=16"), (choice, "greedy")]
        pairs += [(search, best) for search in _searches(name, answered)]
    return [
        {
            "one": one,
            "other": other,
            "family": family,
            "points": _with_error(
                [100.0 * (answered[one][at].right - answered[other][at].right) for at in chosen]
            ),
        }
        for one, other in pairs
        for family, chosen in groups(items)
    ]


def _equal_tokens(
    answered: dict[str, list[Answered]], items: list[Item], verifiers: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each search against best-of-N with the same verifier and as many tokens."""
    rows: list[dict[str, Any]] = []
    for name in verifiers:
        for search in _searches(name, answered):
            for family, chosen in groups(items):
                curve = [[answered[f"best-of-{n} by {name}"][at] for at in chosen] for n in NS]
                mine = [answered[search][at] for at in chosen]
                weights = shares([_tokens(one) for one in curve], _tokens(mine))
                points = [
                    100.0
                    * (own.right - sum(w * one.right for w, one in zip(weights, at, strict=True)))
                    for own, *at in zip(mine, *curve, strict=True)
                ]
                rows.append(
                    {
                        "search": search,
                        "family": family,
                        "tokens": _tokens(mine),
                        "n": sum(w * n for w, n in zip(weights, NS, strict=True)),
                        "points": _with_error(points),
                    }
                )
    return rows


def _tokens(answers: list[Answered]) -> float:
    return mean([float(one.tokens) for one in answers])


def _pace(paced: dict[str, list[Answered]], verifiers: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in verifiers:
        best = paced[f"best-of-16 by {name}"]
        for search in _searches(name, paced):
            ratios = [
                (mine.seconds / mine.tokens) / (other.seconds / other.tokens)
                for mine, other in zip(paced[search], best, strict=True)
            ]
            rows.append(
                {
                    "search": search,
                    "times_seconds_per_token": median(ratios),
                    "seconds": median([one.seconds for one in paced[search]]),
                    "best_of_16_seconds": median([one.seconds for one in best]),
                }
            )
    return rows


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=150)
    rows = Table(title="± is one standard error over problems")
    for heading in ("method", "family", "problems", "accuracy", "tokens", "seconds", "cached"):
        rows.add_column(heading, justify="left" if heading == "method" else "right")
    for row in figures["rows"]:
        rows.add_row(
            row["method"],
            row["family"],
            str(row["problems"]),
            "{:.3f} ± {:.3f}".format(*row["accuracy"]),
            "{:.0f} ± {:.0f}".format(*row["tokens"]),
            f"{row['seconds']:.2f}",
            "" if row["cached"] is None else f"{100 * row['cached']:.0f} %",
        )
    console.print(rows)
    differences = Table(title="Differences in points, paired by problem")
    for heading in ("one", "other", "family", "points"):
        differences.add_column(heading)
    for row in figures["differences"]:
        points = "{:+.1f} ± {:.1f}".format(*row["points"])
        differences.add_row(row["one"], row["other"], row["family"], points)
    console.print(differences)
    equal = Table(title="Against best-of-N with the same verifier and as many tokens, in points")
    for heading in ("search", "family", "tokens", "N", "points"):
        equal.add_column(heading)
    for row in figures["equal_tokens"]:
        points = "{:+.1f} ± {:.1f}".format(*row["points"])
        equal.add_row(
            row["search"], row["family"], f"{row['tokens']:.0f}", f"{row['n']:.1f}", points
        )
    console.print(equal)
    pace = Table(title="One request at a time: seconds for a token, in those of best-of-16")
    for heading in ("search", "times", "seconds", "of best-of-16"):
        pace.add_column(heading)
    for row in figures["pace"]:
        pace.add_row(
            row["search"],
            f"{row['times_seconds_per_token']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['best_of_16_seconds']:.2f}",
        )
    console.print(pace)
    cached = Table(title="Prompt tokens of continuations that were in the prefix cache, beam 4 x 4")
    for heading in ("worked examples", "tokens of the prompt", "cached"):
        cached.add_column(heading)
    for row in figures["cached"]:
        cached.add_row(str(row["examples"]), f"{row['prompt']:.0f}", f"{100 * row['share']:.1f} %")
    console.print(cached)


def _plot(figures: dict[str, Any], verifiers: dict[str, Any], path: str) -> None:
    size = (12, 4.5 * len(verifiers))
    with panels(path, len(verifiers), len(FAMILIES), size) as axes:
        for line, name in zip(axes, verifiers, strict=True):
            for axis, family in zip(line, FAMILIES, strict=True):
                mine = {row["method"]: row for row in figures["rows"] if row["family"] == family}
                curve = [mine[f"best-of-{n} by {name}"] for n in NS]
                rest = [*_searches(name, mine), "greedy", "majority, n=16"]
                rest.append(f"weighted vote of 16 by {name}")
                for label, rows in [("best-of-N", curve), *((one, [mine[one]]) for one in rest)]:
                    axis.errorbar(
                        [row["tokens"][0] for row in rows],
                        [row["accuracy"][0] for row in rows],
                        yerr=[row["accuracy"][1] for row in rows],
                        marker="o",
                        capsize=3,
                        label=label.removesuffix(f" by {name}"),
                        linestyle="-" if len(rows) > 1 else "none",
                    )
                axis.set_xscale("log")
                axis.set_title(f"{family} problems, judged by {name}")
                axis.set_xlabel("generated tokens per problem")
                axis.set_ylabel("accuracy")
                axis.legend(fontsize=7)
