"""ControlNets: their files, the pipelines that have them, and a batch's arguments for those.

The pipelines are diffusers' own; runners.guides keeps the networks in memory and calls what is here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor, nn

from core import preprocessing
from core.guides import Control
from core.images import to_pil
from core.model_settings import ControlNet, Family
from core.plans import Plan

_SD: dict[str, type[DiffusionPipeline]] = {"txt2img": StableDiffusionControlNetPipeline, "img2img": StableDiffusionControlNetImg2ImgPipeline}
CLASSES: dict[Family, dict[str, type[DiffusionPipeline]]] = {
    "starter": _SD,
    "sd15": _SD,
    "sd2": _SD,
    "sdxl": {"txt2img": StableDiffusionXLControlNetPipeline, "img2img": StableDiffusionXLControlNetImg2ImgPipeline},
    "flux": {"txt2img": FluxControlNetPipeline, "img2img": FluxControlNetImg2ImgPipeline},
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
    model: nn.Module = cls.from_pretrained(path, torch_dtype=dtype, variant=net.variant, use_safetensors=True, local_files_only=True)
    return model.to(device).eval()


def pipeline(base: DiffusionPipeline, family: Family, kind: str, nets: list[nn.Module], **flags: Any) -> DiffusionPipeline:
    """The pipeline of `kind` that `nets` control, of the components of `base`."""
    cls = CLASSES[family][kind]
    takes = inspect.signature(cls.__init__).parameters
    components = {name: part for name, part in base.components.items() if name in takes}
    made = cls(**components, **flags, controlnet=nets[0] if len(nets) == 1 else nets)
    made.set_progress_bar_config(disable=True)
    if family == "flux":
        _start_from_the_seeds_noise(made)
    return made


def maps(plan: Plan) -> list[Tensor]:
    """Each control image of a plan as its ControlNet takes it: (3, H, W), 0..1."""
    made = []
    for control, picture in zip(plan.controls, plan.control_images, strict=True):
        image = preprocessing.run(control.preprocessor, to_pil(picture), (plan.width, plan.height))
        made.append(torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1))
    return made


def arguments(pipe: DiffusionPipeline, controls: list[Control], rows: list[list[Tensor]]) -> dict[str, Any]:
    """What a batch's pipeline has to know of its ControlNets.

    Args:
        rows: of each picture, the maps of all its ControlNets.
    """
    stacked = [torch.stack(of_one) for of_one in zip(*rows, strict=True)]  # of each ControlNet (N, 3, H, W)
    name = "control_image" if "control_image" in inspect.signature(pipe.__call__).parameters else "image"
    one = len(controls) == 1
    scales = [control.scale for control in controls]
    return {
        name: stacked[0] if one else stacked,
        "controlnet_conditioning_scale": scales[0] if one else scales,
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }


def _start_from_the_seeds_noise(pipe: DiffusionPipeline) -> None:
    """Flux's pipelines encode the maps with noise of the pictures' generators, before they draw the starting noise
    from them. Begin the generators anew, so that a seed's noise is the same with a ControlNet and without."""
    plain = pipe.prepare_latents
    takes = inspect.signature(plain)

    def prepare_latents(*args: Any, **named: Any) -> Any:
        for generator in takes.bind(*args, **named).arguments["generator"]:
            generator.manual_seed(generator.initial_seed())
        return plain(*args, **named)

    pipe.prepare_latents = prepare_latents
