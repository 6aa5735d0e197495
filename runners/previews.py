"""What a picture looks like so far: its latents shown as colours, for jobs that somebody watches.

A linear map from a latent pixel to RGB is nearly free, and coarse: its picture is an eighth as wide. The factors of the
Stable Diffusion and SDXL latent spaces are those that ComfyUI and others fitted by linear regression
(https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204). Of the starter, whose latent space is
its own, the VAE decodes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.model_settings import Family
from core.plans import Pixels
from runners.denoise import to_pixels
from runners.queue import Job
from runners.residency import Resident

EVERY_S = 0.5
_SD = [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]]
_SDXL = [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]]
_FACTORS: dict[Family, list[list[float]]] = {"sd15": _SD, "sd2": _SD, "sdxl": _SDXL}


def show(job: Job[Any], resident: Resident, latents: Tensor | None, step: int) -> None:
    """Keep a preview of a job's first picture, where it is watched, its latents (N, 4, h, w) can be shown, and the
    last one is not too new."""
    now, family = time.monotonic(), resident.entry.model.family
    if now > job.watched_until or now < job.previewed + EVERY_S or latents is None or latents.ndim != 4:
        return
    job.previewed = now
    if family in _FACTORS and latents.shape[1] == 4:
        job.preview, job.preview_step = _coloured(latents[0], _FACTORS[family]), step
    elif family == "starter":
        vae = resident.base.vae
        decoded = vae.decode(latents[:1] / vae.config.scaling_factor).sample[0]
        job.preview, job.preview_step = to_pixels(((decoded.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()), step


def _coloured(latents: Tensor, factors: list[list[float]]) -> Pixels:
    """(4, h, w) latents as a picture of that size."""
    colours = torch.einsum("chw,cr->hwr", latents.float().cpu(), torch.tensor(factors))
    return to_pixels(np.clip((colours.numpy() + 1) / 2, 0, 1))
