"""The second pass of hires-fix: what was drawn, enlarged, and drawn over by the same model.

runners.denoise calls it for each batch, in the device's thread. Source: A1111's "highres. fix".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core import hires
from core.plans import Hires, Plan
from runners import tiling
from runners.guides import Guided, Prepared
from runners.residency import Resident


def redraw(
    resident: Resident, plan: Plan, scheduler: Any, first: Any, upscaler: Resident | None, embedded: dict[str, Tensor],
    guided: Guided, guiding: list[Prepared], seeds: list[int], after_step: Callable[..., Any], check: Callable[[], None],
) -> np.ndarray:  # fmt: skip
    """Pictures of the final size, (N, H, W, 3) floats in 0..1.

    Args:
        resident: the model; its img2img pipeline draws.
        plan: any of the batch, with `hires`.
        scheduler: one of this pass's own.
        first: the first pass's pictures, (N, h, w, 3), or for `latent` its latents.
        upscaler: a network in memory, where `plan.hires` names one.
        embedded: the prompts' arguments, (N, ...).
        guided, guiding: what guides the first pass guides this one too, and each row's part in it.
        seeds: each row's; its noise is drawn anew at the larger size.
        after_step, check: as in runners.denoise.
    """
    second = plan.hires
    assert second is not None
    pipe = resident.pipeline("img2img", guided.nets)
    pipe.scheduler = scheduler
    image = _latents(resident, first, second) if second.upscaler == "latent" else [_picture(row, second, upscaler, check) for row in first]
    size = {"width": second.width, "height": second.height} if resident.entry.model.family == "flux" else {}
    given = {"image": image, "strength": second.strength, "num_inference_steps": hires.schedule(second, plan.flow), "guidance_scale": plan.guidance_scale}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    made = pipe(
        **embedded,
        **guided.arguments(pipe, given | size, guiding, generators, plan.guidance_scale, second=True),
        generator=generators,
        output_type="np",
        callback_on_step_end=after_step,
    ).images
    for row, before in zip(made, first, strict=True):
        if isinstance(before, np.ndarray) and not np.isfinite(before).all():
            row[:] = np.nan  # the caller tells whose numbers overflowed, and keeps the others
    return made


def _latents(resident: Resident, first: Tensor, second: Hires) -> Tensor:
    """The latents, interpolated as A1111's "Latent" does: (N, C, H / 8, W / 8)."""
    pipe = resident.base
    if resident.entry.model.family == "flux":
        width, height = second.first
        first = pipe._unpack_latents(first, height, width, pipe.vae_scale_factor)
    factor = pipe.vae_scale_factor
    return F.interpolate(first, size=(second.height // factor, second.width // factor), mode="bilinear")


def _picture(row: np.ndarray, second: Hires, upscaler: Resident | None, check: Callable[[], None]) -> Image.Image:
    """One picture at the final size."""
    pixels = _pixels(row)
    if upscaler is not None:
        pixels = _pixels(tiling.enlarge(upscaler.base, pixels, upscaler.entry.scale, upscaler.entry.size, check))
    return Image.fromarray(pixels).resize((second.width, second.height), Image.Resampling.LANCZOS)


def _pixels(array: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(array, posinf=0, neginf=0) * 255).round().astype(np.uint8)
