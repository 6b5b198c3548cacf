"""Mull as a vLLM endpoint plugin.

The same object under `mull serve` and under `VLLM_PLUGINS=mull vllm serve`.
"""

import asyncio
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from pydantic import SecretStr
from starlette.datastructures import State
from starlette.responses import JSONResponse
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.launcher import terminate_if_errored
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from server import logs
from server.adapters.registry import Registry
from server.admission import Admission
from server.archive import Archive
from server.batch.running import Batches
from server.bounds import Bounded
from server.calibration.shelf import Shelf
from server.endpoints import Endpoints
from server.errors import handle, nearest, reply_to
from server.keys.guard import Guard
from server.keys.keyring import Keyring
from server.local import several
from server.local.adapters import Adapters, Base
from server.local.chat import Chat, render, teach
from server.local.client import Reasoner
from server.local.engine import Client, Judges, Vocabulary
from server.local.ranks import Ranks
from server.middleware import Choosing
from server.routes import adapters, batch, calibrations, models, traces, verify
from server.routes import strategies as routes
from server.search import Searches
from server.settings import Settings
from server.store import Store
from server.tracing import tracing
from strategies.core.errors import EngineUnavailable, InvalidRequest, MullError
from strategies.core.sandbox import Sandbox


class Plugin:
    """An `EndpointPlugin`: routes first, then the engine's `generate` when there is one."""

    name = "mull"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        try:
            self._settings = Settings.read()
            self._shelf = Shelf(self._settings.calibrations)
        except ValueError as error:  # vLLM would go on without us, and so without our keys
            raise SystemExit(f"mull: the configuration is wrong: {error}") from None
        self._tracing = tracing()
        if self._settings.log_format == "json":
            logs.begin()
        self._state: State | None = None
        self._adapters: Adapters | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes, errors and the choosing middleware on vLLM's app."""
        if several.processes(app.state.args) > 1:
            try:
                several.check(self._settings)
            except ValueError as error:
                raise SystemExit(f"mull: {error}") from None
        app.include_router(routes.router)
        app.include_router(batch.router)
        app.include_router(traces.router)
        app.include_router(verify.router)
        app.include_router(calibrations.router)
        if self._settings.adapters:
            app.include_router(adapters.router)
        if self._settings.presets or self._settings.adapters:
            app.include_router(models.router)
        app.add_exception_handler(MullError, handle)
        app.add_exception_handler(EngineDeadError, _engine_died)
        app.add_middleware(
            Choosing,
            models=self.models,
            names=lambda: self._adapters,
            settings=self._settings,
            shelf=self._shelf,
        )
        app.add_middleware(Bounded, most_bytes=self._settings.max_body_bytes)
        keys = app.state.keys = self._keyring(app.state.args)
        app.add_middleware(Guard, keys=keys, open_metrics=self._settings.open_metrics)
        if self._tracing is not None:
            app.add_middleware(self._tracing.requests)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Let the engine reason."""
        assert engine_client is not None
        self._state = state
        sandbox = Sandbox()
        remote = Endpoints(self._settings.endpoints)
        keepers = [one for one in (self._archive(), self._tracing) if one is not None]
        state.closing = (sandbox.close, remote.close, *(one.close for one in keepers))
        state.chat = Chat()
        state.settings = self._settings
        state.served = self.models
        state.shown = partial(_shown, state.openai_serving_models)
        state.store = Store(self._settings.kept_traces, *keepers, processes=several.processes(args))
        for serving, make in (
            (state.openai_serving_chat, "_make_parser"),
            (state.anthropic_serving_messages, "_make_parser"),
            (state.openai_serving_responses, "_make_response_parser"),
        ):
            if serving is not None:
                teach(serving, make)
        engine: Any = engine_client
        state.base, state.shelf = _base(engine, state), self._shelf
        if self._settings.calibrations is not None:
            self._shelf.check(await asyncio.to_thread(lambda: state.base.weights))
        self._adapters = state.adapters = self._registered(engine, state)
        processes = several.processes(args)
        candidates = self._settings.max_running_candidates
        candidates = candidates or engine.vllm_config.scheduler_config.max_num_seqs
        admission = Admission(
            requests=max(1, self._settings.max_running_requests // processes),
            candidates=max(1, candidates // processes),
        )
        state.admission, state.batches = admission, Batches(processes)
        engine.generate = Reasoner(
            Client(
                generate=engine.generate,
                abort=engine.abort,
                render=partial(render, state.openai_serving_chat),
                vocabulary=Vocabulary(engine.get_tokenizer, _ends(engine)),
                judges=Judges(self._adapter, engine.get_tokenizer),
                longest=engine.vllm_config.model_config.max_model_len - 1,
            ),
            searches=Searches(
                admission=admission,
                store=state.store,
                sandbox=sandbox,
                remote=remote,
                traced=self._tracing is not None,
            ),
            adapter=self._adapter,
            settings=self._settings,
            shelf=self._shelf,
            ranks=Ranks(engine.vllm_config.parallel_config),
        )

    def models(self) -> set[str]:
        """Every name under which a model or an adapter is served."""
        if self._state is None:
            return set()
        served = self._state.openai_serving_models
        names = {model.name for model in served.base_model_paths} | set(served.lora_requests)
        return names if self._adapters is None else names | self._adapters.names

    def _keyring(self, args: Namespace) -> Keyring:
        """With a file of keys, those of `--api-key` are clients' keys, too, and checked by us.

        vLLM's own check would refuse all others, and looks at some paths only.
        """
        settings, limits = self._settings, several.processes(args) == 1
        if settings.keys is None:
            return Keyring(None, admin=settings.admin_key)
        if not hasattr(args, "mull_clients"):  # a new engine brings a new app from the same args
            said = args.api_key or [envs.VLLM_API_KEY]
            args.mull_clients = [SecretStr(key) for key in said if key]
            args.api_key = [""]  # none; without any, vLLM would go by VLLM_API_KEY
        return Keyring(
            settings.keys, admin=settings.admin_key, clients=args.mull_clients, limits=limits
        )

    def _archive(self) -> Archive | None:
        settings = self._settings
        if settings.traces is None:
            return None
        return Archive(settings.traces, most_bytes=settings.max_traces_bytes)

    def _registered(self, engine: Any, state: State) -> Adapters | None:
        settings, config = self._settings, engine.vllm_config
        if settings.adapters is None:
            return None
        if config.lora_config is None:
            raise ValueError("MULL_ADAPTERS needs --enable-lora")
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            raise ValueError(
                "MULL_ADAPTERS and VLLM_ALLOW_RUNTIME_LORA_UPDATING exclude each other: vLLM's own "
                "routes load what nobody has looked at"
            )
        return Adapters(
            engine=engine,
            generate=engine.generate,
            models=state.openai_serving_models,
            base=state.base,
            registry=Registry(settings.adapters),
            imports=settings.adapter_imports,
            gate=settings.adapter_gate,
            most_bytes=settings.max_adapter_bytes,
        )

    def _adapter(self, name: str, field: str = "verifier.adapter") -> LoRARequest | None:
        assert self._state is not None
        models = self._state.openai_serving_models
        known: dict[str, LoRARequest] = models.lora_requests
        if name not in known and not models.is_base_model(name):
            hint = nearest(name, sorted(self.models()))
            raise InvalidRequest(f"there is no adapter '{name[:200]}'; {hint}", field=field)
        return known.get(name)


async def _shown(models: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """What vLLM says of its models."""
    return (await models.show_available_models()).model_dump()


def _base(engine: Any, state: State) -> Base:
    config, chat = engine.vllm_config, state.openai_serving_chat
    return Base.find(
        config.model_config.model,
        engine.get_tokenizer,
        None if chat is None else chat.chat_template,
        revision=config.model_config.revision,
        cache_dir=config.load_config.download_dir,
    )


def _ends(engine: Any) -> list[int]:
    """The tokens with which the model ends a sequence, as vLLM finds them."""
    config: dict[str, Any] = engine.vllm_config.model_config.try_get_generation_config()
    ends: Any = config.get("eos_token_id")
    ends = [engine.get_tokenizer().eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def plugin() -> Plugin:
    """The entry point of `vllm.endpoint_plugins`."""
    return Plugin()


async def _engine_died(request: Request, error: Exception) -> JSONResponse:
    """A dead engine is a 503 for whoever waits on it.

    On a stock vLLM server it also ends the server.
    """
    terminate_if_errored(request.app.state.server, request.app.state.engine_client)
    return reply_to(EngineUnavailable("the engine died; a new one is being started, try again"))
