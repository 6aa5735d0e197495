"""Making a given picture larger: what may be asked, and the plan that a runner carries out.

An upscaler is a model of the catalogue: a network (ESRGAN and its kin), or a diffusion model that
takes a prompt. api.upscaling reads these requests; runners.upscaling does the work.
"""

from __future__ import annotations

import math
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from core.catalogue import Catalogue, random_seed
from core.families import Entry
from core.plans import Pixels, Plan, Upscale
from core.problems import FieldError, invalid, invalid_field, nearest
from core.requests import MAX_SEED, Format, Precision, Text
from core.tiling import count

NOISE_LEVEL = 20  # diffusers' default
MAX_NOISE_LEVEL = 350  # what the SD x4 upscaler was trained with


class UpscaleRequest(BaseModel):
    """A request to make a picture larger, by `scale` or to `width` and `height`; by the upscaler's own factor if none is
    said. The second part is for diffusion upscalers."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    model_id: str | None = Field(None, max_length=300, description="An upscaler of the catalogue; the first if left out. See GET /capabilities.")
    scale: float | None = Field(None, ge=1, le=16, allow_inf_nan=False, description="Up to the upscaler's own factor.")
    width: int | None = Field(None, ge=8, le=16384, description="Pixels of the result, instead of scale; alone, height follows the picture's shape.")
    height: int | None = Field(None, ge=8, le=16384, description="As width.")
    torch_dtype: Precision | None = Field(None, description="Precision; float16 on a GPU if left out.")
    commercial: bool = Field(False, description="true: refuse unless the upscaler allows commercial use.")
    deadline_s: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False, description="Give up after so many seconds.")
    format: Format = Field("png", description="The picture's file format.")
    quality: int = Field(90, ge=1, le=100, description="For jpeg and webp.")

    prompt: Text = Field("", description="What the picture shows.")
    negative_prompt: Text = Field("", description="What to stay away from.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps of each tile.")
    guidance_scale: float | None = Field(None, ge=0, le=30, allow_inf_nan=False, description="Classifier-free guidance.")
    noise_level: int | None = Field(None, ge=0, le=MAX_NOISE_LEVEL, description=f"SD x4: noise on the picture before it is enlarged. Default {NOISE_LEVEL}.")
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="-1 or left out: random, and told in the answer.")

    @field_validator("*", mode="before")
    @classmethod
    def numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "commercial":
            raise ValueError("must not be true or false")
        return value


_OF_DIFFUSION = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "noise_level", "seed")


def find(catalogue: Catalogue, model_id: str | None) -> Entry:
    """The upscaler of this id, or the first.

    Raises:
        Problem: 422 with the list of upscalers.
    """
    known = catalogue.upscalers
    if not known:
        raise invalid_field("model_id", "there is no upscaler here", "an entry of the family upscaler, sd_x4_upscaler or latent_upscaler in configuration.yaml", model_id)
    if model_id and model_id not in known:
        what = "is no upscaler" if model_id in catalogue.entries else "is not there"
        raise invalid_field("model_id", f"{model_id!r} {what}{nearest(model_id, known)}", list(known), model_id)
    return known[model_id] if model_id else next(iter(known.values()))


def plan(catalogue: Catalogue, request: UpscaleRequest, image: Pixels, client: str) -> Plan:
    """Check a request against its upscaler and the limits, and fill in every default.

    Raises:
        Problem: 422 that lists every field that cannot be honoured.
    """
    entry, limits = find(catalogue, request.model_id), catalogue.settings.limits
    family, scale = entry.model.family, entry.scale
    errors: list[FieldError] = []
    notes: list[str] = []

    def refuse(field: str, message: str, allowed: str | list[str] | None, given: object) -> None:
        errors.append(FieldError(field=field, message=message, allowed=allowed, given=None if given is None else str(given)[:80]))

    if family == "upscaler":
        for name in _OF_DIFFUSION:
            if (given := getattr(request, name)) not in (None, ""):
                refuse(name, f"has no meaning to {entry.id}, which is a network without steps", "leave it out, or ask a diffusion upscaler", given)
    elif request.noise_level is not None and family != "sd_x4_upscaler":
        refuse("noise_level", f"has no meaning to {entry.id} ({family})", "leave it out", request.noise_level)
    for name in ("prompt", "negative_prompt"):
        if (length := len(getattr(request, name))) > limits.prompt_characters:
            refuse(name, "is too long", f"at most {limits.prompt_characters} characters", f"{length} characters")
    if catalogue.writer.blocklist.stops(request.prompt):
        refuse("prompt", "has words that are not allowed here", "a prompt without them", None)
    steps = request.num_inference_steps or entry.steps
    if steps > limits.num_inference_steps:
        refuse("num_inference_steps", "is too large", f"1 to {limits.num_inference_steps}", steps)
    guidance = entry.guidance if request.guidance_scale is None else request.guidance_scale
    if request.negative_prompt and guidance <= 1:
        notes.append("negative_prompt has no effect at a guidance_scale of 1 or less")
    if request.prompt and family == "latent_upscaler" and guidance == 0:
        notes.append("prompt has no effect at a guidance_scale of 0")
    if request.commercial and not entry.model.commercial_use:
        refuse("commercial", f"{entry.id} ({entry.model.licence}) does not allow commercial use", "false, or another upscaler", True)
    if image.width * image.height * scale**2 > limits.upscaled_pixels:
        most = int(math.sqrt(limits.upscaled_pixels) / scale)
        refuse("image", f"of {image.width}x{image.height} becomes {image.width * scale}x{image.height * scale} pixels", f"at most {limits.upscaled_pixels} pixels, so {most}x{most} before", None)
    width, height = _size(request, image, scale, entry.id, refuse)
    if errors:
        raise invalid(errors)

    tile = entry.size // entry.traits.multiple * entry.traits.multiple
    noise_level = (NOISE_LEVEL if request.noise_level is None else request.noise_level) if family == "sd_x4_upscaler" else None
    seed = 0 if family == "upscaler" else request.seed if request.seed is not None and request.seed >= 0 else random_seed()
    return Plan(
        id=uuid.uuid4().hex,
        client=client,
        model_id=entry.id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        torch_dtype=request.torch_dtype or entry.model.torch_dtype,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        seeds=[seed],
        scheduler=None,
        strength=None,
        clip_skip=0,
        commercial=request.commercial,
        image=image,
        upscale=Upscale(scale=scale, first=(image.width, image.height), tile=tile, tiles=count(image.width, image.height, tile), noise_level=noise_level),
        deadline_s=min(request.deadline_s or catalogue.queue.deadline_s, catalogue.queue.deadline_s),
        notes=notes,
    )


def _size(request: UpscaleRequest, image: Pixels, scale: int, name: str, refuse: Any) -> tuple[int, int]:
    """Width and height of the result: by the factor, or as asked, in the picture's own shape."""
    own = image.width, image.height
    if request.scale is not None:
        for field in ("width", "height"):
            if (given := getattr(request, field)) is not None:
                refuse(field, "does not go with scale", "one of the two", given)
        if request.scale > scale:
            refuse("scale", f"is more than {name} does", f"1 to {scale}", request.scale)
        return round(own[0] * request.scale), round(own[1] * request.scale)
    if request.width is None and request.height is None:
        return own[0] * scale, own[1] * scale
    wanted = request.width or max(1, round(own[0] * (request.height or 1) / own[1])), request.height or max(1, round(own[1] * (request.width or 1) / own[0]))
    for field, given, before in zip(("width", "height"), wanted, own, strict=True):
        if not before <= given <= before * scale:
            refuse(field, f"does not fit the picture's {own[0]}x{own[1]} and {name}", f"{before} to {before * scale}", given)
    if abs(wanted[0] / own[0] - wanted[1] / own[1]) > max(0.5 / own[0], 0.5 / own[1]) + 1e-9:
        refuse("height", f"{wanted[0]}x{wanted[1]} is not the picture's shape, {own[0]}x{own[1]}", "leave out width or height", wanted[1])
    return wanted
