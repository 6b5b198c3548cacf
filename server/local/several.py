"""Several processes that serve the API of one engine: what they cannot share, and what they need.

What would have to be counted over all of them is refused at the start.
"""

import os
from argparse import Namespace
from collections.abc import Sequence

import psutil

from server.keys import keyring
from server.settings import Settings


def processes(args: Namespace) -> int:
    """How many serve the API."""
    return args.api_server_count or 1


def check(settings: Settings) -> None:
    """Refuse what several processes could not keep to.

    Raises:
        ValueError: There is such a setting; it is named.
    """
    if settings.adapters is not None:  # each would give its adapters numbers that others give, too
        raise ValueError(
            "MULL_ADAPTERS needs --api-server-count 1; start more servers on the same registry"
        )
    if settings.keys is not None and any(one.limited for one in keyring.read(settings.keys)):
        raise ValueError(
            f"{settings.keys} has keys with limits, which need --api-server-count 1: each process "
            "would count for itself; a gateway before several servers counts for all"
        )


def needed() -> Sequence[psutil.Process]:
    """The launcher that started this process, and the engines that it started on this machine."""
    launcher = psutil.Process(os.getppid())
    engines = [one for one in launcher.children() if "EngineCore" in " ".join(one.cmdline())]
    return [launcher, *engines]


def gone(needed: Sequence[psutil.Process]) -> bool:
    """Whether one of them is no more; vLLM tells only its launcher, and nobody tells of that."""
    try:
        return any(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in needed)
    except psutil.NoSuchProcess:
        return True
