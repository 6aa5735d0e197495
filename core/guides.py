"""What guides a picture beside its prompt: ControlNets and an IP-Adapter. Their fields, and what is decided from them.

A ControlNet follows the lines, depths or poses of a control image; an IP-Adapter takes pictures as a prompt.
core.generation takes the fields and the decided messages from here, core.catalogue asks `plan`, runners.guides does it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from core import preprocessing
from core.model_settings import ControlNet, Family, IpAdapter, Models
from core.problems import Refuse, nearest

if TYPE_CHECKING:
    from core.plans import Inputs, Pixels
    from core.requests import GenerationRequest

MAX_IMAGES = 4  # control images, and IP-Adapter images, of one request
Guide = TypeVar("Guide", ControlNet, IpAdapter)


def _list(value: Any) -> Any:
    """Several values in one field: a JSON array, or text with commas."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return _list(json.loads(value))
            except ValueError:
                return value
        return [part.strip() for part in value.split(",")]
    values = value if isinstance(value, list) else value if value is None else [value]
    if values and any(isinstance(v, bool) for v in values):
        raise ValueError("must not be true or false")
    return values


Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]] | None, BeforeValidator(_list)]
Shares = Annotated[list[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] | None, BeforeValidator(_list)]
Scales = Annotated[list[Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]] | None, BeforeValidator(_list)]


class GuideFields(BaseModel):
    """The fields of a request for pictures that are about ControlNets and the IP-Adapter."""

    controlnet: Names = Field(None, description="ControlNets by id, comma separated: one for each `control_image`, or several for one.")
    controlnet_conditioning_scale: Scales = Field(None, description="How strongly each acts, 0 to 2; one number, or one for each. Default 1.")
    control_guidance_start: Shares = Field(None, description="The share of the steps after which each begins to act. Default 0.")
    control_guidance_end: Shares = Field(None, description="The share of the steps after which each stops. Default 1.")
    preprocessor: Names = Field(None, description="What makes the map from each control image; none: it is one. Default: the ControlNet's own.")
    ip_adapter: str | None = Field(None, max_length=300, description="An IP-Adapter by id, for the pictures in `ip_adapter_image`.")
    ip_adapter_scale: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="How strongly it acts. Default 1; 0.5 leaves the prompt more say.")


class Control(BaseModel):
    """A ControlNet as it acts: on the steps from the share `start` to `end`, with `scale`. `sha256` is the weights' that ran."""

    model_config = ConfigDict(frozen=True)
    id: str
    preprocessor: str
    scale: float
    start: float
    end: float
    commercial_use: bool
    credit: str | None
    sha256: str | None = None


class ImagePrompt(BaseModel):
    """An IP-Adapter as it acts, on so many pictures."""

    model_config = ConfigDict(frozen=True)
    id: str
    scale: float
    images: int
    commercial_use: bool
    credit: str | None
    sha256: str | None = None


@dataclass(frozen=True)
class Guides:
    """What was decided: the ControlNets with a picture for each, and the IP-Adapter with its pictures."""

    controls: list[Control] = field(default_factory=list)
    control_images: list[Pixels] = field(default_factory=list)
    ip_adapter: ImagePrompt | None = None
    ip_adapter_images: list[Pixels] = field(default_factory=list)

    @property
    def parts(self) -> list[Control | ImagePrompt]:
        return parts(self.controls, self.ip_adapter)


def parts(controls: list[Control], ip_adapter: ImagePrompt | None) -> list[Control | ImagePrompt]:
    """The ControlNets and the IP-Adapter as one list."""
    every: list[Control | ImagePrompt] = [*controls]
    return [*every, ip_adapter] if ip_adapter else every


def fitting(models: Models, family: Family) -> dict[str, list[str]]:
    """The ids of what fits a family, as GET /capabilities tells them."""
    return {
        "controlnets": [net.id for net in models.controlnets if net.family == family],
        "ip_adapters": [adapter.id for adapter in models.ip_adapters if adapter.family == family],
    }


def plan(request: GenerationRequest, inputs: Inputs | None, model_id: str, family: Family, models: Models, refuse: Refuse) -> Guides:
    """Check what guides a request against the model's family, and fill in the defaults.

    Args:
        refuse: takes each field that cannot be honoured, with what was wrong, what is allowed, and what was given.
    """
    controls, maps = _controls(request, list(inputs.control_image) if inputs else [], model_id, family, models, refuse)
    prompt, pictures = _image_prompt(request, list(inputs.ip_adapter_image) if inputs else [], model_id, family, models, refuse)
    return Guides(controls, maps, prompt, pictures)


def _controls(
    request: GenerationRequest, images: list[Pixels], model_id: str, family: Family, models: Models, refuse: Refuse
) -> tuple[list[Control], list[Pixels]]:
    fit = fitting(models, family)["controlnets"]
    names = request.controlnet or []
    if not names:
        for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "preprocessor"):
            if getattr(request, name) is not None:
                refuse(name, "only has a meaning with a ControlNet", "leave it out, or name one in controlnet", getattr(request, name))
        if images:
            refuse("controlnet", "is missing: control_image is for a ControlNet", fit or f"none is listed for {family}", "")
        return [], []
    known = {net.id: net for net in models.controlnets}
    nets = [net for name in names if (net := _fit("controlnet", name, known, fit, model_id, family, refuse))]
    if len(names) > MAX_IMAGES:
        refuse("controlnet", "names too many", f"at most {MAX_IMAGES}", len(names))
    if len(images) not in (1, len(names)):
        what = "is missing" if not images else f"comes {len(images)} times for {len(names)} ControlNets"
        refuse("control_image", what, f"{len(names)} multipart file parts, or one for all" if len(names) > 1 else "a multipart file part", "")
        return [], []

    def each(name: str, default: Any) -> list[Any]:
        """A field's values, one for each ControlNet."""
        values = getattr(request, name)
        if values is None:
            return [default] * len(names)
        if len(values) not in (1, len(names)):
            refuse(name, f"has {len(values)} values for {len(names)} ControlNets", f"1 or {len(names)} values", values)
        return [*values, *[values[-1]] * len(names)][: len(names)]

    starts, ends, scales = each("control_guidance_start", 0.0), each("control_guidance_end", 1.0), each("controlnet_conditioning_scale", 1.0)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            refuse("control_guidance_end", f"must be larger than control_guidance_start ({start:g})", f"more than {start:g}, at most 1", end)
    preprocessors = each("preprocessor", None)
    for name in preprocessors:
        if name is not None and name not in preprocessing.NAMES:
            refuse("preprocessor", f"there is no preprocessor {name!r}{nearest(name, preprocessing.NAMES)}", preprocessing.NAMES, name)
    if len(nets) < len(names):
        return [], []
    controls = [
        Control(id=net.id, preprocessor=name or net.preprocessor, scale=scale, start=start, end=end, commercial_use=net.commercial_use, credit=net.credit)
        for net, name, scale, start, end in zip(nets, preprocessors, scales, starts, ends, strict=True)
    ]
    return controls, images * len(names) if len(images) == 1 else images


def _image_prompt(
    request: GenerationRequest, images: list[Pixels], model_id: str, family: Family, models: Models, refuse: Refuse
) -> tuple[ImagePrompt | None, list[Pixels]]:
    fit = fitting(models, family)["ip_adapters"]
    if request.ip_adapter is None:
        if request.ip_adapter_scale is not None:
            refuse("ip_adapter_scale", "only has a meaning with an IP-Adapter", "leave it out, or name one in ip_adapter", request.ip_adapter_scale)
        if images:
            refuse("ip_adapter", "is missing: ip_adapter_image is for an IP-Adapter", fit or f"none is listed for {family}", "")
        return None, []
    adapter = _fit("ip_adapter", request.ip_adapter, {a.id: a for a in models.ip_adapters}, fit, model_id, family, refuse)
    if not images:
        refuse("ip_adapter_image", "is missing", f"1 to {MAX_IMAGES} multipart file parts", "")
    if adapter is None:
        return None, []
    scale = 1.0 if request.ip_adapter_scale is None else request.ip_adapter_scale
    return ImagePrompt(id=adapter.id, scale=scale, images=len(images), commercial_use=adapter.commercial_use, credit=adapter.credit), images


def _fit(
    name: str, id: str, known: dict[str, Guide], fit: list[str], model_id: str, family: Family, refuse: Refuse
) -> Guide | None:
    """The one asked for; what is unknown, or made for another family, is refused with those that fit."""
    if id in fit:
        return known[id]
    what = f"{id} is for {known[id].family} models, and {model_id} is one of {family}" if id in known else f"there is no {id!r}{nearest(id, fit)}"
    refuse(name, what, fit or f"none is listed for {family}", id)
    return None
