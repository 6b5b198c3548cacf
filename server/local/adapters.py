"""The registry's adapters on this engine: names become versions, and versions are loaded."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from server import metrics
from server.adapters.folder import inside, take_in
from server.adapters.manifest import Manifest, Trained, read_manifest, write_manifest
from server.adapters.registry import Alias, Gate, Registry, Shares, Version
from server.adapters.residents import Residents
from server.local.weights import Served, examine, layers
from strategies.core.errors import EngineUnavailable, InvalidRequest

_STALE_SECONDS = 0.25
"""How long a name may go on meaning what it meant, after another server moved it."""

_CANARY = "What is 12 + 7? Think step by step. 12 + 7 = 19, so the answer is 19."
_ACTS = 1e-4
"""Nats by which an adapter changes some token of the canary at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that is served, as far as its files say."""

    folder: Path | None
    tokenizer: Callable[[], Any]
    template: str | None

    @classmethod
    def find(cls, model: str, tokenizer: Callable[[], Any], template: str | None) -> "Base":
        """By its path, or where its files were downloaded to."""
        folder = Path(model)
        if not folder.is_dir():
            try:
                folder = Path(
                    cast(Any, huggingface_hub).snapshot_download(model, local_files_only=True)
                )
            except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
                return cls(folder=None, tokenizer=tokenizer, template=template)
        return cls(folder=folder, tokenizer=tokenizer, template=template)

    def differs(self, trained: Trained) -> str | None:
        """What an adapter was trained on that is not served here; reads what it compares."""
        template = self.template or getattr(self.tokenizer(), "chat_template", None)
        pairs = [("chat template", trained.chat_template, _sha(template))]
        if self.folder is not None:
            told = self.folder / "tokenizer.json"
            if trained.tokenizer is not None and told.exists():
                pairs.append(("tokenizer", trained.tokenizer, _file_sha(told)))
            files = sorted(self.folder.glob("*.safetensors"))
            if trained.weights is not None and files:
                digest = sha256("".join(map(_file_sha, files)).encode()).hexdigest()
                pairs.append(("weights", trained.weights, digest))
        wrong = (what for what, one, other in pairs if other and one not in (None, other))
        return next(wrong, None)


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
        most = lora.max_cpu_loras - len(models.lora_requests)
        if most < 1:
            raise ValueError("--max-cpu-loras leaves no room beside --lora-modules")
        self._residents = Residents(self._load, self._unload, most=most)
        self._stamp: object = None
        self._looked = -float("inf")
        self._aliases: Mapping[str, Alias] = {}
        self._versions: Collection[str] = ()
        self._plain: list[float] | None = None
        """The canary's log-probabilities without any adapter."""

    @property
    def names(self) -> set[str]:
        """What requests may name, as of the last look."""
        return {*self._aliases, *self._versions}

    async def look(self) -> None:
        """See what others have changed, and let go of what no name means any more."""
        if time.monotonic() - self._looked < _STALE_SECONDS:
            return
        self._looked = time.monotonic()
        stamp = await asyncio.to_thread(self._registry.stamp)
        if stamp != self._stamp:
            await self._read()
            self._stamp = stamp
        await self._residents.sweep()

    async def _read(self) -> None:
        self._aliases = await asyncio.to_thread(self._registry.aliases)
        versions = await asyncio.to_thread(self._registry.versions)
        self._versions = {one.id for one in versions}
        self._residents.mean({id for alias in self._aliases.values() for id in alias.shares})

    @asynccontextmanager
    async def bound(self, name: str) -> AsyncGenerator[str]:
        """What a name means, kept in the engine while the block lasts; a name of vLLM's is itself.

        Raises:
            NotFound: It meant something that is no longer there.
            InvalidRequest: The adapter cannot be served.
            Busy: The engine holds as many adapters as it can, all in use.
        """
        await self.look()
        if name in self._aliases:
            shares = self._aliases[name].shares
            [id] = random.choices(list(shares), list(shares.values()))
            metrics.ALIASED.labels(name, id).inc()
        elif name in self._versions:
            id = name
        else:
            yield name
            return
        version = await asyncio.to_thread(self._registry.version, id)
        async with self._residents.hold(version):
            yield id

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
                await asyncio.to_thread(self._registry.remove, version.id)
            raise
        await self._changed()
        return version

    def _taken_in(self, name: str, path: str) -> tuple[Version, bool]:
        folder = inside(self._imports, path)
        assert self._imports is not None
        with self._registry.incoming() as into:
            digest = take_in(folder, self._imports, into, most_bytes=self._most_bytes)
            if read_manifest(into) is None:  # anyone's peft: what it is for is not known
                write_manifest(into, Manifest(schema_version=1, kind="policy"))
            self._fits(into)
            return self._registry.publish(name, into, digest)

    def _fits(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        other = None if manifest is None else self._base.differs(manifest.base)
        if other is not None:
            raise InvalidRequest(
                f"the adapter cannot be served: it was trained on another model ({other})",
                field="path",
            )
        examine(folder, self._served)

    async def point(self, name: str, shares: Shares) -> Alias:
        """Let an alias mean these versions, loaded before the first request comes.

        Raises:
            InvalidRequest: They do not pass the gate, or the name is taken.
            NotFound: There is no such version.
        """
        if name in self._models.lora_requests or self._models.is_base_model(name):
            raise InvalidRequest(f"'{name}' is served already, and no alias", field="alias")
        for id in shares:
            version = await asyncio.to_thread(self._registry.version, id)
            async with self._residents.hold(version):
                pass
        alias = await asyncio.to_thread(self._registry.point, name, shares, self._gate)
        await self._changed()
        return alias

    async def roll_back(self, name: str) -> Alias:
        """See `Registry.roll_back`."""
        alias = await asyncio.to_thread(self._registry.roll_back, name)
        await self._changed()
        return alias

    async def remove(self, name: str) -> None:
        """Forget an alias, or delete a version that no alias means and no request uses.

        Raises:
            NotFound: There is none.
            InvalidRequest: An alias means it.
            Busy: It is in use.
        """
        if "@" in name:
            await asyncio.to_thread(self._registry.version, name)
            await self._residents.drop(name)
            await asyncio.to_thread(self._registry.remove, name)
        else:
            await asyncio.to_thread(self._registry.drop, name)
        await self._changed()

    async def cards(self) -> tuple[list[dict[str, Any]], dict[str, Alias]]:
        """Every version as clients read of it, and every alias."""
        await self._changed()
        versions = await asyncio.to_thread(self._registry.versions)
        aliases = dict(self._aliases)
        in_use = self._residents.in_use
        cards = [
            {
                "id": one.id,
                "object": "adapter",
                "kind": "policy" if one.manifest is None else one.manifest.kind,
                "base": {} if one.manifest is None else one.manifest.base.model_dump(),
                "evaluation": {} if one.manifest is None else one.manifest.evaluation,
                "aliases": [name for name, alias in aliases.items() if one.id in alias.shares],
                "resident": one.id in self._residents,
                "requests": in_use.get(one.id, 0),
            }
            for one in versions
        ]
        return cards, aliases

    async def _changed(self) -> None:
        self._looked = -float("inf")
        self._stamp = None
        await self.look()

    async def _load(self, version: Version) -> None:
        """Into the engine, looked at before and tried after."""
        await asyncio.to_thread(self._fits, version.folder)
        request = LoRARequest(
            version.id, self._models.lora_id_counter.inc(1), str(version.folder.resolve())
        )
        try:
            await self._engine.add_lora(request)
            await self._try(request)
        except EngineDeadError as error:
            raise EngineUnavailable("the engine died; try again") from error
        except Exception as error:
            with suppress(Exception):  # a rank above the configuration's stays registered otherwise
                await self._engine.remove_lora(request.lora_int_id)
            if isinstance(error, InvalidRequest):
                raise
            reason = str(error).removeprefix("Call to add_lora method failed: ")[:500]
            raise InvalidRequest(f"the adapter cannot be served: {reason}", field="path") from error
        self._models.lora_requests[version.id] = request

    async def _unload(self, id: str) -> None:
        request = self._models.lora_requests.pop(id)
        with suppress(EngineDeadError):
            await self._engine.remove_lora(request.lora_int_id)

    async def _try(self, request: LoRARequest) -> None:
        if self._plain is None:
            self._plain = await self._canary(None)
        adapted = await self._canary(request)
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
        last: RequestOutput | None = None
        async for output in self._generate(
            tokens_input(ids), params, f"canary-{uuid.uuid4().hex}", lora_request=lora, priority=-1
        ):
            last = output
        if last is None or last.prompt_logprobs is None:
            raise EngineUnavailable("the engine did not read the canary")
        rows = zip(ids[1:], last.prompt_logprobs[1:], strict=True)
        return [row[token].logprob for token, row in rows if row is not None]


def _sha(text: object) -> str | None:
    return None if text is None else sha256(str(text).encode()).hexdigest()


def _file_sha(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
