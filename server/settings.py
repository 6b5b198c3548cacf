"""The only reader of the environment, and the only writer of what vLLM reads from it."""

import os
from importlib.metadata import entry_points

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What an operator may set in the environment, each as MULL_<NAME>."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: int = Field(
        default=16 << 20, ge=1024, description="Largest request body that is read."
    )
    engine_restarts: int = Field(
        default=3, ge=0, description="New engines in place before the server gives up."
    )

    @classmethod
    def read(cls) -> "Settings":
        """From the environment.

        Raises:
            pydantic.ValidationError: A value is out of bounds; the message names it.
        """
        names = {name: os.environ.get(f"MULL_{name.upper()}") for name in cls.model_fields}
        return cls.model_validate(
            {name: value for name, value in names.items() if value is not None}
        )


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


def fork_workers() -> None:
    """Fork the engine's process instead of importing everything again.

    The CPU platform resets this to spawn.
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
