"""The registry's adapters on this engine: names become versions, and versions are loaded."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from functools import cached_property
from hashlib import file_digest, sha256
from math import isfinite
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from server.adapters.folder import inside, take_in
from server.adapters.manifest import Manifest, Trained, read_manifest, write_manifest
from server.adapters.names import Watched
from server.adapters.registry import Alias, Gate, Registry, Shares, Version, check_name
from server.adapters.residents import Residents
from server.local.engine import token_ids
from server.local.weights import Served, examine, layers
from strategies.core.errors import Busy, EngineUnavailable, InvalidRequest, NotFound

_SILENT_SECONDS = 120.0
"""After which an engine that loads or forgets an adapter is taken for dead."""

_CANARY = "What is 12 + 7? Think step by step. 12 + 7 = 19, so the answer is 19."
_REFUSED = "Call to add_lora method failed: "
"""How vLLM's engine begins what it says of an adapter that it does not take."""
_log = logging.getLogger(__name__)
_ACTS = 1e-4
"""Nats by which an adapter changes some token of the canary at least."""


class Base:
    """The model that is served, as far as its files say. It does not change."""

    def __init__(
        self, folder: Path | None, tokenizer: Callable[[], Any], template: str | None
    ) -> None:
        """`folder` is where its weights are; `template` is in place of the tokenizer's own."""
        self.folder = folder
        self.tokenizer = tokenizer
        self._template = template

    @classmethod
    def find(
        cls,
        model: str,
        tokenizer: Callable[[], Any],
        template: str | None,
        **download: Any,
    ) -> "Base":
        """By its path, or where its files were downloaded to (see `snapshot_download`)."""
        folder, hub = Path(model), cast(Any, huggingface_hub)
        if not folder.is_dir():
            try:
                folder = Path(hub.snapshot_download(model, local_files_only=True, **download))
            except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
                return cls(None, tokenizer, template)
        return cls(folder, tokenizer, template)

    @cached_property
    def weights(self) -> str | None:
        """SHA-256 of the digests of its files of weights, by name."""
        files = [] if self.folder is None else sorted(self.folder.glob("*.safetensors"))
        return _sha("".join(map(_file_sha, files))) if files else None

    @cached_property
    def _tokenizer(self) -> str | None:
        places = [Path(str(self.tokenizer().name_or_path)), *([self.folder] if self.folder else [])]
        files = (place / "tokenizer.json" for place in places)
        return next((_file_sha(file) for file in files if file.exists()), None)

    def differs(self, trained: Trained) -> str | None:
        """What an adapter was trained on that is not served here; reads what it compares."""
        if trained.chat_template is not None:
            template = self._template or getattr(self.tokenizer(), "chat_template", None)
            if trained.chat_template != _sha(template):
                return "chat template"
        if trained.tokenizer not in (None, self._tokenizer or trained.tokenizer):
            return "tokenizer"
        if trained.weights not in (None, self.weights or trained.weights):
            return "weights"
        return None


class Adapters:
    """Names, versions and residents of one server."""

    def __init__(
        self,
        *,
        engine: Any,
        generate: Callable[..., AsyncGenerator[RequestOutput, None]],
        models: Any,
        base: Base,
        registry: Registry,
        imports: Path | None,
        gate: Gate,
        most_bytes: int,
    ) -> None:
        """`engine` is vLLM's client, `models` its table of served names."""
        lora = engine.vllm_config.lora_config
        self._engine = engine
        self._generate = generate
        self._models = models
        self._base = base
        self._registry = registry
        self._imports = imports
        self._gate = gate
        self._most_bytes = most_bytes
        found = None if base.folder is None else layers(base.folder)
        self._served = Served(layers=found, lora=lora)
        self._static = set(models.lora_requests)
        most = lora.max_cpu_loras - len(self._static)
        if most < 1:
            raise ValueError("--max-cpu-loras leaves no room beside --lora-modules")
        self._residents = Residents(self._load, self._unload, most=most)
        self._watched = Watched(registry)
        self._fitting: set[str] = set()
        """Versions that were looked at, and do not change."""
        self._known: dict[str, Version] = {}
        """Those in the engine, which need no registry any more."""
        self._plain: list[float] | None = None
        """The canary's log-probabilities without any adapter."""

    @property
    def names(self) -> set[str]:
        """What requests may name, as of the last look."""
        return {*self._watched.aliases, *self._watched.versions}

    @property
    def most(self) -> int:
        """Versions that the engine holds at once."""
        return self._residents.most

    async def look(self, *, at_once: bool = False) -> None:
        """See what others have changed, and let go of what no name means any more.

        While the registry cannot be read, names mean what they meant.
        """
        if not await self._watched.look(at_once=at_once):
            return
        meant = {id for alias in self._watched.aliases.values() for id in alias.shares}
        self._residents.mean(meant, self._watched.versions, self._pinned())
        if not at_once:  # who changes something does not wait for the engine to forget
            await self._residents.sweep()

    def _pinned(self, but: str | None = None) -> set[str]:
        """What pinned aliases mean, one alias left out."""
        return {
            id
            for name, alias in self._watched.aliases.items()
            if alias.pinned and name != but
            for id in alias.shares
        }

    def meant(self, name: str) -> str | None:
        """A version that a name means, drawn by its shares; None for a name that is none of ours.

        What vLLM serves by itself comes first.
        """
        if name in self._static or self._models.is_base_model(name):
            return None
        known = self._watched.meant(name)
        return name if known is None and name in self._residents else known

    @asynccontextmanager
    async def held(self, version: str) -> AsyncGenerator[None]:
        """Have a version in the engine while the block lasts.

        Raises:
            NotFound: It is no longer there.
            InvalidRequest: It cannot be served.
            Busy: The engine holds as many as it can, all in use.
        """
        found = self._known.get(version) if version in self._residents else None
        if found is None:
            found = await asyncio.to_thread(self._registry.version, version)
        async with self._residents.hold(found):
            yield

    async def publish(self, name: str, path: str) -> Version:
        """Take an adapter in from a folder, prove that it acts, and keep it as a version.

        Raises:
            InvalidRequest: It cannot be served; the message says why.
        """
        version, new = await asyncio.to_thread(self._taken_in, name, path)
        try:
            async with self._residents.hold(version):
                pass
        except InvalidRequest:
            if new:
                with suppress(Busy, InvalidRequest, NotFound):  # another has it by now
                    async with self._residents.without(version.id):
                        await asyncio.to_thread(self._registry.remove, version.id)
            raise
        await self.look(at_once=True)
        return version

    def _taken_in(self, name: str, path: str) -> tuple[Version, bool]:
        check_name(name, "name")
        folder = inside(self._imports, path)
        assert self._imports is not None
        with self._registry.incoming() as into:
            digest = take_in(folder, self._imports, into, most_bytes=self._most_bytes)
            if read_manifest(into) is None:  # anyone's peft: what it is for is not known
                write_manifest(into, Manifest(schema_version=1, kind="policy"))
            self._fits(into)
            version, new = self._registry.publish(name, into, digest)
            self._fitting.add(version.id)
            return version, new

    def _fits(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        other = None if manifest is None else self._base.differs(manifest.base)
        if other is not None:
            raise InvalidRequest(
                f"the adapter cannot be served: it was trained on another model ({other})",
                field="path",
            )
        if manifest is not None and manifest.judging is not None:
            try:
                token_ids(self._base.tokenizer(), manifest.judging.labels)
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"the adapter cannot be served: {error}", field="path"
                ) from error
        examine(folder, self._served)

    async def point(self, name: str, shares: Shares, *, pinned: bool | None = None) -> Alias:
        """Let an alias mean these versions, loaded before the first request comes.

        Raises:
            InvalidRequest: They do not pass the gate, the name is taken, or no room is left beside
                what is pinned.
            NotFound: There is no such version.
        """
        if name in self._static or self._models.is_base_model(name):
            raise InvalidRequest(f"'{name}' is served already, and no alias", field="alias")
        await self.look(at_once=True)
        before = self._watched.aliases.get(name)
        if pinned or (pinned is None and before is not None and before.pinned):
            self._leave_room(len({*shares, *self._pinned(but=name)}))
        await self._prepare(shares)
        alias = await asyncio.to_thread(
            self._registry.point, name, shares, self._gate, pinned=pinned
        )
        await self.look(at_once=True)
        return alias

    async def roll_back(self, name: str) -> Alias:
        """See `Registry.roll_back`; what it meant is loaded first."""
        now = await asyncio.to_thread(self._registry.alias, name)
        for shares in now.history[-2:-1]:
            if now.pinned:
                self._leave_room(len({*shares, *self._pinned(but=name)}))
            # What is gone is refused in better words below; for room the first request waits.
            with suppress(NotFound, Busy):
                await self._prepare(shares)
        alias = await asyncio.to_thread(self._registry.roll_back, name)
        await self.look(at_once=True)
        return alias

    def _leave_room(self, pinned: int) -> None:
        if pinned >= self.most:
            raise InvalidRequest(
                f"{pinned} adapters would be pinned, and the engine holds {self.most} "
                "(--max-cpu-loras): one place is left free",
                field="pinned",
            )

    async def _prepare(self, shares: Shares) -> None:
        if len(shares) > self.most:
            raise InvalidRequest(
                f"the engine holds {self.most} adapters (--max-cpu-loras)", field="versions"
            )
        for id in shares:
            async with self.held(id):
                pass

    async def drop(self, alias: str) -> None:
        """Forget an alias; what it meant goes once drained.

        Raises:
            NotFound: There is none.
        """
        await asyncio.to_thread(self._registry.drop, alias)
        await self.look(at_once=True)

    async def remove(self, version: str) -> None:
        """Delete a version that no alias means and no request uses.

        Raises:
            NotFound: There is none.
            InvalidRequest: An alias means it.
            Busy: It is in use.
        """
        await asyncio.to_thread(self._registry.free, version)
        async with self._residents.without(version):
            await asyncio.to_thread(self._registry.remove, version)
        await self.look(at_once=True)

    async def cards(self) -> tuple[list[dict[str, Any]], Mapping[str, Alias]]:
        """Every version as its operator reads of it, and every alias."""
        await self.look(at_once=True)
        versions = await asyncio.to_thread(self._registry.versions)
        aliases, in_use, pinned = self._watched.aliases, self._residents.in_use, self._pinned()
        cards = [
            {
                "id": one.id,
                "object": "adapter",
                "kind": "policy" if one.manifest is None else one.manifest.kind,
                "base": {} if one.manifest is None else one.manifest.base.model_dump(),
                "evaluation": {} if one.manifest is None else one.manifest.evaluation,
                "aliases": [name for name, alias in aliases.items() if one.id in alias.shares],
                "resident": one.id in self._residents,
                "pinned": one.id in pinned,
                "requests": in_use.get(one.id, 0),
            }
            for one in versions
        ]
        return cards, aliases

    async def _load(self, version: Version) -> None:
        """Into the engine, looked at before and tried after; if it fails, nothing is left there."""
        if version.id not in self._fitting:
            await asyncio.to_thread(self._fits, version.folder)
            self._fitting.add(version.id)
        request = LoRARequest(
            version.id, self._models.lora_id_counter.inc(1), str(version.folder.resolve())
        )
        try:
            await self._add(request)
            await self._try(request)
        except BaseException:
            # Also where it was refused or the client has left: the engine may have it by now.
            with suppress(Exception):
                await self._engine.remove_lora(request.lora_int_id)
            raise
        self._models.lora_requests[version.id] = request
        self._known[version.id] = version

    async def _add(self, request: LoRARequest) -> None:
        try:
            # An engine that dies meanwhile answers nothing.
            async with asyncio.timeout(_SILENT_SECONDS):
                await self._engine.add_lora(request)
        except (EngineDeadError, TimeoutError) as error:
            raise EngineUnavailable("the engine died; try again") from error
        except Exception as error:
            said = str(error)
            if not said.startswith(_REFUSED):
                raise
            if not await asyncio.to_thread(Path(request.lora_path).is_dir):
                raise NotFound(f"there is no adapter '{request.lora_name}'") from error
            reason = said.removeprefix(_REFUSED).replace(request.lora_path, request.lora_name)
            raise InvalidRequest(
                f"the adapter cannot be served: {reason[:500]}", field="path"
            ) from error

    async def _unload(self, id: str) -> None:
        request = self._models.lora_requests.pop(id)
        self._known.pop(id, None)
        with suppress(EngineDeadError, TimeoutError):
            async with asyncio.timeout(_SILENT_SECONDS):
                await self._engine.remove_lora(request.lora_int_id)

    async def _try(self, request: LoRARequest) -> None:
        if self._plain is None:
            self._plain = await self._canary(None)
        adapted = await self._canary(request)
        if not all(map(isfinite, adapted)):
            raise InvalidRequest(
                "the adapter cannot be served: with it the model's probabilities are no numbers",
                field="path",
            )
        if max(abs(one - other) for one, other in zip(self._plain, adapted, strict=True)) < _ACTS:
            raise InvalidRequest(
                "the adapter cannot be served: with it the model says exactly what it says without",
                field="path",
            )

    async def _canary(self, lora: LoRARequest | None) -> list[float]:
        """The log-probabilities of a text that is the same each time."""
        ids: list[int] = self._base.tokenizer().encode(_CANARY)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"canary-{uuid.uuid4().hex}"
        last: RequestOutput | None = None
        try:
            async with aclosing(
                self._generate(tokens_input(ids), params, name, lora_request=lora, priority=-1)
            ) as outputs:
                async for output in outputs:
                    last = output
        except EngineDeadError as error:
            raise EngineUnavailable("the engine died; try again") from error
        if last is None or last.prompt_logprobs is None:
            raise EngineUnavailable("the engine did not read the canary; try again")
        rows = zip(ids[1:], last.prompt_logprobs[1:], strict=True)
        return [row[token].logprob for token, row in rows if row is not None]


def _sha(text: object) -> str | None:
    return None if text is None else sha256(str(text).encode()).hexdigest()


def _file_sha(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
