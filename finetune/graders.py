"""Whether an answer is right: a function of a row and a text, in [0, 1]."""

import threading
from collections.abc import Callable
from importlib import import_module
from typing import cast

from math_verify import parse, verify

from finetune.data import Row

Grader = Callable[[Row, str], float]


def grader(name: str) -> Grader:
    """`answer`, or `module:function` of one's own.

    Raises:
        SystemExit: It cannot be imported.
    """
    if name == "answer":
        return answer
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(
            f"'{name}' is no grader: {error}; say 'answer' or module:function"
        ) from None


def answer(row: Row, text: str) -> float:
    """Whether the last answer of the text is mathematically the row's `answer`."""
    # Its time limits are signals, which only a main thread can have.
    limit = cast(int, 5 if threading.current_thread() is threading.main_thread() else None)
    gold = parse(f"\\boxed{{{row['answer']}}}", parsing_timeout=limit)
    return float(verify(gold, parse(text, parsing_timeout=limit), timeout_seconds=limit))
