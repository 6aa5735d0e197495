"""What A1111's clients ask at start: models, samplers, LoRAs, options and the like. Nothing here can be set: options are the server's.

Lists of what Easel does not have are empty, so that clients offer nothing of it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from api import reading
from core import schedulers
from core.catalogue import Catalogue
from core.problems import invalid_field

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])


_OPTIONS = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}}}


class Named(BaseModel):
    name: str


class ModelItem(BaseModel):
    """A model; its `title` is what `override_settings.sd_model_checkpoint` takes. Hashes are known once a model has drawn (`info`)."""

    model_config = ConfigDict(protected_namespaces=())
    title: str
    model_name: str
    filename: str
    hash: str | None = None
    sha256: str | None = None
    config: str | None = None


class SamplerItem(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class SchedulerItem(BaseModel):
    """A noise schedule; not every sampler can do each."""

    name: str
    label: str
    aliases: list[str] = []
    default_rho: float = -1
    need_inner_model: bool = False


class UpscalerItem(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: int


class LoraItem(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class StyleItem(BaseModel):
    name: str
    prompt: str
    negative_prompt: str


@router.get("/sd-models")
async def sd_models(request: Request) -> list[ModelItem]:
    """The models."""
    return [ModelItem(title=id, model_name=id, filename=id) for id in _catalogue(request).generators]


@router.get("/samplers")
async def samplers() -> list[SamplerItem]:
    """The samplers."""
    return [SamplerItem(name=name, aliases=aliases) for name, aliases in schedulers.samplers().items()]


@router.get("/schedulers")
async def list_schedulers() -> list[SchedulerItem]:
    """The noise schedules; "automatic" is the one that A1111 gives each sampler."""
    return [SchedulerItem(name=label.lower().replace(" ", "_"), label=label) for label in ("Automatic", *schedulers.SCHEDULES)]


@router.get("/loras")
async def loras(request: Request) -> list[LoraItem]:
    """The LoRAs, for `<lora:name:weight>` in prompts; see GET /get_available_loras for all that is known of them."""
    entries = _catalogue(request).registry.of_kind("lora")
    return [LoraItem(name=name, alias=name, path=lora.file_name or name, metadata={"ss_base_model_version": lora.base_model, "trigger_words": list(lora.trigger_words)}) for name, lora in entries.items()]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, dict[str, Any]]:
    """The embeddings, by name; their shapes are not known before they are read."""
    return {"loaded": {name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": entry.base_model, "shape": 0, "vectors": 0} for name, entry in _catalogue(request).registry.of_kind("embedding").items()}, "skipped": {}}


@router.get("/upscalers")
async def upscalers(request: Request) -> list[UpscalerItem]:
    """The upscalers, for extra-single-image and, those that are networks, hr_upscaler."""
    return [UpscalerItem(name=id, model_name=id, scale=entry.scale) for id, entry in _catalogue(request).upscalers.items()]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[Named]:
    """What hr_upscaler may be beside the upscalers."""
    return [Named(name="Latent"), Named(name="Lanczos")]


@router.get("/prompt-styles")
async def prompt_styles(request: Request) -> list[StyleItem]:
    """The styles."""
    return [StyleItem(name=style.name, prompt=style.prompt, negative_prompt=style.negative_prompt) for style in _catalogue(request).writer.styles.entries().values()]


@router.get("/sd-vae", name="sd_vae")
@router.get("/sd-modules", name="sd_modules")
@router.get("/hypernetworks", name="hypernetworks")
@router.get("/face-restorers", name="face_restorers")
@router.get("/realesrgan-models", name="realesrgan_models")
@router.get("/script-info", name="script_info")
@router.get("/extensions", name="extensions")
async def none() -> list[Named]:
    """There are none."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """There are none."""
    return {"txt2img": [], "img2img": []}


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """None is told."""
    return {}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The options that mean something here, as they are."""
    return {
        "sd_model_checkpoint": _catalogue(request).models.default, "sd_checkpoint_hash": "", "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "samples_format": "png",
        "jpeg_quality": 90, "eta_noise_seed_delta": 0, "return_grid": False, "enable_pnginfo": request.app.state.settings.metadata.embed,
    }  # fmt: skip


@router.post("/options", openapi_extra=_OPTIONS)
async def set_options(request: Request) -> dict[str, Any]:
    """Refused, but for what is so already: one client's options would change another's pictures. `override_settings` of a request does it."""
    known = await options(request)
    for name, value in (await reading.read_json(request)).items():
        if known.get(name) != value:
            hint = "override_settings of each request"
            if name == "sd_model_checkpoint":
                hint = f"override_settings.sd_model_checkpoint of each request: {', '.join(_catalogue(request).generators)}"
            raise invalid_field(name[:80], "cannot be set for everyone", hint, value)
    return {}


@router.post("/refresh-checkpoints", name="refresh_checkpoints")
@router.post("/refresh-loras", name="refresh_loras")
@router.post("/refresh-vae", name="refresh_vae")
@router.post("/refresh-embeddings", name="refresh_embeddings")
async def refresh() -> dict[str, Any]:
    """Nothing to do: lists are read anew whenever their files change."""
    return {}


def _catalogue(request: Request) -> Catalogue:
    catalogue: Catalogue = request.app.state.catalogue
    return catalogue
