"""`mull calibrate`: learn from problems what search buys on this model, and write it to a file."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

_BEAM = '{"beam 4 x 4": {"kind": "beam_search", "score": "min"}}'


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what may be asked."""
    parser.add_argument(
        "--problems", type=Path, required=True, help="lines of {prompt, answer}; answer may be left"
    )
    parser.add_argument("--out", type=Path, required=True, help="NAME.json, for MULL_CALIBRATIONS")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--api-key", help="the server's, if it was started with one")
    parser.add_argument("--model", required=True, help="a served model, adapter or alias")
    parser.add_argument(
        "--verifier",
        type=_json,
        default="likelihood",
        help="who judges: a kind, or JSON as in a request; '' for nobody (default %(default)s)",
    )
    parser.add_argument(
        "--searches",
        type=_json,
        default=json.loads(_BEAM),
        help=f"by name, beside samples; '{{}}' for none (default {_BEAM})",
    )
    parser.add_argument("--samples", type=int, default=32, help="of each problem (default 32)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a sample (default 1024)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="default: the model's own; it plans for requests that ask for the same",
    )
    parser.add_argument("--bins", type=int, default=5, help="of difficulty (default 5)")
    parser.add_argument("--grader", help="module:function of a row and a text, to [0, 1]")
    parser.add_argument("--clients", type=int, default=8, help="problems at once (default 8)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Do it; return the exit status."""
    try:
        from server.calibration import learn
    except ImportError as error:
        mend = "in the checkout: pip install '.\\[calibrate]'"
        Console().print(f"[red]{error.name} is missing;[/] {mend}")
        return 2
    return learn.run(options)


def _json(text: str) -> Any:
    return json.loads(text) if text.startswith(("{", "[")) else text
