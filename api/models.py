"""What there is and how it is: the models, their capabilities, memory and the queue."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from api import backend
from core.adapters import MAX_WEIGHT
from core.catalogue import Catalogue
from core.generation import RunnerStatus
from core.problems import invalid_field, nearest
from core.settings import Settings

router = APIRouter(tags=["models"])


@router.get("/get_available_stable_diffs")
async def get_available_stable_diffs(request: Request) -> dict[str, Any]:
    """The models that `model_id` may name, and the default."""
    catalogue: Catalogue = request.app.state.catalogue
    settings: Settings = request.app.state.settings
    models = [
        {
            "model_id": entry.id,
            "family": entry.model.family,
            "default_size": entry.size,
            "licence": entry.model.licence,
            "commercial_use": entry.model.commercial_use,
        }
        for entry in catalogue.entries.values()
    ]
    return {"default": settings.models.default, "models": models}


@router.get("/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """Per model: modes, limits, schedulers, precisions, licence, and whether it is in memory."""
    catalogue: Catalogue = request.app.state.catalogue
    settings: Settings = request.app.state.settings
    status = await backend.status()
    states = {model.model_id: model.state for model in status.models}
    models = [
        entry.capabilities(settings.limits) | {"loras": catalogue.loras_for(entry), "state": states.get(entry.id, "cold")}
        for entry in catalogue.entries.values()
    ]
    return {
        "default": settings.models.default,
        "allow_unlisted": settings.models.allow_unlisted,
        "device": status.device,
        "formats": ["png", "jpeg", "webp"],
        "loras": {"max": settings.limits.loras, "weight": {"default": 1, "min": -MAX_WEIGHT, "max": MAX_WEIGHT}},
        "models": models,
    }


@router.get("/buffer_status")
async def buffer_status() -> RunnerStatus:
    """Each model's state, bytes and seconds until it is unloaded, and the queue."""
    return await backend.status()


@router.post("/admin/unload")
async def unload(request: Request, model_id: Annotated[str, Query(max_length=300)] = "") -> dict[str, int]:
    """Unload a model, or all, once the work in hand is done (admin key)."""
    catalogue: Catalogue = request.app.state.catalogue
    for name in request.query_params:
        if name != "model_id":  # passing over a misspelt one would unload every model
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, ['model_id'])}", ["model_id"])
    if model_id:
        catalogue.find(model_id)
    return {"unloaded": await backend.unload(model_id)}
