"""A picture made larger by a resident upscaler: a network, or a diffusion model, tile by tile.

Everything here happens in the device's thread; runners.device calls it for plans with `upscale`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.generation import Generation, Ran, Timing
from core.images import to_pil
from core.plans import Pixels, Plan
from core.tiling import count
from runners import denoise, prompts, tiling
from runners.residency import Resident


def run(resident: Resident, plan: Plan, check: denoise.Check, timing: Timing, thrifty: bool = False) -> Generation:
    """Enlarge the picture of a plan.

    Args:
        resident: the upscaler in memory.
        plan: with `image` and `upscale`. A diffusion upscaler draws all tiles' noise, in their order, from a CPU
            generator seeded with `plan.seeds[0]`.
        check: raises when the work should stop; called between tiles, and between denoising steps.
        timing: filled in with milliseconds.
        thrifty: memory is short: a network gets tiles of half the side.

    Raises:
        Problem: what `check` raises; 422 where the numbers overflow.
    """
    upscale = plan.upscale
    assert upscale is not None
    assert plan.image is not None
    began = time.perf_counter()
    network, degraded = resident.entry.model.family == "upscaler", None
    if network and thrifty:
        upscale = upscale.model_copy(update={"tile": upscale.tile // 2, "tiles": count(*upscale.first, upscale.tile // 2)})
        degraded = f"tiles of {upscale.tile} pixels instead of {2 * upscale.tile}"
    if network:
        model: Any = resident.base
        steps, sampler, tokens, cut, notes = 0, "none", 0, 0, []
    else:
        model = _Diffusion(resident, plan, check)
        steps, sampler, tokens, cut, notes = plan.num_inference_steps, model.sampler, model.tokens, model.cut, model.notes
    made = tiling.enlarge(model, np.asarray(to_pil(plan.image)), upscale.scale, upscale.tile, check)
    timing.denoise = 1000 * (time.perf_counter() - began)
    picture = fitted(denoise.to_pixels(made), plan.width, plan.height)
    timing.decode = 1000 * (time.perf_counter() - began) - timing.denoise
    entry = resident.entry
    ran = Ran(
        model_id=entry.id,
        model_sha256=resident.sha256,
        family=entry.model.family,
        scheduler=sampler,
        schedule=None,
        torch_dtype=_dtype(resident),
        device=resident.device,
        num_inference_steps=steps,
        steps_run=steps * upscale.tiles,
        guidance_scale=plan.guidance_scale,
        width=picture.width,
        height=picture.height,
        clip_skip=0,
        strength=None,
        upscale=upscale,
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        prompt_tokens=tokens,
        prompt_tokens_cut=cut,
        licence=entry.model.licence,
        commercial_use=entry.model.commercial_use,
        credit=[entry.model.credit] if entry.model.credit else [],
        notes=[*plan.notes, *notes],
        libraries=denoise.libraries(),
        degraded=degraded,
        timing=timing,
    )
    return Generation(pictures=[picture], seeds=plan.seeds, ran=ran)


def fitted(picture: Pixels, width: int, height: int) -> Pixels:
    """The picture at a smaller size (Lanczos), where that was asked for."""
    if (picture.width, picture.height) == (width, height):
        return picture
    small = to_pil(picture).resize((width, height), Image.Resampling.LANCZOS)
    return Pixels(width=width, height=height, data=small.tobytes())


def _dtype(resident: Resident) -> str:
    """The precision that it really has: some networks know float32 alone."""
    module = next(c for c in resident.base.components.values() if isinstance(c, torch.nn.Module))
    return str(next(module.parameters()).dtype).removeprefix("torch.")


class _Diffusion:
    """A diffusion upscaler as what runners.tiling calls: (1, 3, h, w) in 0..1 to as many times larger."""

    def __init__(self, resident: Resident, plan: Plan, check: denoise.Check) -> None:
        self._pipe, self._plan, self._entry = resident.base, plan, resident.entry
        self._pipe.scheduler, named = denoise.make_scheduler(resident, None)
        self.sampler = f"{named.sampler} {named.schedule}" if named.schedule else named.sampler
        self._generator = torch.Generator("cpu").manual_seed(plan.seeds[0])
        self._step = lambda *_: check(stepped=1)
        if resident.entry.model.family == "sd_x4_upscaler":
            assert plan.upscale is not None
            embedded = prompts.embed(self._pipe, "sd2", plan, remember=resident.remember)
            self.tokens, self.cut, self.notes = embedded.tokens, embedded.cut, embedded.notes
            self._arguments: dict[str, Any] = {**embedded.arguments, "noise_level": plan.upscale.noise_level}
        else:  # its pooled embedding comes from the pipeline's own encoding
            self.tokens = len(self._pipe.tokenizer(plan.prompt, truncation=False).input_ids) - 2
            self.cut = max(0, self.tokens - (self._pipe.tokenizer.model_max_length - 2))
            self.notes = [f"the prompt's last {self.cut} tokens were cut"] if self.cut else []
            self._arguments = {"prompt": [plan.prompt], "negative_prompt": [plan.negative_prompt]}

    def __call__(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        multiple, scale = self._entry.traits.multiple, self._entry.scale
        padding = (0, -width % multiple, 0, -height % multiple)
        made = self._pipe(
            **self._arguments,
            image=F.pad(picture, padding, mode="replicate"),
            num_inference_steps=self._plan.num_inference_steps,
            guidance_scale=self._plan.guidance_scale,
            generator=self._generator,
            output_type="pt",
            callback=self._step,
        ).images
        return made[:, :, : height * scale, : width * scale]
