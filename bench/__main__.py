"""`python -m bench NAME`: see `python -m bench --help`."""

import argparse
import signal
import sys

from bench import (
    accuracy,
    model,
    optimal,
    overhead,
    overoptimise,
    search,
    soak,
    speed,
    startup,
    throughput,
    tradeoff,
)

_BENCHES = (
    accuracy,
    search,
    optimal,
    tradeoff,
    overoptimise,
    model,
    speed,
    overhead,
    throughput,
    startup,
    soak,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in _BENCHES:
        name = module.__name__.rsplit(".", 1)[-1]
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--url", help="a running server, e.g. http://127.0.0.1:8000; default: start one"
        )
        command.add_argument(
            "--model", default="mull-tiny", help="the served name (default %(default)s)"
        )
        command.add_argument("--path", help="serve this model folder instead of the embedded one")
        command.add_argument(
            "--problems", type=int, default=224, help="held-out problems per family"
        )
        command.add_argument(
            "--seed", type=int, default=0, help="of the problems and of the samples"
        )
        command.add_argument(
            "--clients",
            type=int,
            nargs="+" if hasattr(module, "CLIENTS") else None,
            default=getattr(module, "CLIENTS", 8),
            help="requests in flight (default %(default)s)",
        )
        command.add_argument("--json", metavar="PATH", help="write the figures there")
        module.options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    # `timeout` and `kill` end the server that the bench started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.run(options)


if __name__ == "__main__":
    main()
