"""One plan on one resident pipeline: embed, denoise step by step, decode, and tell what ran.

This is the main path's middle: everything here happens in the device's thread.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import diffusers
import numpy as np
import torch

from core import __version__, schedulers
from core.generation import AppliedLora, Generation, Pixels, Plan, PlannedLora, Ran, Timing
from core.images import to_pil
from core.problems import Problem, invalid_field, problem
from core.schedulers import Scheduler
from core.settings import Family
from runners import prompts
from runners.residency import Resident

Check = Callable[[], None]


def generate(resident: Resident, plan: Plan, loras: list[AppliedLora], check: Check, max_batch: int, timing: Timing) -> Generation:
    """Draw the pictures of a plan.

    Args:
        resident: the model in memory.
        plan: what to draw; picture i uses a CPU generator seeded with `plan.seeds[i]`, so that it
            comes out the same alone, in a batch and on another device.
        loras: what now acts on the model (the text encoders too, so prompts are embedded under it).
        check: raises when the work should stop; called between denoising steps.
        max_batch: how many pictures are denoised at once.
        timing: filled in with the stages' milliseconds.

    Raises:
        Problem: what `check` raises.
    """
    family = resident.entry.model.family
    pipe = resident.txt2img if plan.image is None else resident.img2img
    # 1. A scheduler of this request's own: schedulers keep state, and sharing one mixes requests up.
    scheduler, named = make_scheduler(resident, plan.scheduler)
    pipe.scheduler = scheduler
    # 2. Prompts to embeddings, once for all pictures.
    began = last_step = time.perf_counter()
    embedded = prompts.embed(pipe, family, plan)
    steps_run = 0

    def after_step(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps_run, last_step
        steps_run += 1
        last_step = time.perf_counter()
        check()
        return tensors

    # 3. Denoise and decode, in batches that fit.
    pictures: list[Pixels] = []
    for start in range(0, len(plan.seeds), max_batch):
        seeds = plan.seeds[start : start + max_batch]
        check()
        arrays = pipe(
            **embedded.arguments,
            **_arguments(plan, family),
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=after_step,
        ).images
        timing.denoise += 1000 * (last_step - began)
        pictures += [to_pixels(array) for array in arrays]
        decoded = time.perf_counter()
        timing.decode += 1000 * (decoded - last_step)
        began = decoded
    # 4. What ran, for headers and metadata.
    batches = math.ceil(len(plan.seeds) / max_batch)
    ran = Ran(
        model_id=resident.entry.id,
        model_sha256=resident.sha256,
        family=family,
        scheduler=named.sampler,
        schedule=named.schedule,
        torch_dtype=str(resident.dtype).removeprefix("torch."),
        device=str(pipe.device),
        num_inference_steps=plan.num_inference_steps,
        steps_run=steps_run // batches,
        guidance_scale=plan.guidance_scale,
        width=pictures[0].width,
        height=pictures[0].height,
        clip_skip=plan.clip_skip,
        loras=loras,
        strength=plan.strength,
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        prompt_tokens=embedded.tokens,
        prompt_tokens_cut=embedded.cut,
        licence=resident.entry.model.licence,
        commercial_use=resident.entry.model.commercial_use and all(lora.commercial_use for lora in loras),
        credit=list(dict.fromkeys(filter(None, [resident.entry.model.credit, *(lora.credit for lora in loras)]))),
        notes=[*plan.notes, *embedded.notes, *_told(plan.loras, loras)],
        libraries=libraries(),
        timing=timing,
    )
    return Generation(pictures=pictures, seeds=plan.seeds, ran=ran)


def _told(planned: list[PlannedLora], applied: list[AppliedLora]) -> list[str]:
    """What is to be known of the LoRAs beyond their layers."""
    notes = []
    for before, lora in zip(planned, applied, strict=True):
        if lora.unmatched:
            notes.append(f"{lora.unmatched} of the layers of {lora.name} are not in this model")
        if before.sha256 and before.sha256.lower() != lora.sha256:
            notes.append(f"the file of {lora.name} is not the one that was registered (another SHA-256); its rights may differ")
    return notes


def _arguments(plan: Plan, family: Family) -> dict[str, Any]:
    common: dict[str, Any] = {"num_inference_steps": plan.num_inference_steps, "guidance_scale": plan.guidance_scale}
    if plan.image is None:
        return common | {"width": plan.width, "height": plan.height}
    picture = to_pil(plan.image).resize((plan.width, plan.height), resample=1)  # Lanczos
    size = {"width": plan.width, "height": plan.height} if family == "flux" else {}  # the others take the picture's
    return common | size | {"image": picture, "strength": plan.strength}


def make_scheduler(resident: Resident, name: str | None) -> tuple[Any, Scheduler]:
    """A new scheduler: the named one on the model's own noise settings, or the model's own."""
    own = resident.scheduler
    if name is None:
        return type(own).from_config(own.config), _describe(own)
    flow = resident.entry.traits.flow
    wanted = schedulers.find(name, flow)
    cls = getattr(diffusers, wanted.class_name)
    if flow and "use_flow_sigmas" in wanted.config and not own.config.get("use_dynamic_shifting"):
        raise invalid_field("scheduler", f"{wanted.name} needs a model with dynamic shifting", schedulers.names(flow, image_to_image=True), name)
    # The model's file may choose sigmas of its own; a named scheduler means just what it says.
    plain = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False}
    accepted = set(inspect.signature(cls.__init__).parameters)
    return cls.from_config(own.config, **{**{k: v for k, v in plain.items() if k in accepted}, **wanted.config}), wanted


def _describe(scheduler: Any) -> Scheduler:
    """The A1111 name of the model's own scheduler; its class name where it has none."""
    config = scheduler.config
    suffix = next((s for s in ("Karras", "Exponential", "Beta") if config.get(f"use_{s.lower()}_sigmas")), "")
    flow = type(scheduler).__name__.startswith("FlowMatch")
    algorithm = " SDE" if str(config.get("algorithm_type", "")).startswith("sde") else ""
    class_name = type(scheduler).__name__
    try:
        base = schedulers.find(class_name, flow)
        return schedulers.find(f"{base.sampler}{algorithm} {suffix}".strip(), flow)
    except Problem:
        return Scheduler(class_name, None, class_name)


def to_pixels(array: np.ndarray[Any, Any]) -> Pixels:
    """(H, W, 3) floats in 0..1 to 8 bits.

    Raises:
        Problem: 422 where there are numbers that are none: a black picture would hide it.
    """
    if not np.isfinite(array).all():
        detail = "The numbers overflowed. Ask for another scheduler, a lower guidance_scale, or torch_dtype float32 or bfloat16."
        raise problem(422, "overflow", "Overflow", detail)
    height, width, _ = array.shape
    return Pixels(width=width, height=height, data=(array * 255).round().astype(np.uint8).tobytes())


@lru_cache(maxsize=1)
def libraries() -> dict[str, str]:
    return {"easel": __version__, **{name: version(name) for name in ("diffusers", "transformers", "peft", "torch")}}
