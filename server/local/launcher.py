"""`mull serve`: vLLM's parser, engine and app, our plugin in it, our own uvicorn around it.

One process serves HTTP, one forked process runs the engine. A dead engine is replaced in place: the
socket stays open and answers 503 until the new one is ready.
"""

import asyncio
import os
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, cast

import uvicorn
from uvicorn.config import LOGGING_CONFIG

# Importing vLLM takes some six seconds, so the progress line comes before this module is imported.
from vllm import envs
from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,  # pyright: ignore[reportUnknownVariableType]
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import (
    setup_server,  # pyright: ignore[reportUnknownVariableType]
)
from vllm.entrypoints.launchers.utils.server_utils import (
    get_uvicorn_log_config,  # pyright: ignore[reportUnknownVariableType]
)
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from models import MULL_TINY
from server.door import Door, Leaving, Server
from server.local import cpu, defaults
from server.settings import Settings, fork_workers
from strategies.core.aio import Background

Progress = Callable[[str], None]

_HEALTH_SECONDS = 0.5
"""How often a dead engine is looked for; requests in flight fail on their own, at once."""


_REFUSED = ("headless", "api_server_count", "grpc", "enable_ssl_refresh")
"""Flags of vLLM's launcher that ask for other processes than this one starts."""


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
    for flag in _REFUSED:
        if getattr(args, flag, None) not in (None, False, 1):
            name = flag.replace("_", "-")
            parser.error(
                f"--{name} is not served by Mull's launcher; see VLLM_PLUGINS=mull vllm serve"
            )
    return args


async def serve(args: Namespace, settings: Settings, progress: Progress) -> int:
    """Serve until a signal; return the exit status.

    It is not 0 if the engine died once too often.
    """
    leaving = Leaving()
    address, sock = setup_server(args, reuse_port=False)
    door = Door()
    server = Server(_uvicorn(args, door))
    async with Background(server.serve(sockets=[sock])) as serving:
        try:
            for _ in range(settings.engine_restarts + 1):
                began = time.monotonic()
                async with AsyncExitStack() as stack:
                    engine = await _start(args, server, door, stack, progress)
                    progress(f"ready on {address} after {time.monotonic() - began:.1f} s")
                    died = await _until_over(engine, leaving.asked, serving)
                    if not died:
                        progress("finishing what is under way")
                        await door.drain(settings.drain_seconds, leaving.at_once)
                if not died:
                    return 0
                progress("the engine died")
            progress(f"the engine died {settings.engine_restarts + 1} times; giving up")
            return 1
        finally:
            server.should_exit = True
            await serving
            sock.close()


async def _start(
    args: Namespace, server: uvicorn.Server, door: Door, stack: AsyncExitStack, progress: Progress
) -> AsyncLLM:
    """Start an engine and open the door; leaving `stack` closes the door and ends the engine."""
    progress("starting the engine")
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config()
    on_cpu = config.device_config.device_type == "cpu"
    if on_cpu:
        cpu.mend()
        fork_workers()
    engine = await asyncio.to_thread(
        partial(AsyncLLM.from_vllm_config, config, disable_log_stats=args.disable_log_stats)
    )
    stack.callback(engine.shutdown, timeout=max(15, config.shutdown_timeout))
    if on_cpu:
        guarded: list[bool] = await cast(Any, engine).collective_rpc("guard", args=(os.getpid(),))
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
    engine: AsyncLLM, stopping: asyncio.Event, serving: "asyncio.Task[None]"
) -> bool:
    """Wait for a signal, the server's end, or the engine's death; say whether the engine died."""
    while not (stopping.is_set() or serving.done()):
        if engine.errored:
            return True
        try:
            await asyncio.wait_for(stopping.wait(), _HEALTH_SECONDS)
        except TimeoutError:
            continue
    return False


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
