"""Search against best-of-N with the same verifier: accuracy, tokens, wall time, cached prompts.

Every method answers the same held-out problems. Best-of-N and votes are read off one pool of 32
samples a problem: the mean over choices of N of them. `--verifier NAME=PATH` serves a verifier
adapter; with it they are measured by likelihood, by the adapter, and by both together, and searches
are guided by the adapter. JSON: `rows` has one object per method and family ("all" for all):
`problems`, `accuracy` and `tokens` (generated per problem, verifiers' included) as [value, standard
error], and, of what was asked for by itself, `seconds` (median per problem) and `cached` (share of
the engine's prompt tokens that were in the prefix cache).
`differences`: accuracy in points as [value, standard error], paired by problem. `equal_tokens`:
each search against best-of-N at its own number of tokens, interpolated on the curve of best-of-N.
`pace`: for each search, how many times the seconds of best-of-16 it takes for a token, the median
over problems that were asked one at a time. `cached`: of the first search after worked examples,
`prompt` (tokens before the first step, mean), and of the prompt tokens of all continuations, which
`share` came from the prefix cache.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench import bare
from bench.plot import panels
from bench.pool import Pool, fixed, pooled
from bench.serving import ask_all, bar, server
from bench.stats import mean, median, shares, standard_error
from finetune.tiny.problems import FAMILIES, draw, exam, grade
from finetune.tiny.solution import Item, solution

_BEAM: dict[str, Any] = {"kind": "beam_search", "score": "min", "width": 4, "branch": 4}
SEARCHES: dict[str, dict[str, Any]] = {
    "beam 4 x 4": _BEAM,
    "balanced 4 x 4": _BEAM | {"allocate": "balanced"},
    "diverse 4 x 4": _BEAM | {"allocate": "diverse"},
    "particles 16": _BEAM | {"width": 16, "branch": 1, "allocate": "resample"},
    "tree, best first": {"kind": "tree_of_thoughts", "search": "best_first", "branch": 4},
}
"""The step-wise searches."""

NS = (4, 8, 16, 32)
"""Samples of best-of-N, whose curve searches are compared with."""

PACED = 12
"""Problems of each family that are asked one at a time."""

SHOTS = (0, 2, 4)
"""Worked examples before the question, where the prefix cache is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one problem, or of choices from its pool, which took no time of their own.

    `tokens` are all that were generated.
    """

    right: float
    tokens: float
    seconds: float | None = None
    prompt: int = 0
    cached: int = 0
    continued: int = 0
    continued_cached: int = 0


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verifier", metavar="NAME=PATH", help="a verifier adapter to serve and to judge by"
    )
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("likelihood", "adapter", "both"),
        help="who is to judge best-of-N (default: all there are)",
    )
    parser.add_argument(
        "--searches", nargs="+", choices=[*SEARCHES], default=[*SEARCHES], help="default: all"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy against tokens there")


def run(options: argparse.Namespace) -> None:
    if options.url and options.verifier and "=" in options.verifier:
        raise SystemExit("a running --url serves its own adapters: give --verifier its name alone")
    if options.by and not options.verifier and {*options.by} != {"likelihood"}:
        raise SystemExit("--by adapter, and --by both, need --verifier")
    items = exam(options.seed, options.problems)
    flags = ["--enable-lora", "--lora-modules", options.verifier] if options.verifier else []
    adapter = options.verifier.split("=")[0] if options.verifier else None
    judges = {
        name: one
        for name, one in verifiers(adapter).items()
        if options.by is None or name in options.by
    }
    searches = _searches(judges, options.searches)
    with server(options.url, options.path, [] if options.url else flags) as base:
        measuring = _measure(base, items, judges, searches, options)
        answered, paced, shown = asyncio.run(measuring)
    rows = [
        {"method": method, "family": family, **_row([answers[at] for at in chosen])}
        for method, answers in answered.items()
        for family, chosen in groups(items)
    ]
    figures = {
        "seed": options.seed,
        "clients": options.clients,
        "searches": searches,
        "rows": rows,
        "differences": _differences(answered, items, judges, searches),
        "equal_tokens": _equal_tokens(answered, items, _guide(judges), searches),
        "pace": _pace(paced),
        "cached": [
            {"examples": shots, "prompt": prompt, "share": _share(answers)}
            for shots, (prompt, answers) in shown.items()
        ],
    }
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures, judges, options.plot)


def verifiers(adapter: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"likelihood": "likelihood"}
    if adapter:
        of = {"kind": "adapter", "adapter": adapter}
        found["adapter"] = of
        found["both"] = {"kind": "ensemble", "of": ["likelihood", of]}
    return found


def _guide(verifiers: dict[str, Any]) -> str:
    """Who guides searches."""
    return "adapter" if "adapter" in verifiers else next(iter(verifiers))


def _searches(verifiers: dict[str, Any], titles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each search adds to a request."""
    guide = _guide(verifiers)
    judged = {"verifier": verifiers[guide]}
    return {f"{title} by {guide}": {"strategy": SEARCHES[title] | judged} for title in titles}


def _read_off(pools: dict[str, list[Pool]]) -> dict[str, list[Answered]]:
    """What choices of N samples elect, by verifier."""

    def chosen(method: str, n: int, name: str) -> list[Answered]:
        found = [fixed(method, n, pool) for pool in pools[name]]
        return [Answered(right=right, tokens=tokens) for right, tokens in found]

    answered = {"majority, n=16": chosen("majority", 16, next(iter(pools)))}
    for name in pools:
        answered |= {f"best-of-{n} by {name}": chosen("best-of-n", n, name) for n in NS}
        answered[f"weighted vote of 16 by {name}"] = chosen("weighted vote", 16, name)
    return answered


async def _measure(
    base: str,
    items: list[Item],
    verifiers: dict[str, Any],
    searches: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> tuple[
    dict[str, list[Answered]], dict[str, list[Answered]], dict[int, tuple[float, list[Answered]]]
]:
    """By method, of all items; then of some, one at a time with the methods in turns.

    Then by number of worked examples: tokens of the prompt, and beam searches after them.
    """
    places = {item.identity: at for at, item in enumerate(items)}
    guide, [first, *_] = _guide(verifiers), searches.values()
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        def seed(item: Item) -> int:
            return options.seed + 1000 * places[item.identity]

        async def pool(item: Item, verifier: Any) -> Pool:
            body = bare.question(options.model, item, seed=seed(item))
            return await pooled(client, body | {"n": NS[-1]}, item, verifier)

        async def ask(item: Item, fields: dict[str, Any]) -> Answered:
            began = time.monotonic()
            found = await bare.ask(client, options.model, item, seed=seed(item), **fields)
            usage = found.get("mull", {}).get("usage", {})
            return Answered(
                right=float(grade(item, found["choices"][0]["message"]["content"])),
                tokens=found["usage"]["completion_tokens"],
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

            async def all_of(ask: Callable[[Item], Any], label: str) -> list[Any]:
                return await ask_all(
                    items, ask, clients=options.clients, progress=progress, label=label
                )

            methods = {"greedy": {"temperature": 0}} | searches
            answered: dict[str, list[Answered]] = {
                method: await all_of(lambda item, fields=fields: ask(item, fields), method)
                for method, fields in methods.items()
            }
            pools: dict[str, list[Pool]] = {
                name: await all_of(
                    lambda item, verifier=verifier: pool(item, verifier),
                    f"{NS[-1]} samples by {name}",
                )
                for name, verifier in verifiers.items()
            }
            answered |= _read_off(pools)
            some = [item for one in FAMILIES for item in items if item.family == one]
            some = some[:: max(1, len(some) // (PACED * len(FAMILIES)))]
            best = {"kind": "best_of_n", "n": 16, "verifier": verifiers[guide]}
            timed = {f"best-of-16 by {guide}": {"strategy": best}} | searches
            paced: dict[str, list[Answered]] = {method: [] for method in timed}
            task = progress.add_task("one at a time", total=len(some) * len(paced))
            for item in some:
                for method, answers in paced.items():
                    answers.append(await ask(item, timed[method]))
                    progress.advance(task)
            shown: dict[int, tuple[float, list[Answered]]] = {}
            task = progress.add_task("cached prompts", total=len(some) * len(SHOTS))
            for shots in SHOTS:
                asked = [_after(shots, item, options.seed) for item in some]
                lengths = [float(await length(messages)) for messages in asked]
                shown[shots] = (mean(lengths), [])
                for item, messages in zip(some, asked, strict=True):
                    answer = await ask(item, first | {"messages": messages})
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


def _share(answers: list[Answered]) -> float | None:
    """None if all answers were given in one step."""
    continued = sum(one.continued for one in answers)
    return sum(one.continued_cached for one in answers) / continued if continued else None


def groups(items: list[Item]) -> list[tuple[str, list[int]]]:
    families = [
        (one, [at for at, item in enumerate(items) if item.family == one]) for one in FAMILIES
    ]
    return [*families, ("all", list(range(len(items))))]


def _row(answers: list[Answered]) -> dict[str, Any]:
    prompt = sum(one.prompt for one in answers)
    seconds = [one.seconds for one in answers if one.seconds is not None]
    return {
        "problems": len(answers),
        "accuracy": _with_error([one.right for one in answers]),
        "tokens": _with_error([one.tokens for one in answers]),
        "seconds": median(seconds) if seconds else None,
        "cached": sum(one.cached for one in answers) / prompt if prompt else None,
    }


def _with_error(values: list[float]) -> list[float]:
    return [mean(values), standard_error(values)]


def _differences(
    answered: dict[str, list[Answered]],
    items: list[Item],
    verifiers: dict[str, Any],
    searches: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Best-of-16 against greedy and against the majority, and searches against best-of-16."""
    pairs: list[tuple[str, str]] = []
    for name in verifiers:
        best = f"best-of-16 by {name}"
        for choice in (best, f"weighted vote of 16 by {name}"):
            pairs += [(choice, "majority, n=16"), (choice, "greedy")]
    best = f"best-of-16 by {_guide(verifiers)}"
    pairs += [(search, best) for search in searches]
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
    answered: dict[str, list[Answered]],
    items: list[Item],
    guide: str,
    searches: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Each search against best-of-N with the same verifier and as many tokens."""
    rows: list[dict[str, Any]] = []
    for search in searches:
        for family, chosen in groups(items):
            curve = [[answered[f"best-of-{n} by {guide}"][at] for at in chosen] for n in NS]
            mine = [answered[search][at] for at in chosen]
            weights = shares([_tokens(one) for one in curve], _tokens(mine))
            points = [
                100.0 * (own.right - sum(w * one.right for w, one in zip(weights, at, strict=True)))
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
    return mean([one.tokens for one in answers])


def _pace(paced: dict[str, list[Answered]]) -> list[dict[str, Any]]:
    [(_, best), *searches] = paced.items()

    def a_token(one: Answered) -> float:
        return _seconds(one) / one.tokens

    return [
        {
            "search": search,
            "times_seconds_per_token": median(
                [a_token(one) / a_token(other) for one, other in zip(mine, best, strict=True)]
            ),
            "seconds": median([_seconds(one) for one in mine]),
            "best_of_16_seconds": median([_seconds(one) for one in best]),
        }
        for search, mine in searches
    ]


def _seconds(one: Answered) -> float:
    assert one.seconds is not None
    return one.seconds


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
            "" if row["seconds"] is None else f"{row['seconds']:.2f}",
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
    cached = Table(title="Prompt tokens of continuations that were in the prefix cache")
    for heading in ("worked examples", "tokens of the prompt", "cached"):
        cached.add_column(heading)
    for row in figures["cached"]:
        share = "" if row["share"] is None else f"{100 * row['share']:.1f} %"
        cached.add_row(str(row["examples"]), f"{row['prompt']:.0f}", share)
    console.print(cached)


def _plot(figures: dict[str, Any], verifiers: dict[str, Any], path: str) -> None:
    size = (12, 4.5 * len(verifiers))
    with panels(path, len(verifiers), len(FAMILIES), size) as axes:
        for line, name in zip(axes, verifiers, strict=True):
            for axis, family in zip(line, FAMILIES, strict=True):
                mine = {row["method"]: row for row in figures["rows"] if row["family"] == family}
                curve = [mine[f"best-of-{n} by {name}"] for n in NS]
                searches = figures["searches"] if name == _guide(verifiers) else {}
                rest = [*searches, "greedy", "majority, n=16"]
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
