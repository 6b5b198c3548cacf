"""Whether two mathematical answers are equivalent, as math-verify sees it.

Only a sandbox worker imports this. Nothing here is timed: the sandbox ends what takes too long.
"""

from functools import lru_cache
from typing import Any

from math_verify.grader import verify  # pyright: ignore[reportMissingTypeStubs]
from math_verify.parser import (  # pyright: ignore[reportMissingTypeStubs]
    LatexExtractionConfig,
    parse,  # pyright: ignore[reportUnknownVariableType]
)

_BOXED = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
_NO_LIMIT = 0  # math-verify's own limits would disarm the worker's


@lru_cache(maxsize=4096)
def equivalent(left: str, right: str) -> bool:
    """Whether either, as the reference, accepts the other: math-verify is not symmetric."""
    ours, theirs = _parsed(left), _parsed(right)
    return verify(ours, theirs, timeout_seconds=_NO_LIMIT) or verify(
        theirs, ours, timeout_seconds=_NO_LIMIT
    )


@lru_cache(maxsize=1024)
def _parsed(answer: str) -> list[Any]:
    """What the answer may mean: its expression, if it parses, and its normalised text."""
    return parse(  # pyright: ignore[reportUnknownVariableType]
        f"\\boxed{{{answer}}}", _BOXED, parsing_timeout=_NO_LIMIT
    )


equivalent("x^2 + 2x + 1", "(x + 1)^2")  # what is built on first use is charged to no caller
