"""A batch's files: what is asked, what was answered, and a journal of what that has cost.

The output holds a line for each prompt, written once and for good. The journal, beside it, says
what the output is of, and what each stretch of work was allowed and has spent, so that a run that
was cut off goes on with nothing lost, done twice or spent twice.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from server.wire import JSON, as_object

_CHAT = "/v1/chat/completions"


class Unusable(Exception):
    """A file is not what it is to be; the message says which, where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt to ask."""

    custom_id: str
    body: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Of the budget of all."""

    tokens: int = 0
    samples: int = 0


def rows(file: Path) -> list[Row]:
    """The prompts of an OpenAI batch file, or of lines with `messages`, `prompt` or `question`.

    Raises:
        Unusable: A line is none of these, or two have the same name.
    """
    found: dict[str, JSON] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{file} cannot be read: {error}") from None
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = as_object(json.loads(text))
        except (ValueError, RecursionError):
            line = None
        if line is None:
            raise Unusable(f"{file}:{number}: this is no JSON object")
        name, body = str(line.get("custom_id", line.get("id", f"line-{number}"))), _body(line)
        if body is None:
            raise Unusable(
                f"{file}:{number}: a line has custom_id and body ({_CHAT}), messages, prompt or "
                "question"
            )
        if name in found:
            raise Unusable(f"{file}:{number}: custom_id '{name}' comes twice")
        found[name] = body
    if not found:
        raise Unusable(f"{file} holds no prompt")
    return [Row(custom_id=name, body=body) for name, body in found.items()]


def _body(line: JSON) -> JSON | None:
    if "body" in line:
        chat = line.get("url", _CHAT) == _CHAT and line.get("method", "POST") == "POST"
        return as_object(line["body"]) if chat else None
    if "messages" in line:
        return {key: value for key, value in line.items() if key not in ("custom_id", "id")}
    words = line.get("prompt", line.get("question"))
    if isinstance(words, str):
        return {"messages": [{"role": "user", "content": words}]}
    return {"messages": words} if isinstance(words, list) else None


class Output:
    """The output and its journal, which one process writes at a time. A context manager."""

    def __init__(self, file: Path, *, source: Path, asked: Mapping[str, Any]) -> None:
        """Go on with what is there.

        Raises:
            Unusable: Another run writes it, or it is of another input or of other settings.
        """
        self._file = file
        self.journal = file.with_name(f"{file.name}.journal")
        self._log = self.journal.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._log.close()
            raise Unusable(f"another run writes {file}") from None
        head = {"input": sha256(source.read_bytes()).hexdigest(), "asked": dict(asked)}
        self._stretches: dict[str, JSON] = {}
        """By name, the last that was said of each."""
        self.done: set[str] = set()
        """Names of the prompts that have been answered."""
        try:
            self._take_up(head)
        except Unusable:
            self._log.close()
            raise
        self._out = file.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.close()
        self._log.close()  # and the lock with it

    @property
    def open(self) -> list[str]:
        """Stretches of which nobody has said how they ended."""
        return [name for name, said in self._stretches.items() if not said["over"]]

    @property
    def spent(self) -> Spent:
        """By all stretches; of one that is open, also what may have been spent since."""
        every = self._stretches.values()
        return Spent(
            tokens=sum(one["tokens"] + (0 if one["over"] else one["leased"]) for one in every),
            samples=sum(one["samples"] for one in every),
        )

    def begin(self, name: str, leased: Mapping[str, Any]) -> None:
        """Say that a stretch is asked for, before it is, and what it may spend untold."""
        said = {"tokens": 0, "samples": leased.get("samples", 0), "over": False}
        self._say({"stretch": name, **said, "leased": leased.get("tokens", 0)})

    def tell(self, name: str, account: Mapping[str, Any], *, over: bool) -> None:
        """Say what a stretch has spent, as the server tells."""
        spent, leased = account["spent"], account["leased"]
        self._say({"stretch": name, **spent, "leased": leased, "over": over})

    def lost(self, name: str) -> None:
        """Say that nobody knows any more what a stretch has spent: as much as it may have."""
        said = self._stretches[name]
        self._say(said | {"tokens": said["tokens"] + said["leased"], "leased": 0, "over": True})

    def write(self, result: JSON) -> None:
        """Put an answer on disk."""
        self._out.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._out.flush()
        os.fsync(self._out.fileno())
        self.done.add(result["custom_id"])

    def _say(self, line: JSON) -> None:
        self._stretches[line["stretch"]] = line
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        os.fsync(self._log.fileno())

    def _take_up(self, head: JSON) -> None:
        _cut_torn(self._file)
        _cut_torn(self.journal)
        self._log.seek(0)
        said = [cast(JSON, json.loads(line)) for line in self._log]
        there = self._file.exists() and self._file.stat().st_size > 0
        if not said:
            if there:
                raise Unusable(f"{self._file} is there, and no journal says what it is of")
            self._log.write(json.dumps(head) + "\n")
            self._log.flush()
            return
        if said[0].get("input") != head["input"]:
            raise Unusable(f"{self._file} is of another input; choose another output")
        before, now = said[0]["asked"], head["asked"]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise Unusable(
                    f"{self._file} was begun with {name} {json.dumps(before.get(name))}, not "
                    f"{json.dumps(now.get(name))}; choose another output"
                )
        for line in said[1:]:
            self._stretches[line["stretch"]] = line
        if there:
            with self._file.open(encoding="utf-8") as lines:
                self.done = {json.loads(line)["custom_id"] for line in lines}


def _cut_torn(file: Path) -> None:
    """Cut off what stands behind the last newline: it was never written to its end."""
    if not file.exists():
        return
    with file.open("r+b") as opened:
        whole = opened.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            opened.truncate(end)
            os.fsync(opened.fileno())
