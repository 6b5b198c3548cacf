"""`mull gateway`: serve the app until a signal comes."""

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError
from uvicorn.config import LOGGING_CONFIG

from server import logs
from server.door import Door, Leaving, Server
from server.settings import Settings
from server.tracing import tracing
from strategies.core.aio import Background

if TYPE_CHECKING:
    from server.gateway.app import Gateway

_CLOSE_SECONDS = 5
"""For connections to close, once all replies are made."""

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
            known = dict(iter(settings))  # `dict(settings)` would call the setting `keys`
            settings = Settings.model_validate(known | named)
        followed = tracing()
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

    if settings.log_format == "json":
        logs.begin()
    gateway = Gateway(Fleet(settings.upstreams, settings.terms), settings, followed)
    return asyncio.run(_serve(gateway, options, settings))


async def _serve(gateway: "Gateway", options: argparse.Namespace, settings: Settings) -> int:
    leaving, door = Leaving(), Door()
    config = uvicorn.Config(
        door,
        host=options.host,
        port=options.port,
        log_level="warning",
        log_config=None if settings.log_format == "json" else LOGGING_CONFIG,  # None: as it is
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    server = Server(config)
    async with (
        gateway.app.router.lifespan_context(gateway.app),
        Background(server.serve()) as serving,
        Background(leaving.asked.wait()) as asked,
    ):
        door.app = gateway.app
        logs.announce(f"gateway on http://{options.host}:{options.port}")
        await asyncio.wait([serving, asked], return_when=asyncio.FIRST_COMPLETED)
        await door.drain(settings.drain_seconds, leaving.at_once)
        server.should_exit = True
        await serving
    return 0 if server.started else 1
