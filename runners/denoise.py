"""Plans on one resident pipeline: embed, denoise step by step, decode, and tell what ran.

This is the main path's middle: everything here happens in the device's thread. runners.batch calls it for each plan
in a run of its own, which shares the denoiser's passes with others; where that cannot be, plans that come together are
alike (`Plan.batch_key`), and their pictures are one batch from the first step to the last.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from core import __version__, schedulers
from core.generation import AppliedEmbedding, AppliedLora, Generation, Ran, Timing
from core.images import to_pil
from core.model_settings import Family
from core.plans import Pixels, Plan, PlannedEmbedding, PlannedLora
from core.problems import Problem, invalid_field, problem
from core.schedulers import Scheduler
from runners import hires, inpainting, prompts
from runners.guides import Guided
from runners.inpainting import Painting
from runners.loading import Kind
from runners.prompts import Embedded
from runners.residency import Resident

Check = Callable[..., None]  # `check(stepped=rows, latents=...)` after a denoising step of so many pictures


class Steps:
    """A pipeline's callback: counts the denoising steps that were run, knows when the last one ended
    (of `time.perf_counter`), and checks whether to go on. `rows`: how many pictures they are of."""

    def __init__(self, check: Check) -> None:
        self._check, self.run, self.last, self.rows = check, 0, time.perf_counter(), 1

    def __call__(self, *told: Any) -> Any:
        self.run += 1
        self.last = time.perf_counter()
        tensors = told[-1]  # which a callback may exchange
        self._check(stepped=self.rows, latents=tensors.get("latents") if isinstance(tensors, dict) else None)
        return tensors


def generate(
    resident: Resident, plans: list[Plan], loras: list[AppliedLora], guided: Guided, check: Check, max_batch: int, timings: list[Timing], upscaler: Resident | None = None
) -> list[Generation]:
    """Draw the pictures of plans with one `batch_key`; each gets a generation of its own.

    Args:
        resident: the model in memory.
        plans: what to draw; picture i of a plan uses a CPU generator seeded with `plan.seeds[i]`, so
            that it comes out the same alone, in a batch and on another device.
        loras: what now acts on the model (the text encoders too, so prompts are embedded under it).
        guided: the ControlNets and the IP-Adapter that act on it.
        check: raises when the work should stop; called between denoising steps.
        max_batch: how many pictures are denoised at once.
        timings: each plan's, filled in with the milliseconds of the batches that it was part of.
        upscaler: the network in memory that enlarges pictures for a second pass, where the plans name one.

    Raises:
        Problem: what `check` raises.
    """
    family = resident.entry.model.family
    pipe = resident.pipeline(_kind(plans[0]), guided.nets)
    # 1. A scheduler of this batch's own: schedulers keep state, and sharing one mixes requests up.
    pipe.scheduler, named = make_scheduler(resident, plans[0].scheduler)
    # 2. Each prompt to embeddings, once for all the pictures that share it.
    began = time.perf_counter()
    failed: dict[int, Problem] = {}
    embedded: dict[int, list[Embedded]] = {}
    for i, plan in enumerate(plans):
        try:
            embedded[i] = _embedded(pipe, resident, plan)
        except Problem as problem:
            failed[i] = problem
    inputs = [_input(plan) for plan in plans]
    guides = [guided.prepare(plan) for plan in plans]
    steps = Steps(check)
    # 3. Denoise and decode, in batches that fit.
    pictures: list[list[Pixels]] = [[] for _ in plans]
    for batch in _batches(embedded, max_batch):
        check()
        steps.run, steps.rows = 0, len(batch)
        generators = [torch.Generator("cpu").manual_seed(plans[i].seeds[k]) for i, k in batch]
        _seed(pipe, generators)
        stacked, second = _stacked([embedded[i][k].arguments for i, k in batch]), plans[0].hires
        given, guiding = _arguments(pipe, plans[0], [inputs[i] for i, _ in batch], generators, family), [guides[i] for i, _ in batch]
        arrays = pipe(
            **stacked,
            **guided.arguments(pipe, given, guiding, generators, plans[0].guidance_scale),
            generator=generators,
            output_type="latent" if second and second.upscaler == "latent" else "np",
            callback_on_step_end=steps,
        ).images
        if second:
            arrays = hires.redraw(resident, plans[0], make_scheduler(resident, plans[0].scheduler)[0], arrays, upscaler, stacked, guided, guiding, [plans[i].seeds[k] for i, k in batch], steps, check)
        for (i, _), array in zip(batch, arrays, strict=True):
            try:
                pictures[i].append(_finished(inputs[i], to_pixels(array)))
            except Problem as problem:
                failed[i] = problem
        decoded = time.perf_counter()
        for i in {i for i, _ in batch}:
            timings[i].denoise += 1000 * (steps.last - began)
            timings[i].decode += 1000 * (decoded - steps.last)
        began = decoded
    # 4. What ran, for headers and metadata.
    return [
        Generation(problem=failed[i].details)
        if i in failed
        else Generation(pictures=pictures[i], seeds=plan.seeds, ran=told(resident, plan, loras, embedded[i], named, steps.run, pictures[i][0], timings[i], guided))
        for i, plan in enumerate(plans)
    ]


def _seed(pipe: Any, generators: list[torch.Generator]) -> None:
    """Let the scheduler's noise come from the pictures' generators where the pipeline (Flux's) does not see to it."""
    step = type(pipe.scheduler).step
    if not hasattr(pipe, "prepare_extra_step_kwargs") and "generator" in inspect.signature(step).parameters:
        pipe.scheduler.step = partial(step, pipe.scheduler, generator=generators)


def _embedded(pipe: Any, resident: Resident, plan: Plan) -> list[Embedded]:
    """The prompts of each picture of a plan."""
    made: dict[tuple[str, str], Embedded] = {}
    for picture in range(len(plan.seeds)):
        words = plan.words(picture)
        if words not in made:
            made[words] = prompts.embed(pipe, resident.entry.model.family, plan, picture, resident.remember)
    return [made[plan.words(picture)] for picture in range(len(plan.seeds))]


def _batches(embedded: dict[int, list[Embedded]], max_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Plan and place in it of every picture, at most `max_batch` at once. Prompts of different length do not
    share a batch: one that is padded to the other's length is not what it is alone."""
    rows = [(i, k) for i, each in embedded.items() for k in range(len(each))]
    for _, alike in itertools.groupby(rows, key=lambda row: [t.shape for t in embedded[row[0]][row[1]].arguments.values()]):
        remaining = list(alike)
        for start in range(0, len(remaining), max_batch):
            yield remaining[start : start + max_batch]


def _stacked(arguments: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows' prompt arguments, each (1, ...), as one (N, ...)."""
    return {name: torch.cat([row[name] for row in arguments]) for name in arguments[0]}


def told(
    resident: Resident, plan: Plan, loras: list[AppliedLora], embedded: list[Embedded], named: Scheduler, steps_run: int, picture: Pixels, timing: Timing, guided: Guided | None = None
) -> Ran:
    """What ran."""
    model = resident.entry.model
    by_name = {one.name: one for each in embedded for one in each.used}
    used = [by_name[planned.name] for planned in plan.embeddings]
    guided = guided or Guided()
    parts = [*loras, *used, *guided.parts]
    return Ran(
        model_id=resident.entry.id,
        model_sha256=resident.sha256,
        family=model.family,
        scheduler=named.sampler,
        schedule=named.schedule,
        own_scheduler=plan.scheduler is None,
        torch_dtype=str(resident.dtype).removeprefix("torch."),
        device=resident.device,
        num_inference_steps=plan.num_inference_steps,
        steps_run=steps_run,
        guidance_scale=plan.guidance_scale,
        width=picture.width,
        height=picture.height,
        clip_skip=plan.clip_skip,
        loras=loras,
        embeddings=used,
        controls=guided.controls,
        ip_adapter=guided.prompt,
        strength=plan.strength,
        inpainting=plan.inpainting,
        hires=plan.hires,
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        expansion=plan.expansion,
        prompt_tokens=max(each.tokens for each in embedded),
        prompt_tokens_cut=max(each.cut for each in embedded),
        licence=model.licence,
        commercial_use=model.commercial_use and all(part.commercial_use for part in parts),
        credit=list(dict.fromkeys(filter(None, [model.credit, *(part.credit for part in parts)]))),
        notes=[*plan.notes, *dict.fromkeys(note for each in embedded for note in each.notes), *_told(plan.loras, loras), *_told(plan.embeddings, used)],
        libraries=libraries(),
        timing=timing,
    )


def _told(planned: Sequence[PlannedLora | PlannedEmbedding], applied: Sequence[AppliedLora | AppliedEmbedding]) -> list[str]:
    """What is to be known of the LoRAs and embeddings beyond their layers and vectors."""
    notes = []
    for before, part in zip(planned, applied, strict=True):
        if isinstance(part, AppliedLora) and part.unmatched:
            notes.append(f"{part.unmatched} of the layers of {part.name} are not in this model")
        if before.sha256 and before.sha256.lower() != part.sha256:
            notes.append(f"the file of {part.name} is not the one that was registered (another SHA-256); its rights may differ")
    return notes


def _kind(plan: Plan) -> Kind:
    """Which of the model's pipelines does a plan."""
    return "txt2img" if plan.image is None else "inpaint" if plan.inpainting else "img2img"


def _input(plan: Plan) -> Image.Image | Painting | None:
    if plan.inpainting:
        return inpainting.prepare(plan)
    return None if plan.image is None else to_pil(plan.image).resize((plan.width, plan.height), Image.Resampling.LANCZOS)


def _finished(given: Image.Image | Painting | None, drawn: Pixels) -> Pixels:
    return inpainting.finish(given, drawn) if isinstance(given, Painting) else drawn


def _arguments(
    pipe: DiffusionPipeline, plan: Plan, inputs: list[Image.Image | Painting | None], generators: list[torch.Generator], family: Family
) -> dict[str, Any]:
    """The pipeline's arguments that the batch has in common, and its input pictures."""
    common: dict[str, Any] = {"num_inference_steps": plan.num_inference_steps, "guidance_scale": plan.guidance_scale}
    size = {"width": plan.width, "height": plan.height}
    if plan.image is None:
        return common | size
    if plan.inpainting:
        return common | {"strength": plan.strength} | inpainting.arguments(pipe, [p for p in inputs if isinstance(p, Painting)], generators)
    return common | (size if family == "flux" else {}) | {"image": inputs, "strength": plan.strength}  # the others take the picture's size


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
