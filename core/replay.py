"""From a picture back to the request that made it: of Easel's own by their JSON record, of A1111's by their infotext.

What a picture does not say, or this server does not have, is told in notes rather than guessed at. api.replay asks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from pydantic import ValidationError

from core import infotext, metadata
from core.catalogue import Catalogue
from core.images import Description
from core.inpainting import SIDES
from core.metadata import Record
from core.problems import FieldError, Problem, from_validation, invalid_field, shown
from core.requests import GenerationRequest

Source = Literal["easel", "a1111"]
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
_SCHEDULED = re.compile(r"\[([^\[\]]*):[\d.]+\]")  # with a colon within; the text is anyone's, and as long as they like
_JOINED = re.compile(r"\b(?:AND|BREAK)\b")
_NUMBER = re.compile(r"\d{1,5}")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# Of an infotext: what says nothing of how the picture came about, or is known from elsewhere.
_INCIDENTAL = {"Model hash", "Lora hashes", "TI hashes", "Hashes", "VAE hash", "Version", "User", "Batch size", "Batch pos", "Init image hash", "RNG", "Template", "Negative Template"}
_PLAIN = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Hires upscale": "hr_scale", "Hires steps": "hr_steps"}
_MASK = {"Mask blur": "mask_blur", "Masked content": "inpainting_fill", "Masked area padding": "inpaint_full_res_padding"}
_NOISE = "A1111 draws its noise in another way, so that this is its request, and the picture a similar one"
_TEXT_ALONE = "read from the text alone, which does not say the precision, nor whether the scheduler was the model's own"


@dataclass
class Replay:
    """The parameters of POST /post_config that made a picture, without those at their defaults.

    `needs` are the files that it was made from, which a picture does not hold. `unmet` is what of it cannot be honoured here, and
    `notes` what else is to be known.
    """

    source: Source
    request: dict[str, Any] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model_sha256: str | None = None

    @property
    def told(self) -> list[str]:
        """All that is to be known, the gravest first."""
        files = [f"it was made from files that it does not hold; send them along: {', '.join(self.needs)}"] if self.needs else []
        return [*files, *self.unmet, *self.notes]


def read(picture: Description, catalogue: Catalogue) -> Replay:
    """What made a picture.

    Raises:
        Problem: 422 where the picture does not say, or no request to /post_config made it.
    """
    record, text = metadata.read_record(picture.texts.get("easel", "")), picture.texts.get("parameters", "")
    if record is None and not text.strip():
        message = "holds no settings: neither Easel's record nor A1111's parameters"
        raise invalid_field("image", message, "a picture as it was answered or saved, with its metadata (a PNG, or a JPEG or WebP with EXIF)")
    replay = _of_record(record, catalogue) if record else _of_infotext(text, catalogue)
    if "hr_scale" not in replay.request and not replay.needs:
        size = replay.request.get("width"), replay.request.get("height")
        if None not in size and size != (picture.width, picture.height):
            replay.notes.append(f"the file is {picture.width}x{picture.height}, and its settings tell of a picture of {size[0]}x{size[1]}: it was edited, or holds several")
    if picture.format in ("JPEG", "WEBP"):
        replay.request["format"] = picture.format.lower()
    _keep_what_can_be(replay, catalogue)
    return replay


# 1. Easel's own record.


def _of_record(record: Record, catalogue: Catalogue) -> Replay:
    _drawn_by_post_config(record.family == "unidiffuser", record.upscale is not None, record.animation is not None)
    replay = Replay("easel", model_sha256=record.model_sha256)
    hires, inpainting, size = record.hires, record.inpainting, record.hires.first if record.hires else (record.width, record.height)
    _model(replay, record.model_id, catalogue)
    _loras(replay, record.prompt, {lora.name: lora.weight for lora in record.loras}, catalogue)
    for lora in record.loras:
        known = catalogue.registry.of_kind("lora").get(lora.name)
        if known and known.sha256 and known.sha256.lower() != lora.sha256:
            replay.unmet.append(f"the LoRA {lora.name} is another file here (another SHA-256)")
    controls, adapter = record.controls, record.ip_adapter
    _put(
        replay,
        negative_prompt=record.negative_prompt or None,
        torch_dtype=record.torch_dtype,
        num_inference_steps=record.num_inference_steps,
        guidance_scale=record.guidance_scale,
        width=None if inpainting else size[0],
        height=None if inpainting else size[1],
        seed=record.seed,
        scheduler=None if record.own_scheduler else " ".join(filter(None, [record.scheduler, record.schedule])),
        strength=record.strength,
        clip_skip=record.clip_skip or None,
    )
    if hires:
        _put(replay, hr_scale=hires.scale, hr_upscaler=hires.upscaler, hr_steps=hires.steps, hr_strength=hires.strength)
    if inpainting:
        masked = not any(inpainting.sides)
        _put(replay, mask_blur=inpainting.mask_blur, inpainting_fill=inpainting.fill, inpainting_mask_invert=inpainting.invert or None)
        _put(replay, inpaint_full_res=inpainting.full_res or None, inpaint_full_res_padding=inpainting.padding)
        _put(replay, **{name: pixels or None for name, pixels in zip(SIDES, inpainting.sides, strict=True)})
        replay.needs += ["image", "mask"] if masked else ["image"]
    elif record.strength is not None:
        replay.needs.append("image")
    if controls:
        _put(replay, controlnet=[c.id for c in controls], preprocessor=[c.preprocessor for c in controls], controlnet_conditioning_scale=[c.scale for c in controls])
        _put(replay, control_guidance_start=[c.start for c in controls], control_guidance_end=[c.end for c in controls])
        replay.needs.append("control_image")
    if adapter:
        _put(replay, ip_adapter=adapter.id, ip_adapter_scale=adapter.scale)
        replay.needs.append("ip_adapter_image")
    if record.flagged and record.seed in record.flagged:
        replay.notes.append("the safety checker replaced this picture")
    if record.degraded:
        replay.notes.append(f"it was drawn with less memory than usual ({record.degraded})")
    return replay


def _drawn_by_post_config(unidiffuser: bool, upscaled: bool, animated: bool) -> None:
    """Raises:
    Problem: 422 for a picture of another route.
    """
    for there, what in ((unidiffuser, "UniDiffuser drew it: see POST /prompt2img"), (upscaled, "it is another picture made larger: see POST /upscale"), (animated, "it is an animation: see POST /animate")):
        if there:
            raise invalid_field("image", f"was not made by a request to /post_config; {what}", "a picture by /post_config, /txt2img and the like, or by A1111")


# 2. An infotext.


def _of_infotext(text: str, catalogue: Catalogue) -> Replay:
    said = infotext.parse(text)
    left = dict(said.settings)
    own = left.get("Version", "").startswith("easel ")
    _drawn_by_post_config(False, "Postprocess upscaler" in left, "Motion adapter" in left)
    replay = Replay("easel" if own else "a1111", notes=[_TEXT_ALONE if own else _NOISE])
    if "Model" in left:
        _model(replay, left.pop("Model"), catalogue)
    prompt, loras = _tags(replay, said.prompt)
    _loras(replay, prompt, loras, catalogue)
    words = f"{prompt}\n{said.negative_prompt}"
    if not own and (_JOINED.search(words) or any(":" in scheduled[1] for scheduled in _SCHEDULED.finditer(words))):
        replay.unmet.append("[from:to:when], AND and BREAK in a prompt are plain text here")
    _put(replay, negative_prompt=said.negative_prompt or None)
    if size := _SIZE.fullmatch(left.pop("Size", "")):
        _put(replay, width=int(size[1]), height=int(size[2]))
    if sampler := left.pop("Sampler", None):
        _put(replay, scheduler=f"{sampler} {left.pop('Schedule type', '')}".strip())
    if (skip := left.pop("Clip skip", "1")) not in ("0", "1"):
        _put(replay, clip_skip=int(skip) - 1 if _NUMBER.fullmatch(skip) else skip)
    _hires(replay, left)
    _input(replay, left)
    _put(replay, **{name: left.pop(key) for key, name in _PLAIN.items() if key in left})
    for key in [key for key in left if key.startswith(("ControlNet", "IP-Adapter"))]:
        replay.unmet.append(f"{key} ({shown(left.pop(key))}) is not read from a text")
    replay.unmet += [f"{key} ({shown(value)}) has no counterpart here" for key, value in left.items() if key not in _INCIDENTAL]
    return replay


def _tags(replay: Replay, prompt: str) -> tuple[str, dict[str, str]]:
    """The prompt without its tags, and the LoRAs that they name, with their weights."""
    loras: dict[str, str] = {}
    for match in _TAG.finditer(prompt):
        name, *weights = (part.strip() for part in match[2].split(":"))
        if match[1] == "hypernet":
            replay.unmet.append(f"there are no hypernetworks here ({shown(match[0])})")
        elif name in loras:
            replay.unmet.append(f"the LoRA {shown(name)} is named more than once; the first counts")
        else:
            loras[name] = weights[0] if weights else "1"
            if len(set(weights)) > 1:
                replay.unmet.append(f"of {shown(match[0])} only the first weight counts here")
    return _TAG.sub("", prompt).strip(), loras


def _hires(replay: Replay, left: dict[str, str]) -> None:
    """A1111's names for the second pass. Its strength has the name of img2img's."""
    if not {"Hires upscale", "Hires resize", "Hires upscaler"} & left.keys():
        return
    upscaler, strength = left.pop("Hires upscaler", "Latent"), left.pop("Denoising strength", None)
    if upscaler.startswith("Latent (") and upscaler != "Latent (nearest)":
        replay.unmet.append(f"Hires upscaler ({upscaler}) is Latent here")
    _put(replay, hr_upscaler=upscaler.lower() if upscaler == "Lanczos" else "latent" if upscaler.startswith("Latent") else upscaler, hr_strength=strength)
    if left.get("Hires steps") == "0":
        del left["Hires steps"]
    wanted = _SIZE.fullmatch(left.pop("Hires resize", ""))
    if wanted and "Hires upscale" not in left and "width" in replay.request:
        scale = int(wanted[1]) / max(1, replay.request["width"])
        left["Hires upscale"] = f"{scale:g}"
        if round(replay.request["height"] * scale) != int(wanted[2]):
            replay.unmet.append(f"Hires resize ({wanted[0]}) changes the picture's shape, which is kept here")


def _input(replay: Replay, left: dict[str, str]) -> None:
    """What says that there was an input picture, and a mask."""
    _put(replay, strength=left.pop("Denoising strength", None))
    _put(replay, **{name: left.pop(key) for key, name in _MASK.items() if key in left})
    _put(replay, inpainting_mask_invert=left.pop("Mask mode", "") == "Inpaint not masked" or None, inpaint_full_res=left.pop("Inpaint area", "") == "Only masked" or None)
    for name in SIDES:
        _put(replay, **{name: left.pop(name.replace("_", " ").capitalize(), None)})
    if "inpaint_full_res" not in replay.request:
        replay.request.pop("inpaint_full_res_padding", None)
    masked = {*_MASK.values(), "inpainting_mask_invert", "inpaint_full_res"} & replay.request.keys()
    if masked or any(side in replay.request for side in SIDES):
        for name in ("width", "height"):  # those of the input
            replay.request.pop(name, None)
    if "strength" in replay.request:
        replay.needs += ["image", "mask"] if masked and not any(side in replay.request for side in SIDES) else ["image"]


# 3. What both share.


def _put(replay: Replay, **values: object) -> None:
    replay.request |= {name: value for name, value in values.items() if value is not None}


def _model(replay: Replay, name: str, catalogue: Catalogue) -> None:
    try:
        replay.request["model_id"] = (catalogue.called(name) or catalogue.find(name)).id  # `find` guesses, where unlisted ones are allowed
    except Problem:
        replay.unmet.append(f"there is no model {shown(name)} here; without model_id it is {catalogue.models.default}")


def _loras(replay: Replay, prompt: str, weights: dict[str, float] | dict[str, str], catalogue: Catalogue) -> None:
    """The prompt, and the LoRAs of these names or file names as the parameter `lora`; as tags where the prompt is nothing else."""
    known = catalogue.registry.of_kind("lora")
    files = {PurePath(lora.file_name).stem: name for name, lora in known.items() if lora.file_name}
    found: dict[str, str] = {}
    for name, weight in weights.items():
        if here := name if name in known else files.get(name):
            found.setdefault(here, f"{here}:{weight}")
        else:
            replay.unmet.append(f"there is no LoRA {shown(name)} here")
    if prompt:
        _put(replay, prompt=prompt, lora=",".join(found.values()) or None)
    else:
        replay.request["prompt"] = "".join(f"<lora:{each}>" for each in found.values())


def _keep_what_can_be(replay: Replay, catalogue: Catalogue) -> None:
    """Take out of the request what would be refused, and say so.

    Raises:
        Problem: 422 where the prompt would be.
    """
    aside = {"strength", *_MASK.values(), "inpainting_mask_invert", "inpaint_full_res", *SIDES}  # these need a file to be judged with
    guides = {name for name in GenerationRequest.model_fields if name.startswith(("control", "preprocessor", "ip_adapter"))}
    while True:
        try:
            wanted = GenerationRequest.model_validate(replay.request)
            replay.request = {name: getattr(wanted, name) for name in replay.request}  # numbers, where they were text
            catalogue.plan(wanted.model_copy(update={name: GenerationRequest.model_fields[name].default for name in aside | guides}), None, "replay")
            return
        except ValidationError as error:
            found = from_validation(error, GenerationRequest.model_fields).details.errors
        except Problem as problem:
            found = problem.details.errors
            if not found:  # weights that are not there
                replay.unmet.append(problem.details.detail)
                return
        if not _drop(replay, found):
            raise invalid_field("image", f"its settings cannot be read: {'; '.join(f'{e.field}: {e.message}' for e in found)}")


def _drop(replay: Replay, errors: list[FieldError]) -> bool:
    """Leave the fields of these errors out; False where there is one that must stay."""
    names = {error.field.split(".")[0] for error in errors}
    if not names <= replay.request.keys() - {"prompt"}:
        return False
    replay.unmet += [f"{error.field} ({shown(replay.request[error.field.split('.')[0]])}) {error.message}" for error in errors]
    for name in names:
        del replay.request[name]
    return True
