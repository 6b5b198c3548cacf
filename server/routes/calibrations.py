"""`/v1/calibrations`: what is known of the served models, and of which weights."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

router = APIRouter(tags=["mull"])


@router.get("/v1/calibrations")
async def calibrations(request: Request) -> dict[str, Any]:
    """Every calibration with its bins, cells and figures; and the digest of the served weights."""
    state = request.app.state
    weights = await asyncio.to_thread(lambda: state.base.weights)  # reads them, once
    return {"object": "list", "data": list(state.shelf.cards()), "weights": weights}
