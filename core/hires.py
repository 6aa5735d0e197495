"""Hires-fix: a picture drawn at its model's usual size, enlarged, and drawn over with img2img.

core.catalogue plans it from a request's `hr_` parameters, which are A1111's; runners.hires does it.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from core.plans import Hires, steps_run
from core.problems import Refuse, nearest
from core.requests import GenerationRequest

BUILT_IN = ("latent", "lanczos")
LARGEST = 2  # times the model's max_size: the second pass redraws details, and composes nothing
SCHEDULE = 1000  # the steps that a model knows


def plan(
    request: GenerationRequest, first: tuple[int, int], steps: int, multiple: int, max_size: int, max_steps: int, upscalers: Collection[str], refuse: Refuse
) -> tuple[Hires | None, list[str]]:
    """The second pass that a request asks for, if any, and what is to be known of it; what is wrong goes to `refuse`.

    Args:
        request: with `hr_scale` and, if it likes, the other `hr_` parameters.
        first: width and height of the first pass, pixels.
        steps: of the first pass.
        multiple, max_size: the model's.
        max_steps: the most that may be asked for.
        upscalers: the catalogue's that may be used.
    """
    if request.hr_scale is None:
        for name in ("hr_upscaler", "hr_steps", "hr_strength"):
            if (given := getattr(request, name)) is not None:
                refuse(name, "only has a meaning with hr_scale", "leave it out, or send hr_scale", given)
        return None, []
    width, height = (max(1, round(side * request.hr_scale / multiple)) * multiple for side in first)
    largest = LARGEST * max_size // multiple * multiple
    if max(width, height) > largest:
        refuse("hr_scale", f"makes {width}x{height} of {first[0]}x{first[1]}", f"sides of at most {largest}", request.hr_scale)
    upscaler = request.hr_upscaler or "latent"
    if upscaler.lower() in BUILT_IN:
        upscaler = upscaler.lower()
    elif upscaler not in upscalers:
        known = [*BUILT_IN, *upscalers]
        refuse("hr_upscaler", f"there is no upscaler {upscaler!r} for this{nearest(upscaler, known)}", known, upscaler)
    second = request.hr_steps or steps
    if second > max_steps:
        refuse("hr_steps", "is too large", f"1 to {max_steps}", second)
    strength = 0.7 if request.hr_strength is None else request.hr_strength
    if second / strength > SCHEDULE:
        refuse("hr_strength", f"{strength:g} leaves fewer than {second} of the {SCHEDULE} steps that a model knows", f"at least {second / SCHEDULE:.3g}, or fewer hr_steps", strength)
    exact = [side * request.hr_scale for side in first]
    notes = [] if exact == [width, height] else [f"hr_scale {request.hr_scale:g} makes {exact[0]:g}x{exact[1]:g}; rounded to {width}x{height}"]
    return Hires(scale=request.hr_scale, first=first, width=width, height=height, upscaler=upscaler, steps=second, strength=strength), notes


def schedule(hires: Hires, flow: bool) -> int:
    """The length of a schedule of which `strength` leaves just `steps` to run, as A1111 counts them."""
    length = math.ceil(hires.steps / hires.strength - 1e-9)
    while steps_run(length, hires.strength, flow) < hires.steps:
        length += 1
    while steps_run(length, hires.strength, flow) > hires.steps:
        length -= 1
    return length
