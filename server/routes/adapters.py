"""`/v1/adapters`: versions and aliases, for who holds an admin's key; vLLM's two routes, too."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.responses import JSONResponse, Response

from server.adapters.registry import Alias, check_name
from server.errors import refusal
from server.keys.keyring import Keyring
from server.wire import body_of
from strategies.core.errors import Forbidden, InvalidRequest

T = TypeVar("T", bound=BaseModel)


def admin(request: Request) -> None:
    """Let pass who holds a key of an admin, also where nothing else needs a key.

    Raises:
        Forbidden: The operator has set none, or it is a client's.
        Unauthorized: It is another, or missing.
    """
    keys: Keyring = request.app.state.keys
    if not keys.administered:
        raise Forbidden("adapters are for the operator: set MULL_ADMIN_KEY, and send it")
    keys.admit(request.headers, "admin")


router = APIRouter(tags=["adapters"], dependencies=[Depends(admin)])


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Publish(_Body):
    """An adapter's folder, to be taken in."""

    name: str = Field(description="Of the version, before its digest.")
    path: str = Field(max_length=4096, description="Of the folder, where MULL_ADAPTER_IMPORTS is.")
    alias: str | None = Field(default=None, description="A name that is to mean it at once.")


class Point(_Body):
    """What an alias is to mean."""

    version: str | None = None
    versions: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        default=None, max_length=16, description="By version, its share of requests; 1 together."
    )
    pinned: bool | None = Field(
        default=None,
        description="Whether what it means stays in the engine; as it was, if not said.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "Point":
        if (self.version is None) == (self.versions is None):
            raise ValueError("name one 'version', or 'versions' with their shares")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Of each version."""
        return {self.version: 1.0} if self.version is not None else self.versions or {}


class Load(_Body):
    """As vLLM's `/v1/load_lora_adapter`; loading in place is not needed: versions do not change."""

    lora_name: str
    lora_path: str = Field(max_length=4096)
    load_inplace: Literal[False] = False


class Unload(_Body):
    """As vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str


@router.get("/v1/adapters")
async def adapters(request: Request) -> dict[str, Any]:
    """Every version with its evaluation, and every alias with what it means."""
    cards, aliases = await _adapters(request).cards()
    return {
        "object": "list",
        "data": cards,
        "aliases": {name: _told(name, alias) for name, alias in aliases.items()},
    }


@router.post("/v1/adapters")
async def publish(request: Request) -> Response:
    """Take in a folder: it is looked at, loaded, tried, and kept as `name@digest`."""
    asked = await _body(request, Publish)
    if asked.alias is not None:
        check_name(asked.alias, "alias")  # before anything is done
    version = await _adapters(request).publish(asked.name, asked.path)
    said: dict[str, Any] = {"id": version.id, "object": "adapter"}
    if asked.alias is not None:
        alias = await _adapters(request).point(asked.alias, {version.id: 1.0})
        said["alias"] = _told(asked.alias, alias)
    return JSONResponse(said, status_code=201)


@router.put("/v1/adapters/{alias}")
async def point(alias: str, request: Request) -> dict[str, Any]:
    """Let an alias mean a version, or several by shares: new requests are served by these."""
    asked = await _body(request, Point)
    moved = await _adapters(request).point(alias, asked.shares, pinned=asked.pinned)
    return _told(alias, moved)


@router.post("/v1/adapters/{alias}/rollback")
async def roll_back(alias: str, request: Request) -> dict[str, Any]:
    """Let an alias mean what it meant before."""
    return _told(alias, await _adapters(request).roll_back(alias))


@router.delete("/v1/adapters/{name}")
async def remove(name: str, request: Request) -> dict[str, Any]:
    """Forget an alias, or delete a version that no alias means and no request uses."""
    adapters = _adapters(request)
    await (adapters.remove(name) if "@" in name else adapters.drop(name))
    return {"id": name, "object": "adapter", "deleted": True}


@router.post("/v1/load_lora_adapter")
async def load(request: Request) -> Response:
    """VLLM's route by the same way: a version is taken in, and the name becomes its alias."""
    asked = await _body(request, Load)
    version = await _adapters(request).publish(asked.lora_name, asked.lora_path)
    await _adapters(request).point(asked.lora_name, {version.id: 1.0})
    return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload(request: Request) -> Response:
    """VLLM's route by the same way: the alias is forgotten, and its version goes once drained."""
    asked = await _body(request, Unload)
    if "@" in asked.lora_name:
        raise InvalidRequest(
            f"'{asked.lora_name}' is a version, which leaves the engine by itself; to delete it, "
            "DELETE /v1/adapters/{id}",
            field="lora_name",
        )
    await _adapters(request).drop(asked.lora_name)
    return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _adapters(request: Request) -> Any:
    return request.app.state.adapters


async def _body(request: Request, kind: type[T]) -> T:
    raw = await body_of(request.receive, request.app.state.settings.max_body_bytes)
    try:
        return kind.model_validate_json(raw or b"")
    except ValidationError as error:
        raise refusal(error, inside="") from error


def _told(name: str, alias: Alias) -> dict[str, Any]:
    return {
        "id": name,
        "object": "adapter.alias",
        "versions": alias.shares,
        "pinned": alias.pinned,
        "previous": alias.history[-2] if len(alias.history) > 1 else None,
    }
