"""Rows to learn from: read, tokenised as they will be served, and accounted for one by one.

A row is dropped for a reason that the report counts; nothing is cut silently.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

IGNORED = -100

Columns = Literal["demonstrations", "steps", "pairs", "labelled", "prompts"]
"""What the rows of a method are."""

_READERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
_SHINGLE = 13
"""Words in a row that two texts share only if one was made from the other."""

Row = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of the rows."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason."""
    truncated: int = 0
    tokens: list[int] = field(default_factory=list)
    """Of each row that is kept."""
    learned: int = 0
    """Tokens that the loss is on, of all rows together."""
    in_test: int = 0
    """Rows whose prompt is in the test set, or shares thirteen words in a row with it."""

    def drop(self, reason: str) -> None:
        """Count a row that is not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def keep(self, tokens: int, learned: int, *, truncated: bool = False) -> None:
        """Count one that is."""
        self.kept += 1
        self.tokens.append(tokens)
        self.learned += learned
        self.truncated += truncated

    def histogram(self) -> dict[str, int]:
        """Rows by their number of tokens, in powers of two."""
        counts = Counter(max(0, tokens - 1).bit_length() for tokens in self.tokens)
        return {f"<= {2**power}": counts[power] for power in sorted(counts)}

    def write(self, path: Path) -> None:
        """As JSON, with the histogram in place of each row's tokens."""
        said = asdict(self) | {"tokens": sum(self.tokens), "histogram": self.histogram()}
        path.write_text(json.dumps(said, indent=1) + "\n")

    def show(self, console: Console, title: str) -> None:
        """As a table."""
        table = Table(title=title, show_header=False)
        table.add_row("rows", f"{self.rows:,}")
        table.add_row("kept", f"{self.kept:,}")
        for reason, count in self.dropped.items():
            table.add_row(f"dropped: {reason}", f"{count:,}")
        table.add_row("truncated", f"{self.truncated:,}")
        table.add_row("tokens (with loss)", f"{sum(self.tokens):,} ({self.learned:,})")
        table.add_row("in the test set, too", f"{self.in_test:,}")
        most = max(self.histogram().values(), default=1)
        for name, count in self.histogram().items():
            table.add_row(f"{name} tokens", f"{'█' * max(1, 30 * count // most)} {count:,}")
        console.print(table)


def read(name: str, *, split: str = "train") -> Dataset:
    """The rows of a file or of a hub name.

    Raises:
        SystemExit: There are none, or they cannot be read.
    """
    disable_progress_bars()  # one for all of it is enough
    path = Path(name)
    try:
        if path.suffix.lstrip(".") in _READERS:
            kind = _READERS[path.suffix.lstrip(".")]
            found = load_dataset(kind, data_files=str(path), split="train")
        else:
            found = load_dataset(name, split=split)
    except Exception as error:  # the library raises some twenty kinds
        raise SystemExit(f"cannot read the rows of '{name}': {error}") from error
    assert isinstance(found, Dataset)
    return found


def listed(rows: Dataset) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return cast(list[dict[str, Any]], rows.to_list())


def mixture(task: Any, *, seed: int) -> Dataset:
    """The rows that a task names, replay included, in an order that the seed decides.

    Raises:
        SystemExit: They cannot be read, or a fraction is none.
    """
    if task.datasets is None:
        rows = read(task.dataset_name, split=task.dataset_train_split)
    else:
        rows = concatenate_datasets(list(_parts(task.datasets, seed)))
    if task.replay_name is not None:
        known = read(task.replay_name)
        share = task.replay_fraction
        wanted = round(len(rows) * share / (1 - share))
        if wanted > len(known):
            raise SystemExit(
                f"replay_fraction {share} of {len(rows)} rows needs {wanted} of replay, and "
                f"'{task.replay_name}' has {len(known)}"
            )
        known = known.shuffle(seed=seed).select(range(wanted))
        missing = set(rows.column_names) - set(known.column_names)
        if missing:
            raise SystemExit(f"the rows of '{task.replay_name}' have no columns {missing}")
        rows = concatenate_datasets([rows, known.select_columns(rows.column_names)])
    return rows.shuffle(seed=seed)


def _parts(said: str, seed: int) -> Iterator[Dataset]:
    try:
        parts = json.loads(said)
    except ValueError as error:
        raise SystemExit(f"'datasets' is no list of {{path, fraction, split}}: {error}") from error
    for part in parts if isinstance(parts, list) else [parts]:
        if not isinstance(part, dict) or not {"path"} <= set(part) <= {"path", "fraction", "split"}:
            raise SystemExit(f"'datasets' has {{path, fraction, split}}, not {part}")
        rows = read(part["path"], split=part.get("split", "train"))
        fraction = part.get("fraction", 1.0)
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise SystemExit(f"a fraction is above 0 and at most 1, not {fraction}")
        wanted = max(1, round(fraction * len(rows)))
        yield rows.shuffle(seed=seed).select(range(wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How a verifier is asked: what it says of a step, and where."""

    good: str
    bad: str
    delimiter: str = "\n"
    opening: Mapping[str, str] | None = None
    """What opens the turn of `answers`, and what stands in its place for `verdicts`."""

    def manifest(self) -> dict[str, Any]:
        """As the server reads it."""
        said: dict[str, Any] = {"labels": {"good": self.good, "bad": self.bad}}
        said["delimiter"] = self.delimiter
        return said if self.opening is None else said | {"opening": dict(self.opening)}


class Tokens:
    """Rows as token ids and what the loss is on, rendered as the server will render them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length

    def rendered(self, messages: Sequence[Row], *, ask: bool) -> str:
        """A conversation as text; with `ask`, it ends where the next answer begins."""
        text = self._tokenizer.apply_chat_template(
            cast(Any, list(messages)), tokenize=False, add_generation_prompt=ask
        )
        assert isinstance(text, str)
        return text

    def prompt(self, prompt: Any) -> str:
        """A prompt as text: as it is, or a conversation that is to be answered."""
        return prompt if isinstance(prompt, str) else self.rendered(prompt, ask=True)

    def asked(self, prompt: Any) -> list[int]:
        """A prompt's token ids."""
        return self.ids(self.prompt(prompt))

    def ids(self, text: str) -> list[int]:
        """A text's token ids, with nothing put before or after it."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def demonstration(
        self, row: Row, *, everything: bool, turns: bool
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of {messages}, {prompt, completion} or {text}.

        With `everything` the loss is on the prompt, too; with `turns`, on each assistant's turn of
        `messages` instead of all of them.

        Raises:
            ValueError: The template does not render a conversation's beginning as it renders it
                alone, or the row has no such columns.
        """
        end = str(self._tokenizer.eos_token or "")
        if "messages" in row:
            messages = row["messages"]
            text = self.rendered(messages, ask=False)
            spans = list(self._turns(messages, text)) if turns else [(0, len(text))]
        elif "prompt" in row and "completion" in row:
            asked, text = self._answered(row["prompt"], row["completion"])
            spans = [(0 if everything else len(asked), len(text))]
        elif "text" in row:
            text = row["text"] if row["text"].endswith(end) else row["text"] + end
            spans = [(0, len(text))]
        else:
            raise ValueError("no 'messages', no 'prompt' with 'completion', and no 'text'")
        return self._labelled(text, spans)

    def _answered(self, prompt: Any, completion: Any) -> tuple[str, str]:
        """A prompt as text, and that with its completion."""
        if isinstance(prompt, str):
            end = str(self._tokenizer.eos_token or "")
            return prompt, prompt + str(completion).removesuffix(end) + end
        asked = self.rendered(prompt, ask=True)
        answer = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else list(completion)
        )
        text = self.rendered([*prompt, *answer], ask=False)
        if not text.startswith(asked):
            raise ValueError("the chat template renders an answered prompt unlike a prompt")
        return asked, text

    def _turns(self, messages: Sequence[Row], text: str) -> Iterator[tuple[int, int]]:
        """Where the assistant's turns are, in characters of the whole."""
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self.rendered(messages[:at], ask=True)
                said = self.rendered(messages[: at + 1], ask=False)
                if not said.startswith(asked) or not text.startswith(said):
                    raise ValueError(
                        "the chat template renders the beginning of a conversation unlike the "
                        "whole; split it into prompts and completions"
                    )
                yield len(asked), len(said)

    def _labelled(self, text: str, spans: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of the whole, and labels within the spans, each up to the token that ends its turn.

        What a template puts after that token no server samples. A model finds it so unlikely that
        learning it would be most of a small adapter's first steps.
        """
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = coded["input_ids"], [end for _, end in coded["offset_mapping"]]
        labels = [IGNORED] * len(ids)
        for begin, end in spans:
            inside = [at for at, reached in enumerate(ends) if begin < reached <= end]
            stops = [at for at in inside if ids[at] == self._tokenizer.eos_token_id]
            for at in inside:
                if not stops or at <= stops[-1]:
                    labels[at] = ids[at]
        return self._cut(ids, labels)

    def judged(self, row: Row, judging: Judging) -> tuple[list[int], list[int]]:
        """Ids and labels of {prompt, completion, labels}: after each step a verdict is due.

        `labels` has one truth value per step, or null where none is known. Cobbe et al. 2021
        (arXiv:2110.14168), Lightman et al. 2023 (arXiv:2305.20050).

        Raises:
            ValueError: There are not as many labels as steps, or the template does not show where
                an answer begins.
        """
        asked, text = self._answered(row["prompt"], row["completion"])
        if judging.opening is not None:
            opens, instead = judging.opening["answers"], judging.opening["verdicts"]
            if not asked.endswith(opens):
                raise ValueError(f"no answer begins with {opens!r}")
            head = asked.removesuffix(opens) + instead
            asked, text = head, head + text[len(asked) :]
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        steps = step_ends(row["completion"], judging.delimiter)
        if len(steps) != len(row["labels"]):
            raise ValueError(f"{len(steps)} steps and {len(row['labels'])} labels")
        # The last step ends with its turn, the others with their delimiter.
        ends = [len(asked) + end for end in steps[:-1]]
        due: dict[int, str] = {}
        for token, (_, end) in enumerate(coded["offset_mapping"]):
            if ends and end >= ends[0]:
                ends.pop(0)
                due[token] = ""
        last = len(asked) + steps[-1]
        stop = self._tokenizer.eos_token_id
        closing = [
            token
            for token, (begin, _) in enumerate(coded["offset_mapping"])
            if begin >= last and coded["input_ids"][token] == stop
        ]
        due[closing[0] if closing else len(coded["input_ids"]) - 1] = ""
        ids = [*coded["input_ids"], stop]  # a verdict on the last token needs a place after it
        labels = [IGNORED] * len(ids)
        for token, good in zip(sorted(due), row["labels"], strict=True):
            if good is not None:
                labels[token + 1] = self._verdict(judging.good if good else judging.bad)
        return self._cut(ids, labels)

    def _verdict(self, word: str) -> int:
        ids = self.ids(word)
        if len(ids) != 1:
            raise ValueError(f"the label {word!r} is {len(ids)} tokens, and has to be one")
        return ids[0]

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        if self._max_length is None:
            return ids, labels
        return ids[: self._max_length], labels[: self._max_length]

    def length(self, prompt: Any, completion: Any) -> int:
        """Tokens of a prompt with its completion."""
        _, text = self._answered(prompt, completion)
        return len(self.ids(text))


def step_ends(text: str, delimiter: str) -> list[int]:
    """Where each step ends, its delimiter included; the last ends with the text."""
    ends = [found.end() for found in re.finditer(re.escape(delimiter), text)]
    return [*ends[:-1], len(text)] if ends and ends[-1] == len(text) else [*ends, len(text)]


def tokenised(
    rows: Iterable[Row],
    report: Report,
    tokens: Callable[[Row], tuple[list[int], list[int]]],
    *,
    max_length: int | None,
    stop: int | None,
) -> Dataset:
    """Rows as ids and labels; what cannot be learned from is dropped and counted.

    Raises:
        SystemExit: The end of a turn, `stop`, is learned from no row: such a model never stops.
    """
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    stops = 0
    for row in rows:
        report.rows += 1
        try:
            one, said = tokens(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            report.drop(str(error) or type(error).__name__)
            continue
        learned = sum(label != IGNORED for label in said)
        if not learned:
            report.drop("no token to learn from is left")
            continue
        report.keep(len(one), learned, truncated=len(one) == max_length)
        stops += stop in said
        ids.append(one)
        labels.append(said)
    if ids and stop is not None and not stops:
        raise SystemExit(
            "no row teaches the token that ends a turn: the adapter would never stop; see that the "
            "chat template ends the assistant's turns with the tokenizer's eos_token"
        )
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def checked(
    rows: Dataset, report: Report, columns: Columns, tokens: Tokens, *, max_length: int | None
) -> Dataset:
    """Rows that the trainer tokenises itself; what it cannot learn from is dropped and counted."""
    kept: list[int] = []
    for at, row in enumerate(listed(rows)):
        report.rows += 1
        try:
            lengths = [tokens.length(row["prompt"], text) for text in _answers(row, columns)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            report.drop(f"no column {error}" if isinstance(error, KeyError) else str(error))
            continue
        if columns == "pairs" and row["chosen"] == row["rejected"]:
            report.drop("chosen and rejected are the same")
            continue
        longest = max(lengths)
        report.keep(sum(lengths), sum(lengths), truncated=longest > (max_length or longest))
        kept.append(at)
    return rows.select(kept).map(_as_conversation)


def _as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """Trl wants an answer to a conversation to be one, too."""
    if isinstance(row["prompt"], str):
        return {}
    return {
        name: [{"role": "assistant", "content": row[name]}]
        for name in ("chosen", "rejected", "completion")
        if isinstance(row.get(name), str)
    }


def _answers(row: Row, columns: Columns) -> list[Any]:
    match columns:
        case "pairs":
            return [row["chosen"], row["rejected"]]
        case "labelled":
            if not isinstance(row["label"], bool):
                raise ValueError("'label' is not true or false")
            return [row["completion"]]
        case _:
            return [""]


class Exam:
    """A test set, which nothing may be learned from."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._prompts: set[str] = set()
        self._shingles: set[str] = set()
        for row in rows:
            said = _words(row)
            self._prompts.add(" ".join(said))
            self._shingles.update(_shingles(said))

    def has(self, row: Row) -> bool:
        """Whether a prompt is in it, or shares `_SHINGLE` words in a row with one that is."""
        said = _words(row)
        return " ".join(said) in self._prompts or not self._shingles.isdisjoint(_shingles(said))


def _words(row: Row) -> list[str]:
    asked = row.get("prompt", row.get("messages", row.get("text", "")))
    if not isinstance(asked, str):
        asked = " ".join(str(turn["content"]) for turn in asked if turn["role"] == "user")
    return re.findall(r"\w+", asked.lower())


def _shingles(words: Sequence[str]) -> Iterator[str]:
    for at in range(len(words) - _SHINGLE + 1):
        yield " ".join(words[at : at + _SHINGLE])
