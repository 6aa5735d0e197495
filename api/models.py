"""What there is and how it is: the models, their capabilities, memory and the queue."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from api import backend, document, tasks
from core import guides, preprocessing
from core.adapters import MAX_WEIGHT
from core.catalogue import Catalogue
from core.families import Capabilities, Range, UpscalerCapabilities
from core.placement import runner_of
from core.problems import Problem, invalid_field, nearest
from core.requests import ImageFormat
from core.settings import Settings
from core.status import RunnerDown, RunnerStatus
from core.styles import Style

router = APIRouter(tags=["models"])


State = Literal["cold", "failed", "downloading", "loading", "warm"]


class AvailableModel(BaseModel):
    model_id: str
    family: str
    default_size: int
    licence: str
    commercial_use: bool


class AvailableModels(BaseModel):
    """The models, and the one of a request that names none."""

    default: str
    models: list[AvailableModel]


class OfferedModel(Capabilities):
    """A model, what fits it, and the best state that any worker has it in."""

    loras: list[str]
    embeddings: list[str]
    controlnets: list[str]
    ip_adapters: list[str]
    state: State


class OfferedUpscaler(UpscalerCapabilities):
    state: State


class Offer(BaseModel):
    """What a runner's models can do; `device` is null where the runner is not here, or down."""

    default: str
    allow_unlisted: bool
    device: str | None
    models: list[OfferedModel]
    upscalers: list[OfferedUpscaler]


class UnidiffuserOffer(Offer):
    """`images`: pictures sent in one request."""

    images: int


class LoraLimits(BaseModel):
    max: int
    weight: Range


class WholeOffer(Offer):
    """Stable Diffusion's offer, what holds for all, and UniDiffuser's."""

    formats: list[ImageFormat]
    safety: Literal["off", "on", "blur"]
    preprocessors: list[str]
    loras: LoraLimits
    unidiffuser: UnidiffuserOffer


class Unloaded(BaseModel):
    """How many models were unloaded."""

    unloaded: int


@router.get("/get_available_stable_diffs")
async def get_available_stable_diffs(request: Request) -> AvailableModels:
    """The models that `model_id` may name, and the default."""
    catalogue: Catalogue = request.app.state.catalogue
    settings: Settings = request.app.state.settings
    models = [
        AvailableModel(model_id=entry.id, family=entry.model.family, default_size=entry.size, licence=entry.model.licence, commercial_use=entry.model.commercial_use)
        for entry in catalogue.generators.values()
    ]
    return AvailableModels(default=settings.models.default, models=models)


@router.get("/capabilities")
async def capabilities(request: Request) -> WholeOffer:
    """Per model: modes, limits, schedulers, precisions, licence, and whether it is in memory."""
    catalogue: Catalogue = request.app.state.catalogue
    settings: Settings = request.app.state.settings
    found = await backend.statuses()
    return WholeOffer(
        **_offer(catalogue, _of("StableDiffusion", found)),
        formats=list(get_args(ImageFormat)),
        safety=settings.safety.mode,
        preprocessors=preprocessing.NAMES,
        loras=LoraLimits(max=settings.limits.loras, weight=Range(default=1, min=-MAX_WEIGHT, max=MAX_WEIGHT)),
        unidiffuser=UnidiffuserOffer(**_offer(tasks.catalogue("UniDiffuser"), _of("UniDiffuser", found)), images=settings.limits.images),
    )


def _of(runner: str, found: dict[str, RunnerStatus | Problem]) -> list[RunnerStatus]:
    """The statuses of a runner's workers that answer."""
    return [status for name, status in found.items() if runner_of(name) == runner and isinstance(status, RunnerStatus)]


def _offer(catalogue: Catalogue, here: list[RunnerStatus]) -> dict[str, Any]:
    """The fields of an Offer, by the workers that are here."""
    states: dict[str, State] = {}
    for model in (model for status in here for model in status.models):
        states[model.model_id] = max(states.get(model.model_id, "cold"), model.state, key=get_args(State).index)
    return {
        "default": catalogue.models.default,
        "allow_unlisted": catalogue.models.allow_unlisted,
        "device": ", ".join(dict.fromkeys(status.device for status in here)) or None,
        "models": [
            OfferedModel(
                **dict(entry.capabilities(catalogue.settings.limits)), **guides.fitting(catalogue.models, entry.model.family),
                loras=catalogue.fitting("lora", entry), embeddings=catalogue.fitting("embedding", entry), state=states.get(entry.id, "cold"),
            )
            for entry in catalogue.generators.values()
        ],
        "upscalers": [
            OfferedUpscaler(**dict(entry.upscaler_capabilities(catalogue.settings.limits)), state=states.get(entry.id, "cold")) for entry in catalogue.upscalers.values()
        ],
    }


class StyleList(BaseModel):
    """The prompt styles, in their file's order; `warning` says what is wrong with the file."""

    styles: list[Style]
    warning: str | None


class WildcardList(BaseModel):
    """The wildcards of dynamic prompts: how many options each has; `warnings` tell of files left out."""

    wildcards: dict[str, int]
    warnings: list[str]


@router.get("/styles")
async def styles(request: Request) -> StyleList:
    """The styles that `styles` may name."""
    own = request.app.state.catalogue.writer.styles
    return StyleList(styles=list(own.entries().values()), warning=own.warning)


@router.get("/wildcards")
async def wildcards(request: Request) -> WildcardList:
    """What `__name__` may name in dynamic prompts."""
    own = request.app.state.catalogue.writer.wildcards
    entries = await asyncio.to_thread(own.entries)
    return WildcardList(wildcards={name: len(options) for name, options in entries.items()}, warnings=own.warnings)


class BufferStatus(RunnerStatus):
    """The first runner's status as the seed's users know it, and every runner's in `runners`."""

    runners: list[RunnerStatus | RunnerDown]


@router.get("/buffer_status", responses=document.refuses(503))
async def buffer_status() -> BufferStatus:
    """Each model's state, bytes and seconds until it is unloaded, and the queue."""
    found = await backend.statuses()
    runners = [status if isinstance(status, RunnerStatus) else RunnerDown(service=name, problem=status.details) for name, status in found.items()]
    for status in found.values():
        if isinstance(status, RunnerStatus):
            return BufferStatus(**dict(status), runners=runners)
    raise next(status for status in found.values() if isinstance(status, Problem))


@router.post("/admin/unload")
async def unload(request: Request, model_id: Annotated[str, Query(max_length=300, description="Which; all if left out.")] = "") -> Unloaded:
    """Unload a model, or all, once the work in hand is done (admin key)."""
    catalogues = {"StableDiffusion": request.app.state.catalogue, "UniDiffuser": tasks.catalogue("UniDiffuser")}
    for name in request.query_params:
        if name != "model_id":  # passing over a misspelt one would unload every model
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, ['model_id'])}", ["model_id"])
    if model_id and not any(model_id in catalogue.entries for catalogue in catalogues.values()):
        catalogues["StableDiffusion"].find(model_id)
    unloaded = [await backend.unload(name, model_id) for name, status in (await backend.statuses()).items() if isinstance(status, RunnerStatus)]
    return Unloaded(unloaded=sum(unloaded))
