"""What each name has used, in this process: requests and generated tokens a minute, and at once."""

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import ceil

from starlette.datastructures import Headers
from starlette.types import Message, Send

from server.keys.keyring import Key
from strategies.core.errors import Busy

Clock = Callable[[], float]

TAB = "mull.tab"
"""Where a request's scope has its tab."""

_TOLD = re.compile(rb'(?<!\\)"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
"""Usage in a reply. Within a JSON string a quote has a backslash before it, so words are none."""

_OVERLAP = 64
"""Bytes of a piece that are read again with the next, lest usage stand on the border."""


class Bucket:
    """Fills within a minute, and may be overdrawn: the next then waits until that is made good."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    def wait(self) -> float:
        """Seconds until one can be taken; 0 now."""
        return max(0.0, round((1 - self._flowed()) * 60 / self.per_minute, 6))

    def take(self, amount: int) -> None:
        """Take so many, be they there or not."""
        self._level = self._flowed() - amount

    def _flowed(self) -> float:
        now = self._clock()
        came = max(0.0, now - self._seen) * self.per_minute / 60
        self._seen = now
        self._level = min(float(self.per_minute), self._level + came)
        return self._level


class Account:
    """Of one name. Changes only between awaits, so it needs no lock."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.running = 0

    @contextmanager
    def enter(self, key: Key) -> Generator["Tab"]:
        """Count a request while the block lasts.

        Raises:
            Busy: The name has used up what it has, until the seconds given are over.
        """
        self._requests = self._bucket(self._requests, key.requests_per_minute)
        self._tokens = self._bucket(self._tokens, key.tokens_per_minute)
        if key.concurrent is not None and self.running >= key.concurrent:
            why = f"your key may have {key.concurrent} requests at once"
            raise Busy(why, seconds=1, scarce="key")
        for bucket, what in ((self._requests, "requests"), (self._tokens, "generated tokens")):
            if bucket is not None and (seconds := bucket.wait()) > 0:
                raise Busy(
                    f"your key has {bucket.per_minute} {what} a minute, which are used up",
                    seconds=ceil(seconds),
                    scarce="key",
                )
        if self._requests is not None:
            self._requests.take(1)
        self.running += 1
        tab = Tab(self, self._tokens)
        try:
            yield tab
        finally:
            self.running -= 1
            tab.close()

    def _bucket(self, had: Bucket | None, per_minute: int | None) -> Bucket | None:
        """As the key says it now: the file may have changed."""
        if per_minute is None or had is None:
            return None if per_minute is None else Bucket(per_minute, self._clock)
        had.per_minute = per_minute
        return had


class Tab:
    """What one request costs: what its searches generated, else what its reply tells."""

    def __init__(self, account: Account, tokens: Bucket | None) -> None:
        self._account = account
        self._tokens = tokens
        self._searched = self._told = self._pieces = 0
        self._streams = False
        self._last = b""

    @property
    def rivals(self) -> int:
        """Requests of the same name under way, this one included."""
        return max(1, self._account.running)

    def search(self, tokens: int) -> None:
        """A search is over, and generated so many, whether or not anybody still listens."""
        self._searched += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)

    def reading(self, send: Send) -> Send:
        """A `send` that is read along; without a budget of tokens, nobody needs to know."""
        if self._tokens is None:
            return send

        async def read(message: Message) -> None:
            self._read(message)
            await send(message)

        return read

    def close(self) -> None:
        """Take what the reply told, of a request that did not search.

        A stream without usage counts its pieces: each has a token, or more if the server is busy.
        """
        if self._tokens is not None and not self._searched:
            self._tokens.take(self._told or self._pieces)

    def _read(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._streams = kind.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            piece = message.get("body", b"")
            if self._streams:
                self._pieces += piece.count(b"data: {")
            seen = self._last + piece
            self._told = max(self._told, *(int(one) for one in _TOLD.findall(seen)), 0)
            self._last = seen[-_OVERLAP:]
