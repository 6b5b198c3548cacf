"""`mull`: serve a model as a reasoning server, or stand before such servers, or look after one."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Literal

from pydantic import SecretStr

from server import logs
from server.adapters import command
from server.batch import command as batch
from server.calibration import command as calibrate
from server.gateway import command as gateway
from server.keys import command as keys
from server.local.defaults import environment
from server.settings import Settings

_SERVE_HELP = """usage: mull serve [MODEL] [any flag of vLLM's server]

Serve MODEL (a Hugging Face name or a folder) as a reasoning server: vLLM's OpenAI, Responses and
Anthropic endpoints, each with strategies. Without MODEL, the embedded mull-tiny.

  mull serve                                   mull-tiny on 127.0.0.1:8000
  mull serve Qwen/Qwen3-0.6B --port 9000       any model that vLLM serves
  mull serve --help=all                        every flag of vLLM, with its default

What Mull sets unless you do: --host 127.0.0.1, --scheduling-policy priority,
--max-num-queued-reqs 4096, --enable-prompt-tokens-details, --uvicorn-log-level warning,
--disable-uvicorn-access-log, --allowed-media-domains none.invalid; on a CPU also --block-size 32,
and --dtype float32 where the processor has no bfloat16 instructions.

Environment: MULL_CONFIG names a YAML file with presets, endpoints, limits and settings; each
setting may also be set alone, as MULL_MAX_BODY_BYTES (16777216), MULL_ENGINE_RESTARTS (3),
MULL_MAX_RUNNING_REQUESTS (512), MULL_MAX_RUNNING_CANDIDATES (the engine's max_num_seqs),
MULL_HEARTBEAT_SECONDS (10), MULL_KEPT_TRACES (256), MULL_RUN_CODE (false), MULL_TRACES (a
directory that keeps runs on disk, to be learned from), MULL_MAX_TRACES_BYTES (1073741824),
MULL_ADAPTERS (the registry's directory; it sets --enable-lora, --max-loras 4 and
--max-cpu-loras 32), MULL_ADAPTER_IMPORTS (where adapters are taken in from),
MULL_MAX_ADAPTER_BYTES (2147483648), MULL_KEYS (the file of `mull keys`; with it, every request
needs a key), MULL_ADMIN_KEY (who sends it may change adapters), MULL_OPEN_METRICS (false),
MULL_MAX_TURNS (4096), MULL_MAX_SCHEMA_CHARS (262144), MULL_DRAIN_SECONDS (20: what is under way at
a SIGTERM may take as long), MULL_CALIBRATIONS (a directory of what `mull calibrate` has written),
MULL_MAX_BATCH_PROMPTS (1000), MULL_LOG_FORMAT (text, or json); all of vLLM's; and OTEL_*, which ask
for spans.
"""


def main() -> None:
    """Entry point of the `mull` command."""
    parser = argparse.ArgumentParser(
        prog="mull",
        description="Mull makes language models reason better at inference time.",
        epilog="Start with: mull serve. Then see http://127.0.0.1:8000/v1/strategies",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("serve", add_help=False, help="serve a model as a reasoning server")
    commands.add_parser(
        "doctor", help="say what is installed, on which device, and how to mend what is broken"
    )
    gateway.arguments(
        commands.add_parser("gateway", help="the same strategies before vLLM servers elsewhere")
    )
    known = commands.add_parser("adapters", help="list, import, point, roll back, remove adapters")
    command.arguments(known)
    calibrating = commands.add_parser(
        "calibrate", help="learn what search buys on a model, from your own problems"
    )
    calibrate.arguments(calibrating)
    batching = commands.add_parser(
        "batch", help="answer a file of prompts under one budget, spent where it gains most"
    )
    batch.arguments(batching)
    keys.arguments(commands.add_parser("keys", help="make, list and revoke keys of clients"))
    options, rest = parser.parse_known_args()
    if options.command == "doctor":
        if rest:
            parser.error(f"doctor takes no arguments: {' '.join(rest)}")
        from server.doctor import examine

        sys.exit(examine())
    if options.command == "adapters":
        if rest:
            parser.error(f"adapters does not know: {' '.join(rest)}")
        sys.exit(_keyed(command.run, options, "admin_key"))
    if options.command == "gateway":
        if rest:
            parser.error(f"gateway does not know: {' '.join(rest)}")
        sys.exit(gateway.run(options))
    if options.command == "calibrate":
        if rest:
            parser.error(f"calibrate does not know: {' '.join(rest)}")
        sys.exit(calibrate.run(options))
    if options.command == "batch":
        if rest:
            parser.error(f"batch does not know: {' '.join(rest)}")
        sys.exit(_keyed(batch.run, options, "api_key"))
    if options.command == "keys":
        if rest:
            parser.error(f"keys does not know: {' '.join(rest)}")
        sys.exit(keys.run(options))
    if rest[:1] in (["--help"], ["-h"]):
        print(_SERVE_HELP, end="")
        return
    sys.exit(_serve(rest))


def _keyed(
    run: Callable[[argparse.Namespace, SecretStr | None], int],
    options: argparse.Namespace,
    key: Literal["admin_key", "api_key"],
) -> int:
    """Run a command that sends a key of the settings."""
    try:
        return run(options, getattr(Settings.read(), key))
    except ValueError as error:
        print(f"mull: {error}", file=sys.stderr)
        return 2


def _serve(rest: list[str]) -> int:
    began = time.monotonic()

    def progress(text: str) -> None:
        logs.announce(f"{time.monotonic() - began:5.1f} s  {text}")

    try:
        settings = Settings.read()
    except ValueError as error:
        print(f"mull: the configuration is wrong: {error}", file=sys.stderr)
        return 2
    if settings.log_format == "json":
        logs.begin()
    environment(rest)
    progress("loading vLLM")
    from server.local import launcher

    return launcher.serve(launcher.parse(rest, settings), settings, progress)


if __name__ == "__main__":
    main()
