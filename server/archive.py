"""Ended runs as lines of JSON on disk, for `mull-finetune data`; there is none unless asked for.

The newest lines stay: when the directory is full, the oldest files go.
"""

import asyncio
import json
import logging
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from server import metrics
from server.run import Run
from server.wire import JSON
from strategies.core.events import Scored

SCHEMA_VERSION = 1

_PARTS = 16
"""Files that share the directory's bytes, so that little is lost when the oldest goes."""

_STAMP = "%Y%m%dT%H%M%S%f"

_log = logging.getLogger(__name__)


class Archive:
    """A directory of `traces-*.jsonl`, readable by its owner only; servers may share it."""

    def __init__(self, directory: Path, *, most_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._most_bytes = most_bytes
        self._file = self._named()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="archive")
        self._failing = False

    def keep(self, run: Run) -> None:
        """Write a run that has an answer, soon and in a thread; a full disk fails no request."""
        selection = run.selection
        if run.outcome is None or selection.conversation is None or not selection.stored:
            return
        self._writer.submit(self._write, run)

    async def close(self) -> None:
        """Write what waits."""
        await asyncio.to_thread(self._writer.shutdown)

    def _write(self, run: Run) -> None:
        try:
            line = (json.dumps(record(run), ensure_ascii=False) + "\n").encode()
            there = self._file.stat().st_size if self._file.exists() else 0
            if there + len(line) > self._most_bytes // _PARTS:
                self._file = self._named()
            self._make_room(len(line))
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(line)
        except OSError as error:
            metrics.UNARCHIVED.inc()
            if not self._failing:
                _log.warning("traces are not kept: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _named(self) -> Path:
        """A file that nobody else writes to; names sort by age even if the clock was set back."""
        now = datetime.now(UTC).strftime(_STAMP)
        for file in self._directory.glob("traces-*.jsonl"):
            with suppress(ValueError):  # it has another name than ours
                there = datetime.strptime(file.name.split("-")[1], _STAMP).replace(tzinfo=UTC)
                now = max(now, (there + timedelta(microseconds=1)).strftime(_STAMP))
        return self._directory / f"traces-{now}-{uuid.uuid4().hex[:8]}.jsonl"

    def _make_room(self, wanted: int) -> None:
        files = sorted(self._directory.glob("traces-*.jsonl"))
        sizes = {file: file.stat().st_size for file in files}
        while files and sum(sizes.values()) + wanted > self._most_bytes:
            oldest = files.pop(0)
            oldest.unlink(missing_ok=True)
            del sizes[oldest]


def record(run: Run) -> JSON:
    """A run as training reads it: what was asked, every finished solution, and what was said of it.

    A solution's `steps` are a verifier's scores of its steps, where it gave any.
    """
    selection, outcome = run.selection, run.outcome
    assert outcome is not None
    steps = {
        event.index: list(event.steps)
        for _, event in run.trace.events
        if isinstance(event, Scored) and event.steps
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run.id,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": selection.model,
        "prompt": selection.conversation,
        "strategy": selection.strategy.model_dump(mode="json"),
        "adapters": dict(selection.versions),
        "stopped": outcome.stopped,
        "chosen": outcome.chosen.index,
        "confidence": outcome.confidence,
        "votes": dict(outcome.votes),
        "candidates": [
            {
                "index": one.index,
                "text": one.text,
                "answer": one.answer,
                "complete": one.complete,
                "tokens": len(one.token_ids),
                "score": outcome.scores.get(one.index),
                "steps": steps.get(one.index),
                "model": one.model,
            }
            for one in outcome.candidates
        ],
    }
