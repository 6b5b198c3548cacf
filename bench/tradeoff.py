"""Where the next operation should go: into training an adapter, or into search with what is there.

Every policy (the base, and each `--adapters NAME=PATH`) answers the same held-out problems by every
strategy. The price of an answer is what generating and judging it took, and a share of the
training: what the adapter's manifest says it took, over `--queries` answers. Operations: two per
parameter and token that the engine worked on (Kaplan et al. 2020), cached prompt tokens left out,
embeddings left out, the adapters' own parameters included.

JSON: `rows`, a list of {policy, strategy, family ("all" for all), problems, accuracy [value,
standard error], gain [points over one sample of the base, standard error, paired], tokens,
inference_flops, total_flops {queries: value}}; `training_flops` by policy; `frontier`, by family
and number of queries, what no other beats in both accuracy and price, cheapest first.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

import httpx
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from bench import bare
from bench.plot import panels
from bench.serving import ask_all, bar, server
from bench.stats import mean, standard_error
from finetune.ledger import FORWARD
from finetune.tiny.problems import exam, grade
from finetune.tiny.solution import Family, Item
from models import MULL_TINY


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one problem; `read` are the tokens that the engine worked on."""

    right: bool
    tokens: int
    read: int


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters", metavar="NAME=PATH", nargs="*", default=[], help="policies beside the base"
    )
    parser.add_argument("--verifier", metavar="NAME=PATH", help="a verifier adapter to judge by")
    parser.add_argument(
        "--calibrations", metavar="DIR", help="what compute-optimal plans by; others get its rule"
    )
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[1_000, 100_000], help="that share a training"
    )
    parser.add_argument("--families", nargs="+", choices=get_args(Family), default=None)
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy against operations there")


def run(options: argparse.Namespace) -> None:
    folders = dict(one.split("=", 1) for one in options.adapters)
    families = tuple(options.families or get_args(Family))
    items = exam(options.seed, options.problems, families)
    served = [*options.adapters, *([options.verifier] if options.verifier else [])]
    flags = ["--enable-lora", "--max-loras", str(1 + len(served)), "--lora-modules", *served]
    known = {"MULL_CALIBRATIONS": options.calibrations} if options.calibrations else {}
    flags = flags if served and not options.url else []
    with server(options.url, options.path, flags, **known) as base:
        strategies = _strategies(options.verifier and options.verifier.split("=")[0])
        answered = asyncio.run(_measure(base, items, [*folders], strategies, options))
    model = Path(options.path or MULL_TINY)
    sizes = {"base": _parameters(model)}
    sizes |= {name: sizes["base"] + _parameters(Path(path)) for name, path in folders.items()}
    training = {"base": 0.0} | {name: _training(Path(path)) for name, path in folders.items()}
    groups = {
        family: [at for at, one in enumerate(items) if family in ("all", one.family)]
        for family in (*families, "all")
    }
    rows = [
        {"policy": policy, "strategy": strategy, "family": family}
        | _worth([mine[at] for at in chosen], [answered["base", "one sample"][at] for at in chosen])
        | _price([mine[at] for at in chosen], sizes[policy], training[policy], options.queries)
        for (policy, strategy), mine in answered.items()
        for family, chosen in groups.items()
    ]
    figures = {
        "seed": options.seed,
        "parameters": sizes,
        "training_flops": training,
        "queries": options.queries,
        "rows": rows,
        "frontier": {
            f"{family}, {queries} queries": _frontier(rows, family, queries)
            for family in groups
            for queries in options.queries
        },
    }
    _show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures, list(groups), options.plot)


def _strategies(verifier: str | None) -> dict[str, dict[str, Any]]:
    """The fields that each adds to a request."""
    by: Any = "likelihood" if verifier is None else {"kind": "adapter", "adapter": verifier}
    strategies: dict[str, dict[str, Any]] = {"one sample": {}, "greedy": {"temperature": 0}}
    for n in (4, 16):
        strategies |= {
            f"self-consistency {n}": {"strategy": {"kind": "self_consistency", "n": n}},
            f"best-of-{n}": {"strategy": {"kind": "best_of_n", "n": n, "verifier": by}},
        }
    beam = {"kind": "beam_search", "width": 4, "branch": 4, "score": "min", "verifier": by}
    return strategies | {
        "beam 4 x 4": {"strategy": beam},
        "compute-optimal": {"strategy": {"kind": "compute_optimal"}},
    }


async def _measure(
    base: str,
    items: list[Item],
    adapters: Sequence[str],
    strategies: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> dict[tuple[str, str], list[Answered]]:
    """By policy and strategy, of all items."""
    places = {item.identity: at for at, item in enumerate(items)}
    answered: dict[tuple[str, str], list[Answered]] = {}
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:

        async def ask(item: Item, model: str, fields: dict[str, Any]) -> Answered:
            seed = options.seed + 1000 * places[item.identity]
            body = await bare.ask(client, model, item, seed=seed, **fields)
            usage, spent = body["usage"], body.get("mull", {}).get("usage")
            details = usage.get("prompt_tokens_details") or {}
            prompt = (
                usage["prompt_tokens"] - (details.get("cached_tokens") or 0)
                if spent is None
                else spent["engine_prompt_tokens"] - spent["engine_cached_tokens"]
            )
            return Answered(
                right=grade(item, body["choices"][0]["message"]["content"]),
                tokens=usage["completion_tokens"],
                read=usage["completion_tokens"] + prompt,
            )

        with bar() as progress:
            for policy in ("base", *adapters):
                model = options.model if policy == "base" else policy
                for strategy, fields in strategies.items():
                    answered[policy, strategy] = await ask_all(
                        items,
                        # The salt keeps a prompt that another has paid for out of the price.
                        lambda item, model=model, fields=fields | {"cache_salt": strategy}: ask(
                            item, model, fields
                        ),
                        clients=options.clients,
                        progress=progress,
                        label=f"{policy}: {strategy}",
                    )
    return answered


def _parameters(folder: Path) -> int:
    """Of a model or an adapter, without embeddings."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping
                if "embed" not in name:
                    total += prod(weights.get_slice(name).get_shape())
    return total


def _training(adapter: Path) -> float:
    return float(json.loads((adapter / "manifest.json").read_text())["compute"]["flops"])


def _worth(mine: list[Answered], plain: list[Answered]) -> dict[str, Any]:
    right = [float(one.right) for one in mine]
    gains = [100.0 * (one.right - other.right) for one, other in zip(mine, plain, strict=True)]
    return {
        "problems": len(mine),
        "accuracy": [mean(right), standard_error(right)],
        "gain": [mean(gains), standard_error(gains)],
    }


def _price(
    mine: list[Answered], parameters: int, training: float, queries: Sequence[int]
) -> dict[str, Any]:
    inference = FORWARD * parameters * mean([float(one.read) for one in mine])
    return {
        "tokens": mean([float(one.tokens) for one in mine]),
        "inference_flops": inference,
        "total_flops": {str(count): inference + training / count for count in queries},
    }


def _frontier(rows: list[dict[str, Any]], family: str, queries: int) -> list[str]:
    """What no other beats in both accuracy and price, cheapest first."""
    mine = [row for row in rows if row["family"] == family]
    best, found = -1.0, list[str]()
    for row in sorted(
        mine, key=lambda row: (row["total_flops"][str(queries)], -row["accuracy"][0])
    ):
        if row["accuracy"][0] > best:
            best = row["accuracy"][0]
            found.append(f"{row['policy']}, {row['strategy']}")
    return found


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=150)
    queries = figures["queries"]
    table = Table(title="± is one standard error; operations per answer, in millions (MF)")
    for heading in ("policy", "strategy", "family"):
        table.add_column(heading)
    for heading in ("accuracy", "over base", "inference", *(f"at {q:,} answers" for q in queries)):
        table.add_column(heading, justify="right")
    for row in figures["rows"]:
        table.add_row(
            row["policy"],
            row["strategy"],
            row["family"],
            "{:.3f} ± {:.3f}".format(*row["accuracy"]),
            "{:+.1f} ± {:.1f}".format(*row["gain"]),
            f"{row['inference_flops'] / 1e6:,.0f}",
            *(f"{row['total_flops'][str(q)] / 1e6:,.0f}" for q in queries),
        )
    console.print(table)
    for name, found in figures["frontier"].items():
        console.print(f"[bold]{name}[/]: {' → '.join(found)}")


def _plot(figures: dict[str, Any], families: Sequence[str], path: str) -> None:
    """Accuracy against price; named is what no other beats in both."""
    queries = figures["queries"]
    size = (4.2 * len(families), 3.8 * len(queries))
    with panels(path, len(queries), len(families), size) as axes:
        for line, count in zip(axes, queries, strict=True):
            for axis, family in zip(line, families, strict=True):
                best = figures["frontier"][f"{family}, {count} queries"]
                for policy in figures["training_flops"]:
                    mine = [
                        row
                        for row in figures["rows"]
                        if (row["policy"], row["family"]) == (policy, family)
                    ]
                    axis.errorbar(
                        [row["total_flops"][str(count)] for row in mine],
                        [row["accuracy"][0] for row in mine],
                        yerr=[row["accuracy"][1] for row in mine],
                        marker="o",
                        linestyle="none",
                        capsize=2,
                        label=policy,
                    )
                    for row in mine:
                        if f"{policy}, {row['strategy']}" in best:
                            place = (row["total_flops"][str(count)], row["accuracy"][0])
                            axis.annotate(
                                row["strategy"],
                                place,
                                textcoords="offset points",
                                xytext=(-4, 3),
                                ha="right",
                                fontsize=6,
                            )
                axis.margins(x=0.15)
                axis.set_xscale("log")
                axis.set_title(f"{family}, training shared by {count:,}", fontsize=9)
                axis.set_xlabel("operations per answer")
                axis.set_ylabel("accuracy")
                axis.legend(fontsize=7)
