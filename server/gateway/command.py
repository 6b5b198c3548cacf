"""`mull gateway`: serve the app until a signal comes."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Generator
from types import FrameType

import uvicorn
from pydantic import ValidationError

from server.settings import Settings

_DRAIN_SECONDS = 10
"""What is under way at a signal may take as long."""

_KEEP_ALIVE_SECONDS = 75
"""Longer than clients and proxies keep an idle connection."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what may be asked."""
    parser.add_argument(
        "--upstream",
        nargs="+",
        metavar="URL",
        help="vLLM servers, or a router before them; else MULL_UPSTREAMS",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")


def run(options: argparse.Namespace) -> int:
    """Serve; return the exit status."""
    try:
        settings = Settings.read()
        if options.upstream:
            named = {"upstreams": options.upstream}
            settings = Settings.model_validate(dict(settings) | named)
    except ValidationError as error:
        print(f"mull: --upstream: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"mull: the configuration is wrong: {error}", file=sys.stderr)
        return 2
    if not settings.upstreams:
        print("mull: a gateway needs --upstream URL, or MULL_UPSTREAMS", file=sys.stderr)
        return 2
    from server.gateway.app import Gateway
    from server.gateway.fleet import Fleet

    gateway = Gateway(Fleet(settings.upstreams, settings.terms), settings)
    config = uvicorn.Config(
        gateway.app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    server = _Server(config)
    print(f"mull: gateway on http://{options.host}:{options.port}", file=sys.stderr, flush=True)
    server.run()
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Ends with status 0 after a signal, where uvicorn would raise it again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at SIGTERM and SIGINT; twice, at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
