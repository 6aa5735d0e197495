"""What a picture looks like so far: its latents shown as colours, for jobs that somebody watches.

A linear map from a latent pixel to RGB is nearly free, and coarse: its picture is an eighth as wide. The factors of the
Stable Diffusion and SDXL latent spaces are those that ComfyUI and others fitted by linear regression
(https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204), those of Flux as ComfyUI has them; UniDiffuser's
latent space is Stable Diffusion's. Of the starters, whose latent spaces are their own and whose pictures are small, the VAE decodes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.model_settings import Family
from core.plans import Pixels, Plan
from runners.denoise import to_pixels
from runners.residency import Resident
from runners.work import Job

EVERY_S = 0.5
_SD = [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]]
_SDXL = [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]]
_FLUX = [
    [-0.0346, 0.0244, 0.0681], [0.0034, 0.0210, 0.0687], [0.0275, -0.0668, -0.0433], [-0.0174, 0.0160, 0.0617],
    [0.0859, 0.0721, 0.0329], [0.0004, 0.0383, 0.0115], [0.0405, 0.0861, 0.0915], [-0.0236, -0.0185, -0.0259],
    [-0.0245, 0.0250, 0.1180], [0.1008, 0.0755, -0.0421], [-0.0515, 0.0201, 0.0011], [0.0428, -0.0012, -0.0036],
    [0.0817, 0.0765, 0.0749], [-0.1264, -0.0522, -0.1103], [-0.0280, -0.0881, -0.0499], [-0.1262, -0.0982, -0.0778],
]  # fmt: skip
_FACTORS: dict[Family, list[list[float]]] = {"sd15": _SD, "sd2": _SD, "sdxl": _SDXL, "flux": _FLUX, "unidiffuser": _SD}
_BIAS: dict[Family, list[float]] = {"flux": [-0.0329, -0.0718, -0.0851]}
_SMALL = 16  # latents of so many pixels a side or fewer are decoded, of models with a latent space of their own


def show(job: Job[Any], plan: Plan, resident: Resident, latents: Tensor | None, step: int) -> None:
    """Keep a preview of a job's first picture, where it is watched, its latents (N, channels, h, w; of Flux packed) can be
    shown, and the last one is not too new."""
    now = time.monotonic()
    if now > job.watched_until or now < job.previewed + EVERY_S or latents is None:
        return
    picture = _picture(resident, _unpacked(latents[:1], plan, resident))
    if picture is not None:
        job.previewed, job.preview, job.preview_step = now, picture, step


def _picture(resident: Resident, latents: Tensor | None) -> Pixels | None:
    family = resident.entry.model.family
    if latents is None or latents.ndim != 4:
        return None
    if family == "starter" or (family == "unidiffuser" and max(latents.shape[2:]) <= _SMALL):
        vae = resident.base.vae
        decoded = vae.decode(latents / vae.config.scaling_factor).sample[0]
        return to_pixels(((decoded.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy())
    factors = _FACTORS.get(family, [])
    return _coloured(latents[0], factors, _BIAS.get(family, [0, 0, 0])) if len(factors) == latents.shape[1] else None


def _unpacked(latents: Tensor, plan: Plan, resident: Resident) -> Tensor | None:
    """Flux's (1, patches, 4 x channels) as (1, channels, h, w), of whichever of the plan's passes has so many patches; others as they are."""
    if latents.ndim != 3:
        return latents
    pipe, sizes = resident.base, [(plan.width, plan.height), *([plan.hires.first, (plan.hires.width, plan.hires.height)] if plan.hires else [])]
    patch = 2 * pipe.vae_scale_factor
    size = next(((w, h) for w, h in sizes if (w // patch) * (h // patch) == latents.shape[1]), None)
    return pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor) if size else None


def _coloured(latents: Tensor, factors: list[list[float]], bias: list[float]) -> Pixels:
    """(channels, h, w) latents as a picture of that size."""
    colours = torch.einsum("chw,cr->hwr", latents.float().cpu(), torch.tensor(factors)) + torch.tensor(bias)
    return to_pixels(np.clip((colours.numpy() + 1) / 2, 0, 1))
