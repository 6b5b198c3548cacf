"""`mull-finetune`: train an adapter, check it, publish it as a folder that a server takes in."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from finetune.methods import METHODS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one method; its keys are trl's, from `--config FILE` and the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mull-finetune",
        description=__doc__,
        epilog="each method has its own keys: mull-finetune METHOD --help",
    )
    further = {
        "data": "rows to learn from, out of a server's traces",
        "loop": "serve, solve, learn from what was right, check, serve; again",
    }
    methods = {one.name: one.summary for one in METHODS.values()}
    parser.add_argument(
        "method",
        choices=[*methods, *further],
        metavar="METHOD",
        help="; ".join(f"{name}: {summary}" for name, summary in (methods | further).items()),
    )
    options = parser.parse_args(given[:1])
    if options.method in further:
        module = "traces" if options.method == "data" else "loop"
        import_module(f"finetune.{module}").main(given[1:])
        return
    from finetune import training  # torch and trl, which `--help` can do without

    training.run(options.method, given[1:], prog=f"mull-finetune {options.method}")


if __name__ == "__main__":
    main()
