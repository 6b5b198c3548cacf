"""`mull-finetune data`: rows to learn from, out of what a server has answered.

A server that was started with `MULL_TRACES` keeps its runs as lines of JSON: what was asked, every
finished solution, a verifier's scores, the vote. Here they become demonstrations (the right
solutions: rejection sampling, STaR; Zelikman et al. 2022, arXiv:2203.14465), pairs of a right and a
wrong one of like length, labelled solutions, or steps with labels (Wang et al. 2024,
arXiv:2312.08935).
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from finetune import data
from finetune.graders import Grader, grader

SCHEMA_VERSION = 1

Kind = Literal["demonstrations", "pairs", "labelled", "steps"]
By = Literal["grader", "score", "votes"]


@dataclass(frozen=True, slots=True)
class Solution:
    """One that a model wrote, and whether it is right; None where nobody can tell."""

    text: str
    tokens: int
    right: bool | None


@dataclass(slots=True)
class Asked:
    """A prompt, and what was answered in all runs together; equal texts count once."""

    prompt: Any
    solutions: dict[str, Solution] = field(default_factory=dict)

    def those(self, right: bool) -> list[Solution]:
        """The right ones, or the wrong ones."""
        return [one for one in self.solutions.values() if one.right is right]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How a solution is known to be right."""

    by: By
    good: float = 0.9
    """A score from which on it is right, or a share of the votes."""
    bad: float = 0.1
    """A score up to which it is wrong."""
    verifier: str | None = None
    """The kind whose scores are believed; None: whichever a run had."""
    grade: Grader | None = None
    rows: dict[str, data.Row] = field(default_factory=dict)
    """By prompt as JSON, what the grader reads."""

    def of(self, run: dict[str, Any], solution: dict[str, Any]) -> bool | None:
        """Whether a solution of a run is right."""
        match self.by:
            case "grader":
                row = self.rows.get(key(run["prompt"]))
                assert self.grade is not None
                return None if row is None else self.grade(row, solution["text"]) >= 0.5
            case "score":
                score = solution["score"]
                if score is None or self.bad < score < self.good:
                    return None
                return score >= self.good
            case "votes":
                votes = run["votes"]
                if not votes or max(votes.values()) < self.good * sum(votes.values()):
                    return None
                return solution["answer"] == max(votes, key=lambda answer: votes[answer])


def key(prompt: Any) -> str:
    """A prompt as what it is known by."""
    return json.dumps(prompt, sort_keys=True)


def main(arguments: Sequence[str]) -> None:
    """Read traces, write rows, say what became of them."""
    parser = argparse.ArgumentParser(
        prog="mull-finetune data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from-traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--to", choices=get_args(Kind), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a file of rows, jsonl")
    parser.add_argument(
        "--by",
        choices=get_args(By),
        default="score",
        help="what tells right from wrong: a grader with known answers, the verifier's score, or "
        "the winner of the vote (default %(default)s)",
    )
    parser.add_argument("--verifier", metavar="KIND", help="only runs that it judged")
    parser.add_argument("--answers", metavar="FILE", help="rows of {prompt, answer} for a grader")
    parser.add_argument("--grader", default="answer", help="'answer' or module:function")
    parser.add_argument(
        "--good", type=float, help="right from this score (0.9) or share of votes (0.5) on"
    )
    parser.add_argument("--bad", type=float, default=0.1, help="wrong up to this score (0.1)")
    parser.add_argument(
        "--per-prompt", type=int, default=4, help="rows of one prompt at most (default 4)"
    )
    parser.add_argument(
        "--longer",
        type=float,
        default=1.25,
        help="pairs: how much longer the one may be than the other (default 1.25)",
    )
    parser.add_argument("--exclude", metavar="FILE", help="a test set; its prompts are left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if (options.by == "grader") != (options.answers is not None):
        parser.error("--by grader and --answers FILE go together")
    if options.per_prompt < 1 or options.longer < 1:
        parser.error("--per-prompt and --longer are 1 at least")
    good = options.good if options.good is not None else 0.5 if options.by == "votes" else 0.9
    if not 0 <= options.bad < good <= 1:
        parser.error("--bad is below --good, and both are in [0, 1]")
    truth = Truth(
        by=options.by,
        good=good,
        bad=options.bad,
        verifier=options.verifier,
        grade=grader(options.grader) if options.answers else None,
        rows={key(row["prompt"]): row for row in data.listed(data.read(options.answers))}
        if options.answers
        else {},
    )
    console, counts = Console(), Counter[str]()
    test = data.Exam(data.listed(data.read(options.exclude)) if options.exclude else [])
    asked = gathered(options.from_traces, truth, test, counts, console)
    rng = random.Random(options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        for one in asked:
            for row in rows(
                one, options.to, rng, most=options.per_prompt, longer=options.longer, counts=counts
            ):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    table = Table(title=f"{options.from_traces} to {options.to}", show_header=False)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    if not counts["rows"]:
        raise SystemExit("no row came of it: see what was left out, and --by, --good, --longer")
    console.print(f"[green]written[/] {options.out}")


def gathered(
    folder: Path, truth: Truth, test: data.Exam, counts: Counter[str], console: Console
) -> list[Asked]:
    """What was asked, in the order in which it was first; solutions that a limit cut are left out.

    Raises:
        SystemExit: There are no traces.
    """
    files = sorted(folder.glob("traces-*.jsonl"))
    if not files:
        raise SystemExit(f"no traces in {folder}: a server keeps some if MULL_TRACES names it")
    found: dict[str, Asked] = {}
    for file in track(files, "reading", console=console, transient=True):
        for line in file.read_text().splitlines():
            run = _run(line)
            if run is None:
                counts["lines that cannot be read"] += 1
                continue
            counts["runs"] += 1
            judge = run["strategy"].get("verifier") or {}
            if truth.verifier is not None and judge.get("kind") != truth.verifier:
                counts["runs left out: by another verifier, or none"] += 1
                continue
            if test.has({"prompt": run["prompt"]}):
                counts["runs left out: in the test set"] += 1
                continue
            asked = found.setdefault(key(run["prompt"]), Asked(run["prompt"]))
            for one in run["candidates"]:
                known = asked.solutions.get(one["text"])
                if one["complete"] and (known is None or known.right is None):
                    right = truth.of(run, one)
                    asked.solutions[one["text"]] = Solution(one["text"], one["tokens"], right)
    told = {True: "right", False: "wrong", None: "nobody can tell"}
    for asked in found.values():
        for one in asked.solutions.values():
            counts[told[one.right]] += 1
    counts["prompts"] = len(found)
    return list(found.values())


def _run(line: str) -> dict[str, Any] | None:
    """A line of a file; None if it is cut off or of another schema."""
    try:
        run = json.loads(line)
    except ValueError:
        return None
    return run if isinstance(run, dict) and run.get("schema_version") == SCHEMA_VERSION else None


def rows(
    asked: Asked,
    kind: Kind,
    rng: random.Random,
    *,
    most: int,
    longer: float,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """What one prompt gives, `most` rows at most; `counts` is told."""
    right, wrong = asked.those(True), asked.those(False)
    rng.shuffle(right)
    rng.shuffle(wrong)
    found: Iterable[dict[str, Any]]
    match kind:
        case "demonstrations":
            found = ({"completion": one.text} for one in right)
        case "pairs":
            found = (
                {"chosen": good.text, "rejected": bad.text}
                for good, bad in matched(right, wrong, longer)
            )
        case "labelled":
            both = [one for pair in zip(right, wrong, strict=False) for one in pair]
            found = ({"completion": one.text, "label": bool(one.right)} for one in both)
        case "steps":
            known = [*right, *wrong]
            rng.shuffle(known)
            found = (
                {"completion": one.text, "labels": labels}
                for one, labels in zip(known, stepwise(known), strict=True)
            )
    made = 0
    for row in found:
        if made == most:
            break
        made += 1
        yield {"prompt": asked.prompt} | row
    counts["rows"] += made
    counts["prompts without a row"] += not made


def matched(
    right: Sequence[Solution], wrong: Sequence[Solution], longer: float
) -> Iterator[tuple[Solution, Solution]]:
    """Pairs of like length, each solution once: what is preferred is not to be length."""
    left = list(wrong)
    for good in right:
        if not left:
            return
        bad = min(left, key=lambda one: abs(one.tokens - good.tokens))
        if max(good.tokens, bad.tokens) <= longer * min(good.tokens, bad.tokens):
            left.remove(bad)
            yield good, bad


def stepwise(solutions: Sequence[Solution], delimiter: str = "\n") -> list[list[bool | None]]:
    """Of each step, whether a right solution begins with it, the steps before it included.

    The hard estimation of Math-Shepherd. A step that only wrong solutions begin with is wrong if
    there are two of them or if it is their last; else nobody can tell. What follows a wrong step
    says nothing of itself.
    """
    begun: dict[str, list[bool]] = {}
    for one in solutions:
        for end in data.step_ends(one.text, delimiter):
            begun.setdefault(one.text[:end], []).append(bool(one.right))
    found: list[list[bool | None]] = []
    for one in solutions:
        labels: list[bool | None] = []
        for end in data.step_ends(one.text, delimiter):
            ends = begun[one.text[:end]]
            if False in labels:
                labels.append(None)
            elif any(ends):
                labels.append(True)
            else:
                labels.append(False if len(ends) > 1 or end == len(one.text) else None)
        found.append(labels)
    return found
