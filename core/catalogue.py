"""The models that can be asked for, and requests checked against them.

No torch: the entry process answers GET /capabilities and refuses what cannot run from here,
before anything is queued. runners.loading makes the pipelines.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from pathlib import PurePath

from core import guides, hires, inpainting, schedulers, trials
from core.families import FAMILIES, Entry
from core.loras import Lora, Registry, rights
from core.loras.registry import Kind
from core.model_settings import ControlNet, Family, IpAdapter, Model, Models, UniDiffuser
from core.plans import Inputs, Pixels, Plan, steps_run
from core.problems import FieldError, Problem, invalid, invalid_field, nearest
from core.requests import GenerationRequest
from core.settings import Settings, beside_configuration
from core.wording import Writer

_SEEDS = random.SystemRandom()
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def random_seed() -> int:
    return _SEEDS.randrange(2**32)


class Catalogue:
    """A runner's models, by id: of `settings.models`, or of `models` where those are others."""

    def __init__(self, settings: Settings, models: Models | None = None) -> None:
        self.settings, self.models = settings, models or settings.models
        self.queue = (models.queue if isinstance(models, UniDiffuser) else None) or settings.queue
        self.entries = {m.id: Entry(m, FAMILIES[m.family]) for m in self.models.catalogue}
        self.registry = Registry(beside_configuration(settings.loras.registry), beside_configuration(settings.loras.folder))
        self.writer = Writer(settings, self.registry, self.family_of, self._fitting)

    @property
    def generators(self) -> dict[str, Entry]:
        """The models that draw pictures."""
        return {id: entry for id, entry in self.entries.items() if not entry.traits.upscaler}

    @property
    def upscalers(self) -> dict[str, Entry]:
        """The models that enlarge them; see core.upscaling."""
        return {id: entry for id, entry in self.entries.items() if entry.traits.upscaler}

    def find(self, model_id: str | None) -> Entry:
        """The entry for an id, or the default one.

        Raises:
            Problem: 422 with the list of ids, where it is not listed and unlisted ones are not allowed.
        """
        name = model_id or self.models.default
        if entry := self.entries.get(name):
            return entry
        if self.models.allow_unlisted:
            return self._guess(name)
        known = list(self.generators)
        raise invalid_field("model_id", f"there is no model {name!r}{nearest(name, known)}", known, name)

    def called(self, name: str) -> Entry | None:
        """The model that others mean by a name: its id, the last part of it, or the name of its file; None where there is none."""
        if name in self.generators:
            return self.generators[name]
        named = {_plain(spelling): entry for entry in self.generators.values() for spelling in (entry.id, entry.id.rsplit("/", 1)[-1], PurePath(entry.model.source or entry.id).name)}
        return named.get(_plain(name))

    def _guess(self, name: str) -> Entry:
        """An unlisted hub id: its family by what such ids usually contain."""
        if not _HUB_ID.fullmatch(name):
            raise invalid_field("model_id", f"{name!r} is neither listed nor a hub id like 'owner/name'", list(self.entries), name)
        family: Family = "unidiffuser" if isinstance(self.models, UniDiffuser) else _guess_family(name)
        return Entry(Model(id=name, family=family, inpainting="inpaint" in name.lower()), FAMILIES[family], listed=False)

    def family_of(self, lora: Lora) -> Family:
        """The family that a LoRA was made for: its own word, its base model's, or a guess by the name."""
        if lora.family:
            return lora.family
        try:
            return rights.base_model(lora.base_model, self.settings).family
        except Problem:
            return _guess_family(lora.base_model)

    def fitting(self, kind: Kind, entry: Entry) -> list[str]:
        """The names of the LoRAs, or of the embeddings, that fit a model."""
        return [name for name, lora in self.registry.of_kind(kind).items() if self.family_of(lora) == entry.model.family]

    def guides(self, plan: Plan) -> list[ControlNet | IpAdapter]:
        """The entries of a plan's ControlNets and IP-Adapter."""
        known: dict[str, ControlNet | IpAdapter] = {net.id: net for net in self.models.controlnets} | {a.id: a for a in self.models.ip_adapters}
        return [known[part.id] for part in guides.parts(plan.controls, plan.ip_adapter)]

    def plan(self, request: GenerationRequest, inputs: Inputs | None, client: str) -> Plan:
        """Check `request` against its model and the limits, and fill in every default.

        Args:
            request: as the contract's translation made it.
            inputs: the pictures that came with it, already safe RGB; with an image it is img2img.
            client: who asks (a hash of the key), for fairness between keys.

        Raises:
            Problem: 422 that lists every field that cannot be honoured.
        """
        assigned = None
        if request.experiment is not None:
            request, assigned = trials.configured(self.settings).applied(request, client)
        elif request.subject is not None:
            raise invalid_field("subject", "only has a meaning with an experiment", "leave it out, or name an experiment", request.subject)
        entry, limits = self.find(request.model_id), self.settings.limits
        image = inputs.image if inputs else None
        errors: list[FieldError] = []
        notes: list[str] = []
        traits = entry.traits
        if traits.upscaler:
            raise invalid_field("model_id", f"{entry.id} is an upscaler: POST /upscale a picture to it", list(self.generators), entry.id)

        def refuse(field: str, message: str, allowed: str | list[str] | None, given: object) -> None:
            errors.append(FieldError(field=field, message=message, allowed=allowed, given=str(given)[:80]))

        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(request, name))) > limits.prompt_characters:
                refuse(name, "is too long", f"at most {limits.prompt_characters} characters", f"{length} characters")
        if request.clip_skip and not traits.clip_skip:
            refuse("clip_skip", f"{entry.id} ({entry.model.family}) has no CLIP layers to skip", "0", request.clip_skip)
        if request.count_returned > limits.count_returned:
            refuse("count_returned", "is too large", f"1 to {limits.count_returned}", request.count_returned)
        steps = request.num_inference_steps or entry.steps
        if steps > limits.num_inference_steps:
            refuse("num_inference_steps", "is too large", f"1 to {limits.num_inference_steps}", steps)
        strength = None
        if image is not None:
            strength = 0.75 if request.strength is None else request.strength
            if steps_run(steps, strength, traits.flow) < 1:
                refuse("strength", f"{strength:g} of {steps} steps leaves none to run", f"at least {1 / steps:.3g}, or more steps", strength)
        elif request.strength is not None:
            refuse("strength", "only has a meaning with an input image", "leave it out, or send image", request.strength)
        inpaint = inpainting.plan(request, inputs, entry, limits, lambda size: self._shaped(entry, *size), refuse, notes)
        shaped = image or (inputs.control_image[0] if inputs and inputs.control_image else None)
        width, height = inpaint[1] if inpaint else self._size(entry, request, shaped)
        for name, value in (("width", width), ("height", height)):
            if value % traits.multiple or not entry.min_size <= value <= entry.max_size:
                sizes = str(entry.size) if traits.multimodal else f"{entry.min_size} to {entry.max_size}, a multiple of {traits.multiple}"
                refuse(name, f"does not fit {entry.id}", sizes, value)
        scheduler = schedulers.find(request.scheduler, traits.flow, image is not None, traits.multimodal).name if request.scheduler else None
        second, told = hires.plan(request, (width, height), steps, traits.multiple, entry.max_size, limits.num_inference_steps, self._for_hires(), refuse)
        notes += told
        if request.hr_scale is not None and traits.multimodal:
            refuse("hr_scale", f"{entry.id} ({entry.model.family}) makes pictures of one size", "leave it out", request.hr_scale)
        elif request.hr_scale is not None and image is not None:
            refuse("hr_scale", "is for pictures from a prompt alone; img2img at a larger size does the same", "leave it out, or send no image", request.hr_scale)
        elif second and scheduler and traits.flow:
            schedulers.find(scheduler, traits.flow, image_to_image=True)
        first = request.seed if request.seed is not None and request.seed >= 0 else random_seed()
        seeds = [first + i for i in range(min(request.count_returned, limits.count_returned))]
        worded = self.writer.write(request, entry.model.family, seeds, errors, notes)
        if worded.negative_prompt and not traits.negative_prompt:
            field = "negative_prompt" if request.negative_prompt else "styles"
            refuse(field, f"{entry.id} ({entry.model.family}) takes no negative prompt", "leave it out", worded.negative_prompt)
        if worded.loras and entry.model.optimise.by_layer:
            refuse("lora", f"{entry.id} is offloaded layer by layer (offload: {entry.model.optimise.offload}), to which a LoRA cannot be added", "no LoRA, or another model", request.lora or request.prompt)
        guided = guides.plan(request, inputs, entry.id, entry.model.family, self.models, refuse)
        if guided.ip_adapter and entry.model.optimise.by_layer:
            refuse("ip_adapter", f"{entry.id} is offloaded layer by layer (offload: {entry.model.optimise.offload}), to which none can be added", "leave it out, or another model", request.ip_adapter)
        if request.commercial:
            allowing = {f"{entry.id} ({entry.model.licence})": entry.model.commercial_use}
            allowing |= {f"the LoRA {x.name}": x.commercial_use for x in worded.loras} | {f"the embedding {x.name}": x.commercial_use for x in worded.embeddings}
            allowing |= {x.id: x.commercial_use for x in guided.parts}
            for part in (p for p, allowed in allowing.items() if not allowed):
                refuse("commercial", f"{part} does not allow commercial use", "false, or another model, LoRA, embedding, ControlNet or IP-Adapter", True)
        if errors:
            raise invalid(errors)

        if not entry.listed:
            notes.append(f"the licence of {entry.id} is not known here, so that commercial use counts as not allowed")
        guidance = entry.guidance if request.guidance_scale is None else request.guidance_scale
        if worded.negative_prompt and guidance <= 1:
            notes.append("negative_prompt has no effect at a guidance_scale of 1 or less")
        if image is not None and not inpaint and request.width is None and request.height is None and (width, height) != (image.width, image.height):
            notes.append(f"the input image was resized from {image.width}x{image.height} to {width}x{height}")
        return Plan(
            id=uuid.uuid4().hex,
            client=client,
            experiment=assigned,
            model_id=entry.id,
            prompt=worded.prompt,
            negative_prompt=worded.negative_prompt,
            expansion=worded.expansion,
            torch_dtype=request.torch_dtype or entry.model.torch_dtype,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            seeds=seeds,
            scheduler=scheduler,
            strength=strength,
            clip_skip=request.clip_skip,
            loras=worded.loras,
            embeddings=worded.embeddings,
            commercial=request.commercial,
            image=image,
            mask=inputs.mask if inputs else None,
            inpainting=inpaint[0] if inpaint else None,
            flow=traits.flow,
            hires=second,
            controls=guided.controls,
            control_images=guided.control_images,
            ip_adapter=guided.ip_adapter,
            ip_adapter_images=guided.ip_adapter_images,
            deadline_s=min(request.deadline_s or self.queue.deadline_s, self.queue.deadline_s),
            notes=notes,
        )

    def _fitting(self, family: Family) -> list[str]:
        return [entry.id for entry in self.entries.values() if entry.model.family == family]

    def _for_hires(self) -> list[str]:
        """The upscalers of a second pass; those with a prompt of their own are no part of one."""
        return [id for id, entry in self.upscalers.items() if entry.model.family == "upscaler"]

    def _size(self, entry: Entry, request: GenerationRequest, image: Pixels | None) -> tuple[int, int]:
        """Width and height: as asked; else the input or control image's shape at the model's usual area."""
        if image is None or request.width is not None or request.height is not None:
            return request.width or entry.size, request.height or entry.size
        return self._shaped(entry, image.width, image.height)

    def _shaped(self, entry: Entry, width: int, height: int) -> tuple[int, int]:
        """The size that has a picture's shape and the model's usual area."""
        step = entry.traits.multiple
        shape = math.sqrt(width / height)

        def side(length: float) -> int:
            rounded = max(round(length / step), math.ceil(entry.traits.min_size / step)) * step
            return min(rounded, entry.max_size // step * step)

        return side(entry.size * shape), side(entry.size / shape)


def _plain(name: str) -> str:
    """A model's name without case, blanks and the like; A1111 writes a hash in brackets behind it."""
    return re.sub(r"\W|_", "", re.sub(r"\.safetensors|\[[0-9a-f]+\]$", "", name.lower()))


def _guess_family(name: str) -> Family:
    """The family of a model by what hub ids usually contain."""
    text = name.lower()
    return "flux" if "flux" in text else "sdxl" if "xl" in text else "sd2" if "-2" in text else "sd15"
