"""Lines of log for machines: one JSON object each, with the keys that vLLM's own have."""

import json
import logging
import sys
from logging.config import dictConfig
from typing import Any

from server.run import Run
from server.tracing import LONGEST
from strategies.core.events import Chosen, Failed

_server = logging.getLogger("server")
_searches = logging.getLogger("server.searches")


class Lines(logging.Formatter):
    """Whatever a logger of ours or uvicorn's says, and the `fields` of a record beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said: dict[str, Any] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "name": record.name,
            "processName": record.processName,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exc_info"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


_HEARD = {"handlers": ["lines"], "propagate": False}

LINES: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"lines": {"()": Lines}},
    "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "lines"}},
    "loggers": {
        "server": _HEARD | {"level": "INFO"},
        "uvicorn": _HEARD,
        "uvicorn.access": _HEARD,
        "opentelemetry": _HEARD,
        "py.warnings": _HEARD,
        "vllm": _HEARD,  # until it has read its own flags, which do the same
    },
}
"""In text, loggers are as Python, uvicorn and vLLM leave them."""


def begin() -> None:
    """Log so from now on, Python's warnings too."""
    logging.captureWarnings(True)
    dictConfig(LINES)


def announce(text: str) -> None:
    """What a command tells of itself: a line of log for machines, else a line for people."""
    if _server.handlers:
        _server.info(text)
    else:
        sys.stderr.write(f"mull: {text}\n")


def tell(run: Run) -> None:
    """Log a run that is over: by which name it was asked, what it took, and none of its words."""
    if not _searches.isEnabledFor(logging.INFO):
        return
    selection, usage = run.selection, run.usage()
    _, last = run.trace.events[-1]
    said: dict[str, Any] = {
        "run": run.id,
        "strategy": selection.strategy.kind,
        "stopped": last.stopped if isinstance(last, Chosen | Failed) else "error",
        "tokens": usage.generated,
        "prompt_tokens": usage.prompt,
        "seconds": round(run.trace.seconds, 6),
    }
    if selection.request_id is not None:
        said["request_id"] = selection.request_id[:LONGEST]
    if selection.traceparent is not None:
        said["traceparent"] = selection.traceparent[:LONGEST]
    _searches.info("a search is over", extra={"fields": said})
