"""What each family of models can do, and a model with its family's defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from core import schedulers
from core.model_settings import UPSCALERS, Dtype, Family, Model
from core.plans import Task
from core.settings import Limits


@dataclass(frozen=True)
class FamilyTraits:
    """What holds for all models of a family, unless the catalogue's entry says otherwise."""

    size: int
    min_size: int
    max_size: int
    multiple: int
    num_inference_steps: int
    guidance_scale: float
    gpu_dtype: Dtype
    prompt_tokens: int | None = None  # what is beyond is cut; None: no limit
    negative_prompt: bool = True
    prompt_weights: bool = True
    clip_skip: bool = True
    flow: bool = False
    upscaler: bool = False  # makes a given picture larger; its size is that of its tiles
    multimodal: bool = False  # UniDiffuser: one size, schedulers that do not scale, and core.multimodal's tasks


# Sizes and steps: the models' own cards; dtypes: the seed's table. Max sizes are the sides beyond
# which a family repeats itself rather than composes.
FAMILIES: dict[Family, FamilyTraits] = {
    "starter": FamilyTraits(64, 32, 256, 16, 25, 5.0, "float16"),
    "sd15": FamilyTraits(512, 128, 1024, 8, 30, 7.5, "float16"),
    "sd2": FamilyTraits(768, 128, 1536, 8, 30, 7.5, "float16"),
    "sdxl": FamilyTraits(1024, 256, 2048, 8, 30, 5.0, "float16"),
    "flux": FamilyTraits(1024, 256, 2048, 16, 28, 3.5, "bfloat16", 512, negative_prompt=False, prompt_weights=False, clip_skip=False, flow=True),
    "unidiffuser": FamilyTraits(512, 8, 512, 8, 20, 8.0, "float16", 77, negative_prompt=False, prompt_weights=False, clip_skip=False, multimodal=True),
    # Networks (ESRGAN and its kin) have no steps. The diffusion upscalers' tiles, steps and guidance: diffusers' defaults and the cards.
    "upscaler": FamilyTraits(256, 8, 4096, 1, 0, 0.0, "float16", negative_prompt=False, prompt_weights=False, clip_skip=False, upscaler=True),
    "sd_x4_upscaler": FamilyTraits(256, 8, 4096, 8, 75, 9.0, "float16", clip_skip=False, upscaler=True),
    "latent_upscaler": FamilyTraits(512, 64, 4096, 64, 20, 0.0, "float16", prompt_weights=False, clip_skip=False, upscaler=True),
}


class Range(BaseModel):
    default: int | float
    min: int | float
    max: int | float


class Sides(Range):
    multiple_of: int


class Strength(BaseModel):
    """Between `above`, which is not allowed, and `max`, which is."""

    default: float
    above: float
    max: float


class Most(BaseModel):
    max: int


class Img2Img(BaseModel):
    schedulers: list[str]
    strength: Strength


class Offered(BaseModel):
    """What GET /capabilities tells of every model."""

    model_id: str
    family: Family
    modes: list[str]
    torch_dtypes: list[Dtype]
    licence: str
    commercial_use: bool
    credit: str | None


class Capabilities(Offered):
    """What may be asked of a model that draws. `prompt_tokens`: what is beyond is cut; null: no limit. `img2img` is null where it has none."""

    size: Sides
    num_inference_steps: Range
    guidance_scale: Range
    count_returned: Range
    schedulers: list[str]
    img2img: Img2Img | None
    negative_prompt: bool
    prompt_weights: bool
    clip_skip: bool
    prompt_tokens: int | None


class UpscalerCapabilities(Offered):
    """What may be asked of an upscaler; null: it takes no such thing. `tile` is the side of its tiles, pixels."""

    scale: Range
    pixels: Most
    tile: int
    num_inference_steps: Range | None
    guidance_scale: Range | None
    noise_level: Range | None


@dataclass(frozen=True)
class Entry:
    """A model with its family's defaults filled in. Only a listed one may be a path on this machine."""

    model: Model
    traits: FamilyTraits
    listed: bool = True

    @property
    def id(self) -> str:
        return self.model.id

    @property
    def size(self) -> int:
        return self.model.size or self.traits.size

    @property
    def min_size(self) -> int:
        return self.size if self.traits.multimodal else self.traits.min_size

    @property
    def max_size(self) -> int:
        return self.size if self.traits.multimodal else self.model.max_size or self.traits.max_size

    @property
    def steps(self) -> int:
        return self.model.num_inference_steps or self.traits.num_inference_steps

    @property
    def scale(self) -> int:
        """An upscaler's factor; 1 for other models."""
        return self.model.scale or UPSCALERS.get(self.model.family, 1)

    @property
    def guidance(self) -> float:
        return self.traits.guidance_scale if self.model.guidance_scale is None else self.model.guidance_scale

    def capabilities(self, limits: Limits) -> Capabilities:
        """What may be asked of this model."""
        t = self.traits
        strength = Strength(default=0.75, above=0, max=1)
        return Capabilities(
            **self._common(),
            modes=list(get_args(Task)) if t.multimodal else ["inpaint"] if self.model.inpainting else ["txt2img", "img2img", "inpaint"],
            size=Sides(default=self.size, min=self.min_size, max=self.max_size, multiple_of=t.multiple),
            num_inference_steps=Range(default=self.steps, min=1, max=limits.num_inference_steps),
            guidance_scale=Range(default=self.guidance, min=0, max=30),
            count_returned=Range(default=1, min=1, max=limits.count_returned),
            schedulers=schedulers.names(t.flow, unscaled=t.multimodal),
            img2img=None if t.multimodal else Img2Img(schedulers=schedulers.names(t.flow, image_to_image=True), strength=strength),
            negative_prompt=t.negative_prompt,
            prompt_weights=t.prompt_weights,
            clip_skip=t.clip_skip,
            prompt_tokens=self.model.prompt_tokens or t.prompt_tokens,
        )

    def upscaler_capabilities(self, limits: Limits) -> UpscalerCapabilities:
        """What may be asked of this upscaler."""
        steps = self.model.family != "upscaler"
        return UpscalerCapabilities(
            **self._common(),
            modes=["upscale"],
            scale=Range(default=self.scale, min=1, max=self.scale),
            pixels=Most(max=limits.upscaled_pixels),
            tile=self.size,
            num_inference_steps=Range(default=self.steps, min=1, max=limits.num_inference_steps) if steps else None,
            guidance_scale=Range(default=self.guidance, min=0, max=30) if steps else None,
            noise_level=Range(default=20, min=0, max=350) if self.model.family == "sd_x4_upscaler" else None,
        )

    def _common(self) -> dict[str, Any]:
        own = self.model
        return {"model_id": self.id, "family": own.family, "torch_dtypes": list(get_args(Dtype)), "licence": own.licence, "commercial_use": own.commercial_use, "credit": own.credit}
