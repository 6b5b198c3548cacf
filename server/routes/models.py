"""`/v1/models` with adapters and presets: who can only pick a model can pick a strategy."""

from typing import Any

from fastapi import APIRouter, Request

router = APIRouter(tags=["mull"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """VLLM's models and the registry's adapters, and after them each with each preset."""
    state = request.app.state
    served = await state.shown(request.headers)
    if state.adapters is not None:
        await state.adapters.look()
        base, shown = served["data"][0], {card["id"] for card in served["data"]}
        for card in served["data"]:
            if card["id"] in state.adapters.names:  # not where it lies on this machine
                card["root"] = card["id"]
        served["data"] += [
            base | {"id": name, "root": name, "parent": base["id"]}
            for name in sorted(state.adapters.names - shown)
        ]
    served["data"] += [
        card
        | {"id": f"{card['id']}:{name}", "parent": card["id"]}
        | ({"description": preset.description} if preset.description else {})
        for card in served["data"]
        for name, preset in state.settings.presets.items()
    ]
    return served
