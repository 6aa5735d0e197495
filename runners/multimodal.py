"""UniDiffuser's tasks on one resident pipeline, for one plan or for several that share a batch.

Everything here happens in the device's thread; runners.unidiffuser has the pipeline.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from core.generation import Embedding, Generation, Ran, Timing, Vector
from core.images import to_pil
from core.plans import Pixels, Plan, Task
from core.problems import unavailable
from runners import denoise, prompts
from runners.residency import Resident
from runners.unidiffuser import Pipeline

# What each task runs, by the pipeline's names; a variation goes to the other modality and back.
MODES: dict[Task, tuple[str, ...]] = {
    "generate": ("text2img",),
    "caption": ("img2text",),
    "joint": ("joint",),
    "image": ("img",),
    "text": ("text",),
    "image_variation": ("img2text", "text2img"),
    "text_variation": ("text2img", "img2text"),
    "embed": (),
}
_UNGUIDED: tuple[Task, ...] = ("image", "text", "embed")


@dataclass
class Row:
    """One result in the making, with noise of its own."""

    generator: torch.Generator
    picture: Image.Image | None = None
    prompt: str = ""
    drawn: Pixels | None = None
    text: str | None = None
    embedding: Embedding | None = None


def run(resident: Resident, plans: list[Plan], check: denoise.Check, max_batch: int, timings: list[Timing]) -> list[Generation]:
    """Do plans of one model, task and sampling, in batches that fit.

    Args:
        resident: the model in memory.
        plans: what to do. Every input picture, or the prompt, is a row for each seed; a row uses a CPU
            generator with its seed, so that it comes out the same alone and in a batch.
        check: raises when nobody is left to work for; called between denoising steps and text tokens.
        max_batch: how many rows are computed at once.
        timings: each plan's stages, filled in with milliseconds.

    Raises:
        Problem: what `check` raises; 503 where the catalogue's size is not the model's.
    """
    pipe, first = resident.base, plans[0]
    if first.width != pipe.size:
        raise unavailable(f"{first.model_id} makes pictures of {pipe.size} pixels, its entry in configuration.yaml says {first.width}: mend its `size`.", slug="model-broken")
    each = [_rows(plan) for plan in plans]
    rows = [row for some in each for row in some]
    began = time.perf_counter()
    sampling = _Sampling(resident, first, check)
    for start in range(0, len(rows), max_batch):
        check()
        batch = rows[start : start + max_batch]
        if first.task == "embed":
            _embed(pipe, batch)
        for mode in MODES[first.task]:
            sampling.sample(mode, batch)
    took = 1000 * (time.perf_counter() - began)
    generations = []
    for plan, own, timing in zip(plans, each, timings, strict=True):
        timing.decode, timing.denoise = sampling.decode, took - sampling.decode
        generations.append(_generation(resident, plan, own, sampling, timing))
    return generations


def passes(plan: Plan) -> int:
    """How often the pipeline is run for a batch of a plan."""
    return len(MODES.get(plan.task, ("txt2img",)))


def _rows(plan: Plan) -> list[Row]:
    pictures: list[Image.Image | None] = [to_pil(p) for p in plan.images] or [None]
    return [Row(torch.Generator("cpu").manual_seed(seed), picture, plan.prompt) for picture in pictures for seed in plan.seeds]


class _Sampling:
    """Calls of the pipeline with a plan's arguments; counts steps and the milliseconds after the last."""

    def __init__(self, resident: Resident, plan: Plan, check: denoise.Check) -> None:
        self._resident, self._plan, self._check = resident, plan, check
        self.scheduler, self.schedule = "none", None
        self.steps, self.calls, self.decode = denoise.Steps(check), 0, 0.0

    def sample(self, mode: str, rows: list[Row]) -> None:
        """One mode for a batch: reads the rows' pictures or prompts, writes what was drawn or said."""
        pipe = self._resident.base
        pipe.scheduler, named = denoise.make_scheduler(self._resident, self._plan.scheduler)
        self.scheduler, self.schedule = named.sampler, named.schedule
        pipe.mode, pipe.check, self.steps.rows = mode, self._check, len(rows)
        generators = [row.generator for row in rows]
        if mode == "text2img":
            inputs: dict[str, Any] = {"prompt": [row.prompt for row in rows]}
        elif mode == "img2text":
            inputs = {"image": torch.stack([_tensor(row.picture) for row in rows if row.picture])}
        else:
            inputs = _noise(pipe, generators)  # the pipeline takes the number of rows from these
        made = pipe(
            **inputs,
            data_type=self._plan.data_type,
            num_inference_steps=self._plan.num_inference_steps,
            guidance_scale=self._plan.guidance_scale,
            generator=generators,
            output_type="np",
            callback=lambda step, time, latents: self.steps(step, time, {"latents": self._pictures(mode, latents)}),
        )
        self.calls += 1
        self.decode += 1000 * (time.perf_counter() - self.steps.last)
        for i, row in enumerate(rows):
            if made.images is not None:
                row.drawn = denoise.to_pixels(made.images[i])
                row.picture = to_pil(row.drawn)
            if made.text is not None:
                row.prompt = row.text = made.text[i]

    def _pictures(self, mode: str, latents: Tensor) -> Tensor | None:
        """The pictures' part of what is denoised, (N, channels, h, w); None where no picture is asked for."""
        pipe = self._resident.base
        if mode not in ("text2img", "img", "joint") or self._plan.task == "text_variation":
            return None
        shape = (pipe.num_channels_latents, pipe.unet_resolution, pipe.unet_resolution)
        return latents[:, : math.prod(shape)].reshape(-1, *shape)


def _tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in 0..1."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)


def _noise(pipe: Pipeline, generators: list[torch.Generator]) -> dict[str, Tensor]:
    """The rows' starting noise, in the order in which the pipeline draws it for one."""
    n, latent = len(generators), pipe.unet_resolution
    shapes = {
        "prompt_latents": (n, pipe.text_encoder_seq_len, pipe.text_encoder_hidden_size),
        "vae_latents": (n, pipe.num_channels_latents, latent, latent),
        "clip_latents": (n, 1, pipe.image_encoder_projection_dim),
    }
    return {name: randn_tensor(shape, generators, pipe.device, pipe.text_encoder.dtype) for name, shape in shapes.items()}


@torch.no_grad()
def _embed(pipe: Pipeline, rows: list[Row]) -> None:
    """CLIP's projection (not normalised), and the VAE's mean times its scaling factor: no noise in either."""
    pictures = [row.picture for row in rows if row.picture]
    clip = pipe.clip_embeddings(pictures, pipe.image_encoder.dtype, pipe.device)
    images = pipe.image_processor.preprocess(torch.stack([_tensor(p) for p in pictures])).to(pipe.device, pipe.vae.dtype)
    vae = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    for row, c, v in zip(rows, clip, vae, strict=True):
        row.embedding = Embedding(clip=_vector(c), vae=_vector(v))


def _vector(tensor: Tensor) -> Vector:
    return Vector(shape=tuple(tensor.shape), data=tensor.float().cpu().numpy().astype("<f4").tobytes())


def _told(prompt: str, cut: int, most: int) -> list[str]:
    notes = ["prompt weights are plain text to this model"] if any(weight != 1 for _, weight in prompts.parse_weights(prompt)) else []
    return [*notes, f"the prompt's last {cut} tokens were cut: the model reads {most}"] if cut else notes


def _generation(resident: Resident, plan: Plan, rows: list[Row], sampling: _Sampling, timing: Timing) -> Generation:
    pipe, entry = resident.base, resident.entry
    tokens = len(pipe.clip_tokenizer(plan.prompt, truncation=False).input_ids) - 2
    most = pipe.clip_tokenizer.model_max_length - 2  # without the marks at its ends
    cut = max(0, tokens - most)
    ran = Ran(
        model_id=entry.id,
        model_sha256=resident.sha256,
        family=entry.model.family,
        scheduler=sampling.scheduler,
        schedule=sampling.schedule,
        torch_dtype=str(resident.dtype).removeprefix("torch."),
        device=resident.device,
        num_inference_steps=plan.num_inference_steps if sampling.calls else 0,
        steps_run=sampling.steps.run // max(1, sampling.calls),
        guidance_scale=1 if plan.task in _UNGUIDED else plan.guidance_scale,
        width=pipe.size,
        height=pipe.size,
        clip_skip=0,
        strength=None,
        prompt=plan.prompt,
        negative_prompt="",
        prompt_tokens=tokens,
        prompt_tokens_cut=cut,
        licence=entry.model.licence,
        commercial_use=entry.model.commercial_use,
        credit=[entry.model.credit] if entry.model.credit else [],
        notes=[*plan.notes, *_told(plan.prompt, cut, most)],
        libraries=denoise.libraries(),
        timing=timing,
    )
    return Generation(
        pictures=[row.drawn for row in rows if row.drawn] if plan.task != "text_variation" else [],
        texts=[row.text for row in rows if row.text is not None],
        embeddings=[row.embedding for row in rows if row.embedding],
        seeds=plan.seeds if plan.task != "embed" else [],
        ran=ran,
    )
