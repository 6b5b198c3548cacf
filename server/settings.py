"""The only reader of the environment, and the only writer of what vLLM reads from it."""

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from server.adapters.registry import Rule
from server.bounds import Bounds
from server.endpoints import Endpoint, check_url
from server.gateway.fleet import Terms
from server.keys.keyring import read as read_keys
from server.verifiers.catalogue import Allowed, resolve
from server.wire import as_object
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest
from strategies.registry import STRATEGIES, AnyStrategy

_OTLP = ("TRACES_", "")
"""What is said of spans alone comes before what is said of all signals."""

FILE_ONLY = {"limits", "presets", "endpoints", "adapter_gate", "efforts"}
"""Settings that are no variables of the environment."""


class Preset(BaseModel):
    """A strategy with a name, for clients that can only pick a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: AnyStrategy
    budget: Limits = Field(default=Limits(), description="Where the request sets none.")
    description: str = Field(default="", max_length=1000)


class Settings(BaseModel):
    """What an operator may set: in the YAML file that MULL_CONFIG names, or as MULL_<NAME>.

    The environment wins. Presets, endpoints, limits, efforts and the gate are for the file only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: int = Field(
        default=16 << 20, ge=1024, description="Largest request body that is read."
    )
    max_turns: int = Field(default=4096, ge=1, description="Of a conversation.")
    max_schema_chars: int = Field(
        default=1 << 18, ge=1, description="Of tools, and of what answers are to keep to, as JSON."
    )
    engine_restarts: int = Field(
        default=3, ge=0, description="New engines in place before the server gives up."
    )
    drain_seconds: float = Field(
        default=20.0, ge=0, le=3600, description="What is under way at a SIGTERM may still take."
    )
    max_running_requests: int = Field(
        default=512, ge=1, description="Strategy requests at once; one more is told to come again."
    )
    max_running_candidates: int | None = Field(
        default=None, ge=1, description="Candidates at once; unset: the engine's max_num_seqs."
    )
    max_batch_prompts: int = Field(
        default=1000, ge=1, le=100_000, description="Prompts of a batch that share a budget."
    )
    heartbeat_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="Longest silence of a stream."
    )
    kept_traces: int = Field(
        default=256, ge=0, le=100_000, description="Ended runs that GET /v1/traces still knows."
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="`json`: lines for machines, one for each search that is over, too.",
    )
    traces: Path | None = Field(
        default=None, description="A directory that keeps runs on disk, to be learned from."
    )
    max_traces_bytes: int = Field(
        default=1 << 30, ge=1 << 20, description="Of that directory; the oldest runs go first."
    )
    calibrations: Path | None = Field(
        default=None, description="A directory of what `mull calibrate` has written."
    )
    run_code: bool = Field(
        default=False, description="Let the verifier `unit_tests` run candidates' code, locked up."
    )
    adapters: Path | None = Field(
        default=None, description="The registry of adapters; a directory that servers may share."
    )
    adapter_imports: Path | None = Field(
        default=None, description="The directory that adapters may be taken in from."
    )
    max_adapter_bytes: int = Field(
        default=2 << 30, ge=1, description="Largest file of weights that is taken in."
    )
    keys: Path | None = Field(
        default=None, description="The file of `mull keys`; with it, every request needs a key."
    )
    open_metrics: bool = Field(
        default=False, description="Show /metrics without a key, where others need one."
    )
    admin_key: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="An admin's key beside those of the file, or without one, for adapters.",
    )
    api_key: SecretStr | None = Field(
        default=None, description="What `mull batch` sends to a server that wants a key."
    )
    upstreams: tuple[str, ...] = Field(
        default=(),
        description="URLs of the servers behind `mull gateway`; with commas between them.",
    )
    upstream_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Sent to them as the bearer token; unset: what the client sends.",
    )
    upstream_connect_seconds: float = Field(
        default=5.0, ge=0.05, le=60, description="Until one is taken for gone."
    )
    upstream_silent_seconds: float = Field(
        default=120.0, ge=0.1, le=3600, description="Longest silence of one that was asked."
    )
    upstream_connections: int = Field(
        default=1024, ge=1, le=65_536, description="To each, at most."
    )
    upstream_failures: int = Field(
        default=3, ge=1, le=1000, description="In a row; then one is left alone for a while."
    )
    upstream_rest_seconds: float = Field(
        default=5.0, ge=0.05, le=3600, description="That while; then one request tries."
    )
    upstream_retries: int = Field(
        default=2, ge=0, le=16, description="Further tries of what has generated nothing yet."
    )
    adapter_gate: dict[str, Rule] = Field(
        default_factory=dict[str, Rule],
        description="By measure of an evaluation, what an alias demands of a version.",
    )
    limits: Limits = Field(default=Limits(), description="No request's budget is larger.")
    endpoints: dict[str, Endpoint] = Field(
        default_factory=dict[str, Endpoint], description="Servers that verifiers may ask, by name."
    )
    presets: dict[str, Preset] = Field(
        default_factory=dict[str, Preset], description="Strategies by name."
    )

    efforts: dict[str, dict[str, Limits]] = Field(
        default_factory=dict[str, dict[str, Limits]],
        description="By served model, the budget of `compute_optimal` for each reasoning_effort.",
    )

    @field_validator("upstreams", mode="before")
    @classmethod
    def _listed(cls, urls: object) -> object:
        return [one.strip() for one in urls.split(",")] if isinstance(urls, str) else urls

    @field_validator("upstreams")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            check_url(url)
        return urls

    @field_validator("keys")
    @classmethod
    def _readable(cls, file: Path | None) -> Path | None:
        if file is not None:
            read_keys(file)
        return file

    @field_validator("presets")
    @classmethod
    def _named(cls, presets: dict[str, Preset]) -> dict[str, Preset]:
        for name in presets:
            if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) is None:
                raise ValueError(f"a preset cannot be called '{name}'")
            if name in STRATEGIES:
                raise ValueError(f"'{name}' is a strategy, and cannot be a preset as well")
        return presets

    @property
    def allowed(self) -> Allowed:
        """What verifiers may do."""
        return Allowed(endpoints=self.endpoints, code=self.run_code)

    @property
    def bounds(self) -> Bounds:
        """What a request may hold."""
        return Bounds(turns=self.max_turns, schema_chars=self.max_schema_chars)

    @property
    def terms(self) -> Terms:
        """How a gateway treats its upstreams."""
        return Terms(
            key=self.upstream_key,
            keyed=self.keys is not None,
            connect_seconds=self.upstream_connect_seconds,
            silent_seconds=self.upstream_silent_seconds,
            connections=self.upstream_connections,
            failures=self.upstream_failures,
            rest_seconds=self.upstream_rest_seconds,
            retries=self.upstream_retries,
            traced=bool(exporters()),
        )

    @model_validator(mode="after")
    def _judged(self) -> Self:
        for name, preset in self.presets.items():
            if (choice := preset.strategy.judged_by()) is not None:
                try:
                    resolve(choice, self.allowed)
                except InvalidRequest as error:
                    raise ValueError(f"preset '{name}': {error}") from None
        return self

    @classmethod
    def read(cls) -> "Settings":
        """From the file and the environment.

        Raises:
            ValueError: The file cannot be read, or a value is unknown or out of bounds; the message
                names it.
        """
        path = os.environ.get("MULL_CONFIG")
        found = _file(Path(path)) if path else {}
        scalars = cls.model_fields.keys() - FILE_ONLY
        names = {name: os.environ.get(f"MULL_{name.upper()}") for name in scalars}
        given = {name: value for name, value in names.items() if value}  # empty is unset
        try:
            return cls.model_validate(found | given)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            place = f"MULL_{key.upper()}" if key in given else f"MULL_CONFIG: {key}"
            raise ValueError(f"{place}: {first['msg']}") from None


def _file(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"MULL_CONFIG: {path} cannot be read: {reason}") from None
    if (fields := as_object({} if found is None else found)) is None:
        raise ValueError(f"MULL_CONFIG: {path} is not a mapping of settings")
    return fields


def prepare_vllm(*, cpu: bool, single_worker: bool) -> None:
    """Set what vLLM reads from the environment; an operator's own values stay.

    One worker on a CPU runs inside the engine's process, and with one thread less than there are
    cores: more spinning threads would fight the API process.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault(
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1"
    )  # the launcher replaces a dead engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # they would pass the allow-list
    # Longer than clients and proxies keep an idle connection: else one is sometimes closed under a
    # request that is on its way, as with vLLM's 5 s, which are httpx's, too.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    if cpu and single_worker:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
    allowed = os.environ.get("VLLM_PLUGINS")
    if (
        allowed is None
    ):  # vLLM loads its general plugins unless told otherwise, endpoint plugins only if told
        allowed = ",".join(point.name for point in entry_points(group="vllm.general_plugins"))
    if "mull" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},mull" if allowed else "mull"
    else:
        os.environ["VLLM_PLUGINS"] = allowed


def exporters() -> tuple[str, ...]:
    """The exporters of spans that OTEL_* ask for, by the names of their entry points.

    Raises:
        ValueError: There is no such protocol.
    """
    named = os.environ.get("OTEL_TRACES_EXPORTER")
    if named is None and any(os.environ.get(f"OTEL_EXPORTER_OTLP_{one}ENDPOINT") for one in _OTLP):
        named = "otlp"
    if not named or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ()
    said = (os.environ.get(f"OTEL_EXPORTER_OTLP_{one}PROTOCOL") for one in _OTLP)
    protocol = next(filter(None, said), "grpc")  # vLLM's and OpenTelemetry's own for Python
    known = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
    if protocol not in known:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL: '{protocol}' is none of {', '.join(known)}")
    asked = [one.strip() for one in named.split(",")]
    return tuple(known[protocol] if one == "otlp" else one for one in asked if one != "none")


def fork_workers() -> None:
    """Fork the engine's process instead of importing everything again.

    The CPU platform resets this to spawn.
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
