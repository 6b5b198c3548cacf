"""The door: every request needs a key, and what it may do follows from where it goes.

What a client may reach is listed; a route that nobody has thought of yet is the operator's.
"""

from collections import defaultdict
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import reply_to
from server.keys import keyring
from server.keys.accounts import TAB, Account
from server.keys.keyring import Keyring
from strategies.core.errors import MullError

_OPEN = ("/health", "/live", "/ping", "/ready")
"""What orchestrators ask, without a key: it tells whether the server is well, and nothing else."""

_CLIENT = (
    "/v1",
    "/v2",
    "/classify",
    "/cohere",
    "/detokenize",
    "/generative_scoring",
    "/invocations",
    "/load",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
    "/version",
)

_ADMIN = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Below `/v1`, and yet the operator's."""


class Guard:
    """ASGI middleware, before all others of ours."""

    def __init__(self, app: ASGIApp, *, keys: Keyring, open_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = (*_OPEN, "/metrics") if open_metrics else _OPEN
        self._accounts = defaultdict[str, Account](Account)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it before anything has been read."""
        needed = self._needed(scope)
        if needed is None or not self._keys.demanded:
            await self._app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                await self._keys.look()
                key = self._keys.admit(Headers(scope=scope), needed)
                tab = stack.enter_context(self._accounts[key.name].enter(key))
            except MullError as error:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await reply_to(error)(scope, receive, send)
                return
            await self._app({**scope, TAB: tab}, receive, tab.reading(send))

    def _needed(self, scope: Scope) -> keyring.Scope | None:
        """The scope that a key needs here; None where none is needed."""
        if scope["type"] not in ("http", "websocket"):
            return None
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.rstrip("/") in self._open:
            return None
        # Whoever comes next on the way, as a router before the server, may read dots otherwise.
        plain = not {"", ".", ".."} & set(path.removeprefix("/").removesuffix("/").split("/"))
        return "client" if plain and _under(path, _CLIENT) and not _under(path, _ADMIN) else "admin"


def _under(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)
