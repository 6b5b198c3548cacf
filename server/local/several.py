"""Several processes that serve the API of one engine: what each counts for itself, nobody counts.

It is refused at the start, and told where it is asked for.
"""

from argparse import Namespace

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
    if settings.keys is not None:
        keyring.read(settings.keys, limits=False)
