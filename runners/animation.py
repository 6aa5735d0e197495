"""One plan's animation on a resident model with a motion adapter: denoise all frames at once, decode some at a time.

Everything here happens in the device's thread; runners.motion makes the pipeline.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from core.generation import AppliedLora, Generation, Timing
from core.plans import Plan
from core.problems import invalid_field
from runners import denoise, prompts
from runners.motion import Motion
from runners.residency import Resident


def generate(resident: Resident, motion: Motion, plan: Plan, loras: list[AppliedLora], check: denoise.Check, at_once: int, timing: Timing) -> Generation:
    """Draw a plan's frames.

    Args:
        resident: the model in memory, with `motion` beside it.
        loras: what now acts on the model.
        check: raises when the work should stop; called between denoising steps, and between decoded frames.
        at_once: how many frames are decoded at once.
        timing: filled in with milliseconds.

    Raises:
        Problem: 422 where the adapter cannot make so many frames; what `check` raises.
    """
    asked = plan.animation
    assert asked is not None
    if asked.num_frames > motion.max_frames:
        raise invalid_field("num_frames", f"is more than {motion.id} sees at once", f"2 to {motion.max_frames}", asked.num_frames)
    if resident.entry.model.optimise.offload != "none" or resident.entry.model.optimise.device_map:
        raise invalid_field("model_id", f"{resident.entry.id} is offloaded or spread over devices, and cannot be animated so", "a model that is whole on the device", resident.entry.id)
    pipe = motion.pipeline
    # 1. The scheduler, on the noise that motion adapters were trained with; DDIM where none is named, as their authors.
    own = resident.scheduler
    trained = replace(resident, scheduler=type(own).from_config(own.config, beta_schedule=asked.beta_schedule))
    pipe.scheduler, named = denoise.make_scheduler(trained, plan.scheduler or "DDIM Uniform")
    # 2. The prompt's embeddings, and the frames' latents (1, channels, frames, height, width).
    began = time.perf_counter()
    embedded = prompts.embed(pipe, resident.entry.model.family, plan, remember=resident.remember)
    steps = denoise.Steps(check)
    steps.rows = asked.num_frames
    latents = pipe(
        **embedded.arguments,
        num_frames=asked.num_frames,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
        width=plan.width,
        height=plan.height,
        generator=torch.Generator("cpu").manual_seed(plan.seeds[0]),
        output_type="latent",
        callback_on_step_end=steps,
    ).frames
    # 3. The frames' pixels.
    frames = []
    for chunk in latents[0].permute(1, 0, 2, 3).split(at_once):
        check()
        with torch.no_grad():
            decoded = pipe.vae.decode(chunk / pipe.vae.config.scaling_factor).sample
        frames += [denoise.to_pixels(array) for array in (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()]
    timing.denoise, timing.decode = 1000 * (steps.last - began), 1000 * (time.perf_counter() - steps.last)
    ran = denoise.told(resident, plan, loras, [embedded], named, steps.run, frames[0], timing)
    ran = ran.model_copy(
        update={
            "animation": asked.model_copy(update={"sha256": motion.sha256}),
            "commercial_use": ran.commercial_use and asked.commercial_use,
            "credit": list(dict.fromkeys([*ran.credit, *([asked.credit] if asked.credit else [])])),
        }
    )
    return Generation(pictures=frames, seeds=plan.seeds, ran=ran)
