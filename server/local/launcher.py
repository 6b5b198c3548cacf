"""`mull serve`: vLLM's parser, engine and app, our plugin in it, our own uvicorn around it.

One process serves HTTP, one forked process runs the engine. A dead engine is replaced in place: the
socket stays open and answers 503 until the new one is ready. With `--api-server-count`, vLLM's own
launcher does the work.
"""

import asyncio
import os
import sys
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from math import ceil
from socket import socket
from typing import Any, cast

import uvicorn
from psutil import Process
from uvicorn.config import LOGGING_CONFIG

# Importing vLLM takes some six seconds, so the progress line comes before this module is imported.
from vllm import envs
from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import serve as multi
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,  # pyright: ignore[reportUnknownVariableType]
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import (
    NoSignalServer,
    setup_server,  # pyright: ignore[reportUnknownVariableType]
)
from vllm.entrypoints.launchers.utils.server_utils import (
    get_uvicorn_log_config,  # pyright: ignore[reportUnknownVariableType]
)
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import set_process_title
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.utils import APIServerProcessManager

from models import MULL_TINY
from server import logs
from server.door import Door, Leaving
from server.local import cpu, defaults, several
from server.settings import Settings, fork_workers
from strategies.core.aio import Background

Progress = Callable[[str], None]

_CLOSING_SECONDS = 20
"""For what is left after the last request was answered, or broken off."""

_HEALTH_SECONDS = 0.5
"""How often a dead engine is looked for; requests in flight fail on their own, at once."""


_REFUSED = ("headless", "grpc", "enable_ssl_refresh")
"""Flags of vLLM's launcher that ask for other servers than this one starts."""


def parse(argv: list[str], settings: Settings) -> Namespace:
    """Read vLLM's arguments with vLLM's parser; it exits with a message where they are wrong."""
    parser = FlexibleArgumentParser(
        prog="mull serve", description="Serve a model as a reasoning server."
    )
    parser = make_arg_parser(parser)
    defaults.flags(parser, adapters=settings.adapters is not None)
    if settings.log_format == "json":
        parser.set_defaults(logging_config=LoggingConfig(formatter="json"))
    args = cast(Namespace, parser.parse_args(argv))
    if args.model_tag is None and args.model == str(MULL_TINY):
        defaults.embedded_flags(parser, adapters=settings.adapters is not None)
        args = cast(Namespace, parser.parse_args(argv))
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    if args.api_server_count is not None and args.api_server_count < 1:
        parser.error("--api-server-count is 1 at least")
    if several.processes(args) > 1:
        try:
            several.check(settings)
        except ValueError as error:
            parser.error(str(error))
    for flag in _REFUSED:
        if getattr(args, flag, None) not in (None, False, 1):
            name = flag.replace("_", "-")
            parser.error(
                f"--{name} is not served by Mull's launcher; see VLLM_PLUGINS=mull vllm serve"
            )
    return args


def serve(args: Namespace, settings: Settings, progress: Progress) -> int:
    """Serve until a signal; return the exit status.

    It is not 0 if the engine died once too often.
    """
    if several.processes(args) > 1:
        return _serve_by_several(args, settings, progress)
    return asyncio.run(_serve(*setup_server(args, reuse_port=False), args, settings, progress))


def _serve_by_several(args: Namespace, settings: Settings, progress: Progress) -> int:
    """Start engines and processes as vLLM does it; when one of them dies, all end."""
    enough = ceil(settings.drain_seconds) + _CLOSING_SECONDS
    args.shutdown_timeout = max(args.shutdown_timeout or 0, enough)
    progress(f"starting the engine, and {args.api_server_count} processes that serve its API")
    manager = partial(APIServerProcessManager, target_server_fn=_serve_as_one_of_several)
    setattr(multi, APIServerProcessManager.__name__, manager)  # its own workers do not drain
    try:
        multi.run_multi_api_server(args)
    except RuntimeError as error:
        progress(str(error))
        return 1
    return 0


def _serve_as_one_of_several(
    address: str, sock: socket, args: Namespace, client: dict[str, Any]
) -> None:
    """In a process of its own, which vLLM starts with its place among the engine's clients."""
    began = time.monotonic()
    set_process_title("APIServer", str(client["client_index"]))
    settings = Settings.read()
    if settings.log_format == "json":
        logs.begin()

    def progress(text: str) -> None:
        logs.announce(f"{time.monotonic() - began:5.1f} s  API {client['client_index']}: {text}")

    sys.exit(asyncio.run(_serve(address, sock, args, settings, progress, client)))


async def _serve(
    address: str,
    sock: socket,
    args: Namespace,
    settings: Settings,
    progress: Progress,
    client: dict[str, Any] | None = None,
) -> int:
    """On a socket, with an engine of its own; or as a `client` of one, which is not replaced."""
    leaving = Leaving()
    door = Door()
    client = client or {}
    loads = client.pop("api_server_loads", None)
    place = None if loads is None else (loads, client["client_index"])
    server = NoSignalServer(_uvicorn(args, door), peer_loads=place)
    async with Background(server.serve(sockets=[sock])) as serving:
        try:
            for _ in range(1 if client else settings.engine_restarts + 1):
                began = time.monotonic()
                async with AsyncExitStack() as stack:
                    engine = await _start(args, server, door, stack, progress, client)
                    progress(f"ready on {address} after {time.monotonic() - began:.1f} s")
                    needed = several.needed() if client else ()
                    died = await _until_over(engine, needed, leaving.asked, serving)
                    if not died:
                        progress("finishing what is under way")
                        await door.drain(settings.drain_seconds, leaving.at_once)
                    elif client:  # whose engine does not tell those who wait for it
                        await door.drain(0, leaving.at_once)
                if not died:
                    return 0
                progress("the engine died")
            if not client:
                progress(f"the engine died {settings.engine_restarts + 1} times; giving up")
            return 1
        finally:
            server.should_exit = True
            await serving
            sock.close()


async def _start(
    args: Namespace,
    server: uvicorn.Server,
    door: Door,
    stack: AsyncExitStack,
    progress: Progress,
    client: dict[str, Any],
) -> AsyncLLM:
    """Start an engine and open the door; leaving `stack` closes the door and ends the engine.

    As a `client` of one that others start, it ends with the connection.
    """
    progress("starting the engine")
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    engine_args: Any = AsyncEngineArgs.from_cli_args(args)
    if client:
        engine_args._api_process_count = client["client_count"]
        engine_args._api_process_rank = client["client_index"]
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config()
    places = {key: client[key] for key in client if key in ("client_count", "client_index")}
    addresses = {key: client[key] for key in client if key not in places}
    on_cpu = config.device_config.device_type == "cpu"
    if on_cpu:
        cpu.mend()
        fork_workers()
    engine = await asyncio.to_thread(
        partial(
            AsyncLLM.from_vllm_config,
            config,
            disable_log_stats=args.disable_log_stats,
            client_addresses=addresses or None,
            **places,
        )
    )
    stack.callback(engine.shutdown, timeout=max(15, config.shutdown_timeout))
    if on_cpu:
        launcher = os.getppid() if client else os.getpid()
        guarded: list[bool] = await cast(Any, engine).collective_rpc("guard", args=(launcher,))
        if not all(guarded):
            progress("a worker on another machine will not notice if this process is killed")
    progress("building the API")
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    app.state.server = server
    await init_app_state(engine, app.state, args, tasks)
    closing: Sequence[Callable[[], Awaitable[None]]] = getattr(app.state, "closing", ())
    if not closing:  # vLLM logs a plugin's failure and carries on; a Mull server must not
        raise SystemExit(
            "mull: the plugin did not load; the reason is in the log above, and see: mull doctor"
        )
    for close in closing:
        stack.push_async_callback(close)
    await stack.enter_async_context(app.router.lifespan_context(app))
    door.app = app
    stack.callback(setattr, door, "app", None)
    return engine


async def _until_over(
    engine: AsyncLLM,
    needed: Sequence[Process],
    stopping: asyncio.Event,
    serving: "asyncio.Task[None]",
) -> bool:
    """Wait for a signal, the server's end, or the engine's death; say whether the engine died."""
    while not (stopping.is_set() or serving.done()):
        if engine.errored or several.gone(needed):
            return True
        try:
            await asyncio.wait_for(stopping.wait(), _HEALTH_SECONDS)
        except TimeoutError:
            continue
    return several.gone(needed)  # whose launcher sends a signal, too


def _uvicorn(args: Namespace, door: Door) -> uvicorn.Config:
    log_config = cast(dict[str, Any] | None, get_uvicorn_log_config(args))
    config = uvicorn.Config(
        door,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        log_config=log_config or LOGGING_CONFIG,
    )
    cast(Any, config).h11_max_header_count = args.h11_max_header_count
    return config
