"""A1111's API requests, translated into Easel's own: what each field means here, and which cannot be honoured.

A field that would change the picture and has no counterpart is refused unless it has the value at which it does nothing, since A1111's
clients send whole lists of defaults. api.a1111 serves it.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core import schedulers
from core.catalogue import Catalogue
from core.families import Entry
from core.plans import Pixels
from core.problems import (
    FieldError,
    Problem,
    from_validation,
    invalid,
    invalid_field,
    nearest,
    renamed,
    shown,
)
from core.requests import GenerationRequest, Text
from core.upscaling import UpscaleRequest

# A request's fields by A1111's names, where they differ.
NAMES = {
    "num_inference_steps": "steps", "guidance_scale": "cfg_scale", "count_returned": "batch_size", "scheduler": "sampler_name", "strength": "denoising_strength",
    "hr_strength": "denoising_strength", "hr_steps": "hr_second_pass_steps", "model_id": "override_settings.sd_model_checkpoint", "image": "init_images",
    "clip_skip": "override_settings.CLIP_stop_at_last_layers", "format": "override_settings.samples_format", "quality": "override_settings.jpeg_quality",
}  # fmt: skip
# Fields that have no counterpart, and the values at which they do nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "restore_faces": (False,), "tiling": (False,), "subseed_strength": (0,), "seed_resize_from_h": (-1, 0), "seed_resize_from_w": (-1, 0), "eta": (0, 1), "s_churn": (0,), "s_tmin": (0,),
    "s_noise": (1,), "s_min_uncond": (0,), "script_name": ("", "None"), "script_args": ([],), "hr_checkpoint_name": ("", "Use same checkpoint"), "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"), "hr_prompt": ("",), "hr_negative_prompt": ("",), "firstphase_width": (0,), "firstphase_height": (0,), "refiner_checkpoint": ("", "None"),
    "initial_noise_multiplier": (1,), "latent_mask": ("",), "infotext": ("",), "disable_extra_networks": (False,), "inpainting_mask_weight": (1,),
}  # fmt: skip
# Those that say nothing of the picture: of files that A1111 keeps, or of what a neutral field would have done.
_HARMLESS = {
    "save_images", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "force_task_id", "subseed", "refiner_switch_at", "s_tmax", "image_cfg_scale",
    "comments", "mask_round", "sampler_index", "include_init_images",
}  # fmt: skip
_SILENT_SETTINGS = {"samples_save", "grid_save", "return_grid", "save_images_before_highres_fix", "enable_pnginfo", "sd_checkpoint_cache", "live_previews_enable"}
_AUTOMATIC = ("", "automatic", "use same scheduler")


class Drawing(BaseModel):
    """What txt2img and img2img have in common."""

    model_config = ConfigDict(extra="allow", str_strip_whitespace=True)

    prompt: Text = ""
    negative_prompt: Text = ""
    styles: list[str] = []
    seed: int = -1
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = Field(None, max_length=80, description="The model's own if left out.")
    scheduler: str = Field("automatic", max_length=40)
    denoising_strength: float | None = Field(None, description="Of img2img 0.75 if left out, of the hires-fix 0.7.")
    override_settings: dict[str, Any] = Field(default_factory=dict, description="sd_model_checkpoint, CLIP_stop_at_last_layers, samples_format, jpeg_quality.")
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict, description="None is here: names with arguments are refused.")
    send_images: bool = True

    @model_validator(mode="before")
    @classmethod
    def null_is_left_out(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


class TextToImage(Drawing):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool = False
    hr_scale: float = 2
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: int = Field(0, description="0: as many as the first pass.")
    hr_resize_x: int = 0
    hr_resize_y: int = 0


class ImageToImage(Drawing):
    """POST /sdapi/v1/img2img. Pictures are base64, with or without `data:image/...;base64,`."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="One picture.")
    mask: str | None = Field(None, description="White is repainted.")
    mask_blur: int | None = None
    mask_blur_x: int = 4
    mask_blur_y: int = 4
    inpainting_fill: int = Field(0, ge=0, le=3)
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    resize_mode: Literal[0, 1, 2, 3] = Field(0, description="Others than 0 where the picture has the shape of width and height.")


def translated(asked: TextToImage | ImageToImage, catalogue: Catalogue, image: Pixels | None = None) -> GenerationRequest:
    """What a request asks for.

    Args:
        image: the decoded picture of `init_images`.

    Raises:
        Problem: 422 that names each field that cannot be honoured, by A1111's name.
    """
    errors = [*_unknown(asked), *_scripts(asked)]
    override, entry = _overridden(asked, catalogue, errors)
    values: dict[str, Any] = {
        "prompt": asked.prompt, "negative_prompt": asked.negative_prompt, "styles": ",".join('"' + name.replace('"', '""') + '"' for name in asked.styles if name) or None, "seed": max(asked.seed, -1),
        "count_returned": asked.batch_size * asked.n_iter, "num_inference_steps": asked.steps, "guidance_scale": asked.cfg_scale, "width": asked.width, "height": asked.height,
        "scheduler": _scheduler(asked, entry), **override,
    }  # fmt: skip
    values |= _second_pass(asked, errors) if isinstance(asked, TextToImage) else _input(asked, image, errors)
    if errors:
        raise invalid(errors)
    try:
        return _checked({name: value for name, value in values.items() if value is not None})
    except Problem as problem:
        raise renamed(problem, NAMES) from None


def _checked(values: dict[str, Any]) -> GenerationRequest:
    try:
        return GenerationRequest.model_validate(values)
    except ValidationError as error:
        raise from_validation(error, GenerationRequest.model_fields) from None


def _unknown(asked: BaseModel) -> list[FieldError]:
    """The fields that are neither known, nor at a value at which they do nothing."""
    known = sorted([*type(asked).model_fields, *_NEUTRAL, *_HARMLESS])
    found = []
    for name, value in (asked.model_extra or {}).items():
        if name in _NEUTRAL and not any(value == neutral for neutral in _NEUTRAL[name]):
            found.append(FieldError(field=name, message="has no counterpart here", allowed="leave it out, or " + " or ".join(map(repr, _NEUTRAL[name])), given=shown(value)))
        elif name not in _NEUTRAL and name not in _HARMLESS:
            found.append(FieldError(field=name[:80], message=f"unknown parameter{nearest(name, known)}", allowed=known))
    return found


def _scripts(asked: Drawing) -> list[FieldError]:
    """Scripts with arguments that would do something; clients of A1111's extensions send empty or disabled ones with every request."""
    busy = [name for name, script in asked.alwayson_scripts.items() if any(_active(each) for each in (script.get("args", []) if isinstance(script, dict) else [script]))]
    return [FieldError(field=f"alwayson_scripts.{name[:60]}", message="there are no scripts or extensions here", allowed="leave it out; POST /post_config has controlnet and ip_adapter") for name in busy]


def _active(argument: object) -> bool:
    if isinstance(argument, dict):
        return bool(argument.get("enabled", argument.get("enable", True)))
    return bool(argument)


def _overridden(asked: Drawing, catalogue: Catalogue, errors: list[FieldError]) -> tuple[dict[str, Any], Entry]:
    """What `override_settings` say, and the model."""
    values: dict[str, Any] = {}
    entry = catalogue.find(None)
    for name, value in asked.override_settings.items():
        where = f"override_settings.{name[:60]}"
        if name == "sd_model_checkpoint":
            found = catalogue.called(str(value))
            if found is None:
                errors.append(FieldError(field=where, message=f"there is no model {shown(value)}", allowed=list(catalogue.generators), given=shown(value)))
            else:
                entry, values["model_id"] = found, found.id
        elif name == "CLIP_stop_at_last_layers" and isinstance(value, int) and value >= 1:
            values["clip_skip"] = value - 1
        elif name == "samples_format":
            values["format"] = value
        elif name == "jpeg_quality":
            values["quality"] = value
        elif not (name in _SILENT_SETTINGS or (name == "sd_vae" and value in ("Automatic", "None", "")) or (name in ("eta_noise_seed_delta", "tiling") and not value)):
            allowed = ["sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "jpeg_quality"]
            errors.append(FieldError(field=where, message="cannot be set here", allowed=allowed, given=shown(value)))
    return values, entry


def _scheduler(asked: Drawing, entry: Entry) -> str | None:
    """Sampler and schedule as one name; "Automatic" is the schedule that A1111 gives the sampler."""
    name = asked.sampler_name or str((asked.model_extra or {}).get("sampler_index", ""))
    if not name:
        return None
    if asked.scheduler.lower() not in _AUTOMATIC:
        return f"{name} {asked.scheduler}"
    try:
        return schedulers.find(f"{name} Automatic", entry.traits.flow).name
    except Problem:
        return name  # with its schedule in it already, or refused by its own name


def _second_pass(asked: TextToImage, errors: list[FieldError]) -> dict[str, Any]:
    if not asked.enable_hr:
        return {}
    scale = asked.hr_scale
    if asked.hr_resize_x or asked.hr_resize_y:
        if not asked.width or not asked.height or asked.hr_resize_x * asked.height != asked.hr_resize_y * asked.width:
            message = f"{asked.hr_resize_x}x{asked.hr_resize_y} has not the shape of width and height"
            errors.append(FieldError(field="hr_resize_x", message=message, allowed="the same shape, or hr_scale", given=str(asked.hr_resize_x)))
        else:
            scale = asked.hr_resize_x / asked.width
    return {"hr_scale": scale, "hr_upscaler": asked.hr_upscaler, "hr_steps": asked.hr_second_pass_steps or None, "hr_strength": asked.denoising_strength}


def _input(asked: ImageToImage, image: Pixels | None, errors: list[FieldError]) -> dict[str, Any]:
    width, height = asked.width, asked.height
    if asked.resize_mode and image and width and height and abs(image.width * height / (image.height * width) - 1) > 0.02:
        message = f"a picture of {image.width}x{image.height} would be cropped or filled to {width}x{height}"
        errors.append(FieldError(field="resize_mode", message=message, allowed="0, or a picture of that shape", given=str(asked.resize_mode)))
    values: dict[str, Any] = {"strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength}
    if asked.mask is None:
        return values
    if asked.mask_blur is None and asked.mask_blur_x != asked.mask_blur_y:
        errors.append(FieldError(field="mask_blur_x", message="must be as mask_blur_y here", allowed=str(asked.mask_blur_y), given=str(asked.mask_blur_x)))
    values |= {"mask_blur": asked.mask_blur_x if asked.mask_blur is None else asked.mask_blur, "inpainting_fill": asked.inpainting_fill, "inpainting_mask_invert": bool(asked.inpainting_mask_invert)}
    return values | ({"inpaint_full_res": True, "inpaint_full_res_padding": asked.inpaint_full_res_padding} if asked.inpaint_full_res else {})


NO_UPSCALER = ("", "None", "Lanczos")


class Extras(BaseModel):
    """POST /sdapi/v1/extra-single-image: by the factor `upscaling_resize`, or with resize_mode 1 to a size of the picture's shape."""

    model_config = ConfigDict(extra="allow")

    image: str
    upscaler_1: str = "None"
    resize_mode: Literal[0, 1] = 0
    upscaling_resize: float = 2
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512

    def translated(self) -> UpscaleRequest:
        """What it asks for.

        Raises:
            Problem: 422 for what has no counterpart.
        """
        harmless = {"show_extras_results", "upscaling_crop", "codeformer_weight", "upscale_first"}
        neutral: dict[str, tuple[object, ...]] = {"gfpgan_visibility": (0,), "codeformer_visibility": (0,), "upscaler_2": ("None", ""), "extras_upscaler_2_visibility": (0,)}
        for name, value in (self.model_extra or {}).items():
            if name in neutral and value not in (None, *neutral[name]):
                raise invalid_field(name, "has no counterpart here", f"leave it out, or {neutral[name][0]!r}", value)
            if name not in neutral and name not in harmless:
                raise invalid_field(name[:80], f"unknown parameter{nearest(name, [*neutral, *harmless])}", sorted([*neutral, *harmless, *Extras.model_fields]))
        size = {"scale": self.upscaling_resize} if self.resize_mode == 0 else {"width": self.upscaling_resize_w, "height": self.upscaling_resize_h}
        try:
            return UpscaleRequest.model_validate({"model_id": self.upscaler_1, **size})
        except ValueError:
            raise invalid_field("upscaling_resize", "is out of range", "1 up to the upscaler's own factor", self.upscaling_resize) from None


EXTRAS_NAMES = {"model_id": "upscaler_1", "scale": "upscaling_resize", "width": "upscaling_resize_w", "height": "upscaling_resize_h"}


def unpacked(text: str, field: str) -> bytes:
    """The bytes of a base64 field, with or without a data URL's head.

    Raises:
        Problem: 422 for what is no base64; addresses are not fetched.
    """
    if re.match(r"https?://", text):
        raise invalid_field(field, "is an address; pictures are not fetched", "the picture as base64", text)
    body = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid_field(field, "is no base64", "the picture as base64, with or without data:image/png;base64,", text) from None
