"""`/v1/models` with the presets: who can only pick a model can pick a strategy."""

from typing import Any

from fastapi import APIRouter, Request

router = APIRouter(tags=["mull"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """VLLM's models, and after them each with each preset."""
    state = request.app.state
    served = (await state.openai_serving_models.show_available_models()).model_dump()
    served["data"] += [
        card
        | {"id": f"{card['id']}:{name}", "parent": card["id"]}
        | ({"description": preset.description} if preset.description else {})
        for card in served["data"]
        for name, preset in state.settings.presets.items()
    ]
    return served
