"""What a picture says of itself: A1111's `parameters` text, and a JSON record.

The text follows A1111's infotext (core.infotext), so that its users' tools (and PNG Info) read it; the JSON
record beside it has everything, for core.replay.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from core import embeddings, infotext
from core.generation import Generation, Ran, Timing
from core.guides import Control
from core.inpainting import SIDES, Inpainting
from core.plans import Animation, Hires


class Record(Ran):
    """The JSON record of a picture: what ran, and its seed."""

    seed: int
    timing: Timing = Timing()


def of_picture(ran: Ran, picture: int) -> Ran:
    """What ran for one picture of a request, counted from 0: with dynamic prompts its own prompt, and the
    embeddings that stand in it."""
    if ran.expansion is None:
        return ran
    own = ran.expansion.model_copy(update={"prompts": ran.expansion.prompts[picture : picture + 1], "negative_prompts": ran.expansion.negative_prompts[picture : picture + 1]})
    named = embeddings.named("\n".join([*own.prompts, *own.negative_prompts]), [one.name for one in ran.embeddings])
    return ran.model_copy(update={
        "prompt": own.prompts[0], "negative_prompt": own.negative_prompts[0], "expansion": own, "embeddings": [one for one in ran.embeddings if one.name in named],
    })  # fmt: skip


def parameters(ran: Ran, seed: int) -> str:
    """A1111's infotext: the prompt with a tag for each LoRA, `Negative prompt: ...`, and a line of
    settings. `Lora hashes` are AutoV2, the first ten digits of the file's SHA-256; `TI hashes`,
    of embeddings, the first twelve, as A1111 has them. `Template` is what its dynamic prompts were made of."""
    strength = ran.hires.strength if ran.hires else ran.strength
    hashes = ", ".join(f"{lora.name}: {lora.sha256[:10]}" for lora in ran.loras)
    if ran.upscale and not ran.num_inference_steps:
        return infotext.line(_upscaled(ran))
    settings: dict[str, object] = {
        "Steps": ran.num_inference_steps,
        "Sampler": ran.scheduler,
        "Schedule type": ran.schedule,
        "CFG scale": f"{ran.guidance_scale:g}",
        "Seed": seed,
        "Size": "{}x{}".format(*(ran.hires.first if ran.hires else (ran.width, ran.height))),
        "Model hash": ran.model_sha256[:10],
        "Model": ran.model_id,
        "Clip skip": ran.clip_skip + 1 if ran.clip_skip else None,
        "Denoising strength": None if strength is None else f"{strength:g}",
        **(_inpainting(ran.inpainting) if ran.inpainting else {}),
        **(_hires(ran.hires) if ran.hires else {}),
        **(_animation(ran.animation) if ran.animation else {}),
        **{f"ControlNet {i}": _control(control) for i, control in enumerate(ran.controls)},
        "IP-Adapter": f"{ran.ip_adapter.id}:{ran.ip_adapter.scale:g}" if ran.ip_adapter else None,
        "Lora hashes": hashes or None,
        "TI hashes": ", ".join(f"{x.name}: {x.sha256[:12]}" for x in ran.embeddings) or None,
        "Template": ran.expansion and ran.expansion.template,
        "Negative Template": (ran.expansion and ran.expansion.negative_template) or None,
        **(_upscaled(ran) if ran.upscale else {}),
        "Version": f"easel {ran.libraries['easel']}",
    }
    tagged = " ".join([ran.prompt, *(f"<lora:{lora.name}:{lora.weight:g}>" for lora in ran.loras)]).strip()
    return infotext.write(tagged, ran.negative_prompt, settings)


def _animation(animation: Animation) -> dict[str, object]:
    hash = animation.sha256[:10] if animation.sha256 else None
    return {"Frames": animation.num_frames, "FPS": f"{animation.fps:g}", "Motion adapter": animation.motion_adapter, "Motion adapter hash": hash}


def _inpainting(inpainting: Inpainting) -> dict[str, object]:
    """A1111's names for what was repainted; it writes none for sides that were grown."""
    sides = {name.replace("_", " ").capitalize(): pixels for name, pixels in zip(SIDES, inpainting.sides, strict=True) if pixels}
    return {
        "Mask blur": inpainting.mask_blur or None,
        "Mask mode": "Inpaint not masked" if inpainting.invert else None,
        "Masked content": None if inpainting.fill == "original" else inpainting.fill,
        "Inpaint area": "Only masked" if inpainting.full_res else None,
        "Masked area padding": inpainting.padding,
        **sides,
    }


def _hires(hires: Hires) -> dict[str, object]:
    upscaler = hires.upscaler if hires.model_id else hires.upscaler.title()
    return {"Hires upscale": f"{hires.scale:g}", "Hires steps": hires.steps, "Hires upscaler": upscaler}


def _upscaled(ran: Ran) -> dict[str, object]:
    """As A1111's "extras" write it; all there is of a network, which has no steps."""
    assert ran.upscale is not None
    return {
        "Postprocess upscale by": f"{ran.width / ran.upscale.first[0]:.4g}",
        "Postprocess upscaler": ran.model_id,
        "Postprocess upscale to": f"{ran.width}x{ran.height}",
        "Noise level": ran.upscale.noise_level,
    }


def _control(control: Control) -> str:
    """As A1111's ControlNet extension writes a unit."""
    return f"Module: {control.preprocessor}, Model: {control.id}, Weight: {control.scale:g}, Guidance Start: {control.start:g}, Guidance End: {control.end:g}"


def record(ran: Ran, seed: int) -> dict[str, object]:
    """Everything that ran, as plain JSON. The time it took is no part of it: the same request
    gives the same bytes."""
    return {**ran.model_dump(exclude={"timing"}), "seed": seed}


def read_record(text: str) -> Record | None:
    """The record that a picture's text holds; None where it is none, or another version's that says less."""
    try:
        return Record.model_validate_json(text)
    except ValidationError:
        return None


def texts(generation: Generation, index: int) -> dict[str, str]:
    """The text chunks of picture `index`."""
    if generation.ran is None:
        return {}
    seed, ran = generation.seeds[index], of_picture(generation.ran, index)
    return {
        "parameters": parameters(ran, seed),
        "easel": json.dumps(record(ran, seed), ensure_ascii=False, separators=(",", ":")),
    }
