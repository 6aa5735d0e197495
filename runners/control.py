"""ControlNets: their files, the pipelines that have them, and a batch's arguments for those.

The pipelines are diffusers' own; runners.guides keeps the networks in memory and calls what is here.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor, nn

from core import preprocessing
from core.guides import Control
from core.images import to_pil
from core.model_settings import ControlNet, Family
from core.plans import Plan
from runners import attention

_SD: dict[str, type[DiffusionPipeline]] = {
    "txt2img": StableDiffusionControlNetPipeline,
    "img2img": StableDiffusionControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionControlNetInpaintPipeline,
}
CLASSES: dict[Family, dict[str, type[DiffusionPipeline]]] = {
    "starter": _SD,
    "sd15": _SD,
    "sd2": _SD,
    "sdxl": {
        "txt2img": StableDiffusionXLControlNetPipeline,
        "img2img": StableDiffusionXLControlNetImg2ImgPipeline,
        "inpaint": StableDiffusionXLControlNetInpaintPipeline,
    },
    "flux": {"txt2img": FluxControlNetPipeline, "img2img": FluxControlNetImg2ImgPipeline, "inpaint": FluxControlNetInpaintPipeline},
}


def files(path: Path, net: ControlNet) -> list[Path]:
    """The weight files of a ControlNet in the folder `path`, in its variant if it has one."""
    found = sorted(path.glob("*.safetensors"))
    return [f for f in found if (f".{net.variant}" in f.name) == bool(net.variant)] if net.variant else [f for f in found if f.name.count(".") == 1] or found


def load(path: Path, net: ControlNet, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a ControlNet from a folder in diffusers' layout.

    Raises:
        OSError, ValueError, RuntimeError: for files that are missing, broken or of another architecture.
    """
    cls = FluxControlNetModel if net.family == "flux" else ControlNetModel
    model: nn.Module = cls.from_pretrained(path, dtype=dtype, variant=net.variant, use_safetensors=True, local_files_only=True)
    attention.repeat_nothing(model)
    return model.to(device).eval()


def pipeline(base: DiffusionPipeline, family: Family, kind: str, nets: list[nn.Module], **flags: Any) -> DiffusionPipeline:
    """The pipeline of `kind` that `nets` control, of the components of `base`."""
    cls = CLASSES[family][kind]
    takes = inspect.signature(cls.__init__).parameters
    components = {name: part for name, part in base.components.items() if name in takes}
    made = cls(**components, **flags, controlnet=nets[0] if len(nets) == 1 else nets)
    made.set_progress_bar_config(disable=True)
    return made


def maps(plan: Plan, size: tuple[int, int]) -> list[Tensor]:
    """Each control image of a plan as its ControlNet takes it: (3, H, W), 0..1, of `size` (width, height).
    Where only a part of the answer is drawn, that part of it."""
    made = []
    for control, picture in zip(plan.controls, plan.control_images, strict=True):
        image = to_pil(picture)
        if plan.inpainting:
            across, down = image.width / plan.inpainting.canvas[0], image.height / plan.inpainting.canvas[1]
            left, top, right, bottom = plan.inpainting.box
            image = image.crop((math.floor(left * across), math.floor(top * down), math.ceil(right * across), math.ceil(bottom * down)))
        image = preprocessing.run(control.preprocessor, image, size)
        made.append(torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1))
    return made


def arguments(
    pipe: DiffusionPipeline, given: dict[str, Any], controls: list[Control], rows: list[list[Tensor]], generators: list[torch.Generator]
) -> dict[str, Any]:
    """The arguments of a batch's pipeline that has ControlNets, of those `given` to one without.

    Args:
        rows: of each picture, the maps of all its ControlNets.
        generators: the pictures'; what they draw next is the same as without a ControlNet.
    """
    image = given.get("image")
    _begin_alike(pipe, generators, image if isinstance(image, Tensor) else None)
    if "masked_image_latents" in given:  # here a picture, -1..1; these pipelines mask the `image` themselves, which they take as 0..1
        given = {name: value for name, value in given.items() if name != "masked_image_latents"} | {"image": given["masked_image_latents"] / 2 + 0.5}
    stacked = [torch.stack(of_one) for of_one in zip(*rows, strict=True)]  # of each ControlNet (N, 3, H, W)
    name = "control_image" if "control_image" in inspect.signature(pipe.__call__).parameters else "image"
    one = len(controls) == 1
    scales = [control.scale for control in controls]
    return given | {
        name: stacked[0] if one else stacked,
        "controlnet_conditioning_scale": scales[0] if one else scales,
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }


def _begin_alike(pipe: DiffusionPipeline, generators: list[torch.Generator], latents: Tensor | None) -> None:
    """Let the next call begin as without a ControlNet: with the noise that the generators give now (Flux's pipelines encode
    the maps with them first), and from `latents`, where the picture is some already (few of these pipelines take any)."""
    states = [generator.get_state() for generator in generators]

    def prepare_latents(*args: Any, **named: Any) -> Any:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if latents is not None:
            pipe._encode_vae_image = lambda **_: latents
        try:
            return type(pipe).prepare_latents(pipe, *args, **named)
        finally:
            vars(pipe).pop("_encode_vae_image", None)

    pipe.prepare_latents = prepare_latents
