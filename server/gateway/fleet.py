"""The upstreams of a gateway: which are well, which holds a prefix, and how one is asked.

Knows HTTP and nothing of searches.
"""

import json
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import httpx
from pydantic import SecretStr

from server import metrics
from server.wire import JSON, as_list, as_object
from strategies.core.aio import Arrivals
from strategies.core.errors import (
    Busy,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    MullError,
    NotFound,
    Unauthorized,
)

SESSION = "X-Session-ID"
"""What routers hash, vllm-router's `consistent_hash` before all else; vLLM reads it, too."""

_STALE_SECONDS = 10.0
"""How long what an upstream serves may go unasked."""

_IDLE_SECONDS = 2.0
"""How long an idle connection is kept: vLLM's own server closes it after 5."""

_PROBE_SECONDS = 10.0

_SPARE = 64
"""Sequences that an upstream may have above twice the mean before a new search goes elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a gateway treats its upstreams; `Settings` has the words."""

    key: SecretStr | None = None
    keyed: bool = False
    """Whether keys are checked here, and so are no business of an upstream's."""
    connect_seconds: float = 5.0
    silent_seconds: float = 120.0
    connections: int = 1024
    failures: int = 3
    rest_seconds: float = 5.0
    retries: int = 2
    traced: bool = False
    """Whether runs become spans here, so that what upstreams do is below those."""


class Lost(EngineUnavailable):
    """An upstream did not answer, or not to the end."""


class Breaker:
    """Leaves alone what failed `failures` times in a row; after a rest one request may try it."""

    def __init__(
        self, *, failures: int, rest_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = failures
        self._rest_seconds = rest_seconds
        self._clock = clock
        self._failed = 0
        self._until = 0.0
        self._trying = False

    @property
    def open(self) -> bool:
        """Whether nothing may be asked now."""
        if self._failed < self._most:
            return False
        return self._trying or self._clock() < self._until

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Ask something; a `Lost` is a failure, and whatever else ends the block is none."""
        trying = self._failed >= self._most
        self._trying = self._trying or trying
        try:
            yield
        except Lost:
            self._failed += 1
            self._until = self._clock() + self._rest_seconds
            raise
        finally:
            if trying:
                self._trying = False

    def answered(self) -> None:
        """It is well."""
        self._failed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What an upstream can do besides OpenAI's API."""

    tokens: bool
    """Takes and gives token ids, as vLLM does."""
    longest: int
    """Tokens that a prompt may have."""
    aborts: bool
    """Ends a request by its id, and tells what it had generated (`--enable-scale-out`)."""
    weights: str | None = None
    """The digest of what it serves; a Mull server tells it."""


@dataclass(slots=True, eq=False)
class Upstream:
    """One server, or a router before several."""

    url: str
    client: httpx.AsyncClient
    breaker: Breaker
    cards: list[JSON] = field(default_factory=list[JSON])
    """What it says of its models; none as long as it was not reached."""
    features: Features | None = None
    running: int = 0
    """Requests under way."""
    looked: float = -1e9

    @property
    def models(self) -> set[str]:
        """The names that it serves."""
        return {str(card.get("id")) for card in self.cards}

    @property
    def name(self) -> str:
        """Where it is, without what a URL may hold of passwords."""
        return self.client.base_url.netloc.decode()

    @asynccontextmanager
    async def asked(self, request: httpx.Request) -> AsyncGenerator[httpx.Response]:
        """The reply to a request, whose body is still to be read; it is closed after the block.

        Raises:
            InvalidRequest: It cannot be said in HTTP.
            Lost: There is none, or it breaks off while the block reads it.
        """
        self.running += 1
        try:
            with (
                metrics.ASKED.labels(self.name).track_inprogress(),
                metrics.FAILED.labels(self.name).count_exceptions(Lost),
                self.breaker.attempt(),
            ):
                try:
                    reply = await self.client.send(request, stream=True)
                    try:
                        if reply.status_code not in (502, 503, 504):
                            self.breaker.answered()
                        yield reply
                    finally:
                        await reply.aclose()
                except httpx.LocalProtocolError as error:
                    # The client's doing, so no upstream is to be thought unwell; what it is may
                    # hold a key.
                    raise InvalidRequest("a header of the request cannot be passed on") from error
                except (httpx.TransportError, httpx.StreamError) as error:
                    what = type(error).__name__
                    raise Lost(f"an upstream did not answer ({what}); try again") from error
        finally:
            self.running -= 1
            metrics.OPEN.labels(self.name).set(self.breaker.open)


class Fleet:
    """All upstreams. What they serve is asked for when that was not done lately."""

    def __init__(
        self,
        urls: Sequence[str],
        terms: Terms,
        *,
        transport: Callable[[str], httpx.AsyncBaseTransport] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.terms = terms
        self._clock = clock
        self._turn = 0
        bare = (url.rstrip("/").removesuffix("/v1") for url in urls)
        self.upstreams = [
            Upstream(
                url=url,
                client=_client(url, terms, transport),
                breaker=Breaker(
                    failures=terms.failures, rest_seconds=terms.rest_seconds, clock=clock
                ),
            )
            for url in dict.fromkeys(bare)
        ]

    async def close(self) -> None:
        """Close all connections."""
        for upstream in self.upstreams:
            await upstream.client.aclose()

    @property
    def models(self) -> set[str]:
        """Every name that any of them serves."""
        return set[str]().union(*(one.models for one in self.upstreams))

    @property
    def cards(self) -> list[JSON]:
        """What they say of their models, each once."""
        return list({card.get("id"): card for one in self.upstreams for card in one.cards}.values())

    @property
    def known(self) -> list[Features]:
        """What the upstreams that were reached can do."""
        return [one.features for one in self.upstreams if one.features is not None and one.cards]

    @property
    def tokens(self) -> bool:
        """Whether all of them take and give token ids."""
        return all(one.tokens for one in self.known)

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have on any of them."""
        return min((one.longest for one in self.known), default=0)

    def base(self, model: str) -> str:
        """The name of the model whose tokens those of `model` are: an adapter's base."""
        known = {str(card.get("id")): card for card in self.cards}
        card = known.get(model)
        if card is None:
            return next(iter(known), model)
        parent = card.get("parent")
        return parent if isinstance(parent, str) and parent in known else model

    def adapts(self, model: str) -> bool:
        """Whether a name is that of an adapter which an upstream serves by itself."""
        return any(card.get("id") == model and card.get("parent") for card in self.cards)

    def place(
        self, key: str | None, model: str, *, but: Collection[Upstream] = ()
    ) -> Upstream | None:
        """The upstream for a request: the key's own by rendezvous hashing, unless overloaded.

        Without a key, the one with the least to do. None if none may be asked.
        """
        well = [one for one in self.upstreams if one not in but and not one.breaker.open]
        base = self.base(model)
        able = [one for one in well if model in one.models or base in one.models] or well
        if not able:
            return None
        if key is None:
            self._turn += 1
            turned = able[self._turn % len(able) :] + able[: self._turn % len(able)]
            return min(turned, key=lambda one: one.running)
        most = 2 * sum(one.running for one in able) / len(able) + _SPARE
        free = [one for one in able if one.running <= most]
        return max(free, key=lambda one: blake2b(f"{one.url} {key}".encode()).digest())

    def headers(self, headers: Mapping[str, str], key: str | None) -> dict[str, str]:
        """What an upstream hears of a request: who asks, and what it belongs to."""
        names = ("traceparent",) if self.terms.keyed else ("authorization", "traceparent")
        said = {name: headers[name].strip() for name in names if name in headers}
        if self.terms.key is not None:
            said["authorization"] = f"Bearer {self.terms.key.get_secret_value()}"
        if key is not None:
            said[SESSION] = key.strip()
        return said

    async def ask(
        self, path: str, body: JSON, *, model: str, headers: Mapping[str, str], key: str | None
    ) -> JSON:
        """An upstream's answer to a question that changes nothing there, so any may be asked.

        Raises:
            MullError: It refuses, or none answers.
        """
        tried: list[Upstream] = []
        lost: EngineUnavailable = EngineUnavailable("no upstream is well; try again")
        while len(tried) <= self.terms.retries:
            upstream = self.place(key, model, but=tried) or (
                self.place(key, model) if tried else None
            )
            if upstream is None:
                break
            metrics.RETRIED.inc(bool(tried))
            tried.append(upstream)
            try:
                return await self._answer(upstream, "POST", path, body, headers)
            except Lost as error:
                lost = error
        raise lost

    async def _answer(
        self,
        upstream: Upstream,
        method: str,
        path: str,
        body: JSON | None,
        headers: Mapping[str, str],
        seconds: float | None = None,
    ) -> JSON:
        patience = upstream.client.timeout if seconds is None else seconds
        request = upstream.client.build_request(
            method, path, json=body, headers=headers, timeout=patience
        )
        async with upstream.asked(request) as reply:
            raw = await reply.aread()
            if reply.status_code != 200:
                raise refused(reply.status_code, raw, reply.headers)
            found = said(raw)
            if found is None:
                raise Lost("an upstream answered with something else than JSON")
            return found

    async def look(self, headers: Mapping[str, str]) -> None:
        """Ask what the upstreams serve, those that were not asked lately."""
        now = self._clock()
        due = [one for one in self.upstreams if now - one.looked >= _STALE_SECONDS]
        due = [one for one in due if not one.breaker.open]
        if not due:
            return
        for one in due:
            one.looked = now
        async with Arrivals[None]() as arrivals:
            for one in due:
                arrivals.start(self._look(one, self.headers(headers, None)))
            async for _ in arrivals:
                pass

    async def _look(self, upstream: Upstream, headers: Mapping[str, str]) -> None:
        try:
            served = await self._answer(
                upstream, "GET", "/v1/models", None, headers, _PROBE_SECONDS
            )
            cards = [card for card in map(as_object, as_list(served.get("data")) or []) if card]
            if upstream.features is None and cards:
                upstream.features = await self._features(upstream, str(cards[0].get("id")), headers)
            upstream.cards = cards
        except MullError:
            upstream.looked = -1e9  # whoever asks next looks again

    async def _features(
        self, upstream: Upstream, model: str, headers: Mapping[str, str]
    ) -> Features:
        async def tried(method: str, path: str, body: JSON | None) -> JSON | None:
            try:
                return await self._answer(upstream, method, path, body, headers, _PROBE_SECONDS)
            except Lost:
                raise
            except MullError:
                return None

        tokens = await tried("POST", "/tokenize", {"model": model, "prompt": "a"})
        longest = None if tokens is None else tokens.get("max_model_len")
        if tokens is None or not isinstance(longest, int):
            return Features(tokens=False, longest=1 << 30, aborts=False)
        known = await tried("GET", "/v1/calibrations", None) or {}
        weights = known.get("weights")
        return Features(
            tokens=True,
            longest=longest - 1,
            aborts=await self.abort(upstream, [], headers),
            weights=weights if isinstance(weights, str) else None,
        )

    async def abort(
        self, upstream: Upstream, ids: Sequence[str], headers: Mapping[str, str]
    ) -> bool:
        """End requests by vLLM's route for it; say whether there is one."""
        request = upstream.client.build_request(
            "POST",
            "/inference/v1/abort_requests",
            json={"request_ids": list(ids)},
            headers=headers,
            timeout=_PROBE_SECONDS,
        )
        async with upstream.asked(request) as reply:
            return reply.status_code == 200


def said(raw: bytes) -> JSON | None:
    """A JSON object; None if it is none."""
    try:
        return as_object(json.loads(raw))
    except (ValueError, RecursionError):
        return None


def refused(status: int, raw: bytes, headers: Mapping[str, str]) -> MullError:
    """An upstream's refusal as an error of ours, in its own words."""
    told = said(raw) or {}
    error = as_object(told.get("error")) or told
    words = error.get("message") or told.get("detail")
    reason = words if isinstance(words, str) else f"an upstream answered with status {status}"
    param: Any = error.get("param")
    match status:
        case 401:
            return Unauthorized(reason)
        case 403:
            return Forbidden(reason)
        case 404:
            return NotFound(reason)
        case 429:
            after = headers.get("retry-after", "")
            seconds = min(3600, int(after)) if after.isdecimal() else 1
            return Busy(reason, seconds=seconds, scarce="upstreams")
        case _ if 400 <= status < 500:
            return InvalidRequest(reason, field=param if isinstance(param, str) else None)
        case 502 | 503 | 504:
            return Lost(f"an upstream serves nobody now (status {status}); try again")
        case _:  # of this request, as a rule: others may well be answered
            return EngineUnavailable(f"an upstream failed with status {status}")


def _client(
    url: str, terms: Terms, transport: Callable[[str], httpx.AsyncBaseTransport] | None
) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        transport=None if transport is None else transport(url),
        trust_env=False,  # they are asked directly
        limits=httpx.Limits(
            max_connections=terms.connections,
            max_keepalive_connections=terms.connections,
            keepalive_expiry=_IDLE_SECONDS,
        ),
        timeout=httpx.Timeout(terms.silent_seconds, connect=terms.connect_seconds),
        headers={"accept-encoding": "identity"},
    )
