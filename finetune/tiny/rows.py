"""Rows for `mull-finetune`, of `mull-tiny`'s problems: `python -m finetune.tiny.rows COLUMNS`.

All are of the training side, or, with `--held-out`, of the test side. `grade` is their grader.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from finetune.data import Columns, Row
from finetune.tiny.countdown import reaches
from finetune.tiny.problems import FAMILIES, SLIPS, draw
from finetune.tiny.solution import Family, Item, attempt, boxed, judged, solution


def main() -> None:
    """Write rows as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("columns", choices=get_args(Columns))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--dialogues", action="store_true", help="two demonstrations in one")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.dialogues and options.columns != "demonstrations":
        parser.error("--dialogues are of demonstrations")
    rng = random.Random(f"rows {options.seed}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        for _ in range(options.count):
            item = draw(rng, held_out=options.held_out, family=rng.choice(options.families))
            if options.dialogues:
                then = draw(rng, held_out=options.held_out, family=rng.choice(options.families))
                file.write(json.dumps(dialogue((item, then), rng)) + "\n")
                continue
            for row in rows(item, options.columns, rng):
                file.write(json.dumps(row) + "\n")


def dialogue(items: Iterable[Item], rng: random.Random) -> dict[str, Any]:
    """Problems with their solutions, one after another in a conversation."""
    turns: list[dict[str, str]] = []
    for item in items:
        turns.append({"role": "user", "content": item.prompt})
        turns.append({"role": "assistant", "content": solution(item, rng)})
    return {"messages": turns}


def rows(item: Item, columns: Columns, rng: random.Random) -> Iterator[dict[str, Any]]:
    """What one problem gives."""
    asked = {
        "prompt": [{"role": "user", "content": item.prompt}],
        "answer": item.answer,
        "numbers": list(item.numbers),
    }
    match columns:
        case "demonstrations":
            yield asked | {"completion": solution(item, rng)}
        case "steps":
            written = attempt(item, rng, slip=SLIPS[item.family])
            labels: list[bool | None] = [good for _, good in judged(item, written)]
            first = labels.index(False) + 1 if False in labels else len(labels)
            # What follows a mistake says nothing of itself.
            labels = labels[:first] + [None] * (len(labels) - first)
            yield asked | {"completion": written, "labels": labels}
        case "pairs":
            yield asked | {"chosen": solution(item, rng), "rejected": _wrong(item, rng)}
        case "labelled":
            good = rng.random() < 0.5
            written = solution(item, rng) if good else _wrong(item, rng)
            yield asked | {"completion": written, "label": good}
        case "prompts":
            yield asked


def _wrong(item: Item, rng: random.Random) -> str:
    while True:
        written = attempt(item, rng, slip=0.3)
        if boxed(written) != item.answer and not _reached(item, written):
            return written


def _reached(item: Item, written: str) -> bool:
    family: Family = item.family
    return (
        family == "countdown"
        and grade({"answer": item.answer, "numbers": item.numbers}, written) == 1.0
    )


def grade(row: Row, text: str) -> float:
    """Whether the boxed answer is the row's; with `numbers`, whether it reaches it from these."""
    said = boxed(text)
    if said is None:
        return 0.0
    if row["numbers"]:
        return float(reaches(said, int(row["answer"]), row["numbers"]))
    return float(said == row["answer"])


if __name__ == "__main__":
    main()
