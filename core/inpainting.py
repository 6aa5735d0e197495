"""Inpainting and outpainting before any pixel is touched: the parameters, and what is drawn where.

A mask or a side to grow makes a request one for inpainting; core.catalogue asks `plan` what that means
for a model. runners.inpainting does what is planned here. White is what is repainted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from core.problems import Refuse
from core.settings import Limits

if TYPE_CHECKING:
    from core.families import Entry
    from core.plans import Inputs, Pixels
    from core.requests import GenerationRequest

Fill = Literal["fill", "original", "latent noise", "latent nothing"]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
SIDES = ("outpaint_left", "outpaint_top", "outpaint_right", "outpaint_bottom")
_MASK_BLUR, _PADDING = 4, 32  # as A1111's page has them


def _usual_fill_name(value: Any) -> Any:
    """A1111's numbers, and the names with `_` or `-`."""
    text = str(value).strip().lower().replace("_", " ").replace("-", " ")
    return get_args(Fill)[int(text)] if text in "0123" and len(text) == 1 else text


class InpaintingFields(BaseModel):
    """What a request for pictures may say of its mask, by A1111's names where it has them."""

    mask_blur: int | None = Field(None, ge=0, le=64, description="Inpainting: the feather inside the mask's edge, pixels of the answer. Default 4.")
    inpainting_fill: Annotated[Fill, BeforeValidator(_usual_fill_name)] | None = Field(
        None, description='What the masked part starts from: "fill" (colours around it), "original" (default), "latent noise", "latent nothing"; or 0 to 3.'
    )
    inpainting_mask_invert: bool | None = Field(None, description="true: black is repainted, not white.")
    inpaint_full_res: bool | None = Field(None, description="true: draw the masked part alone, at the model's full size.")
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=1024, description="With inpaint_full_res: pixels around the masked part to draw with it. Default 32.")
    outpaint_left: int = Field(0, ge=0, le=4096, description="Outpainting: pixels to add at this side.")
    outpaint_top: int = Field(0, ge=0, le=4096, description="Outpainting: pixels to add at this side.")
    outpaint_right: int = Field(0, ge=0, le=4096, description="Outpainting: pixels to add at this side.")
    outpaint_bottom: int = Field(0, ge=0, le=4096, description="Outpainting: pixels to add at this side.")


class Inpainting(BaseModel):
    """A decided inpainting. The input, grown by `sides` (left, top, right, bottom) and resized to `canvas`
    (width, height), is the answer but for the mask; its part `box` (left, top, right, bottom) is drawn."""

    model_config = ConfigDict(frozen=True)
    canvas: Size
    box: Box
    sides: Box
    mask_blur: int
    fill: Fill
    invert: bool
    full_res: bool
    padding: int | None


def plan(
    request: GenerationRequest, inputs: Inputs | None, entry: Entry, limits: Limits, size_for: Callable[[Size], Size], refuse: Refuse, notes: list[str]
) -> tuple[Inpainting, Size] | None:
    """What to inpaint, and the size to draw at; None where the request is none for inpainting.

    Args:
        size_for: the size that the model draws a picture of a size at, by its usual area.
        refuse: takes each field that cannot be honoured, with what was wrong, what is allowed, and what was given.
        notes: what the caller should know of what is done.
    """
    sides: Box = (request.outpaint_left, request.outpaint_top, request.outpaint_right, request.outpaint_bottom)
    image, mask = (inputs.image, inputs.mask) if inputs else (None, None)
    if not _can(request, image, mask, sides, entry, refuse) or image is None:
        return None
    # 1. The canvas, and what of it is masked.
    grown = (image.width + sides[0] + sides[2], image.height + sides[1] + sides[3])
    invert = bool(request.inpainting_mask_invert)
    if mask is not None and (mask.width, mask.height) != (image.width, image.height):
        if abs(mask.width * image.height / (mask.height * image.width) - 1) > 0.02:
            refuse("mask", "has another shape than the image", f"{image.width}x{image.height}, or that shape in another size", f"{mask.width}x{mask.height}")
            return None
        notes.append(f"the mask was resized from {mask.width}x{mask.height} to {image.width}x{image.height}")
    masked = _masked(image, mask, invert, sides)
    if masked is None:
        refuse("mask", "leaves nothing to repaint: it is black all over" if not invert else "leaves nothing to repaint: it is white all over, and inverted", "white where to repaint", "")
        return None
    # 2. The part to draw, and the size to draw it at.
    asked = (request.width or entry.size, request.height or entry.size) if request.width is not None or request.height is not None else None
    canvas, box, padding = grown, (0, 0, *grown), None
    if request.inpaint_full_res:
        padding = _PADDING if request.inpaint_full_res_padding is None else request.inpaint_full_res_padding
        around = _padded(masked, padding, grown)
        drawn = asked or size_for((around[2] - around[0], around[3] - around[1]))
        box = _shaped(around, drawn, grown)
    elif asked:
        canvas = drawn = asked
        box = (0, 0, *canvas)
    else:
        drawn = _own(grown, entry) or size_for(grown)
    if canvas[0] * canvas[1] * request.count_returned > limits.image_pixels:
        refuse("count_returned", "makes too many pixels", f"at most {limits.image_pixels} pixels in all", f"{request.count_returned} of {canvas[0]}x{canvas[1]}")
    if drawn != (box[2] - box[0], box[3] - box[1]):
        notes.append(f"drawn at {drawn[0]}x{drawn[1]} and put back into {canvas[0]}x{canvas[1]}")
    blur = _MASK_BLUR if request.mask_blur is None else request.mask_blur
    return Inpainting(canvas=canvas, box=box, sides=sides, mask_blur=blur, fill=request.inpainting_fill or "original", invert=invert, full_res=bool(request.inpaint_full_res), padding=padding), drawn


def _can(request: GenerationRequest, image: Pixels | None, mask: Pixels | None, sides: Box, entry: Entry, refuse: Refuse) -> bool:
    """Whether this is for inpainting; what only has a meaning there, or is missing for it, is refused."""
    wanted = mask is not None or any(sides)
    if wanted and image is None:
        refuse("image", "is missing: a mask and outpaint_* are for an input image", "a multipart file part", "")
    if entry.model.inpainting and not wanted:
        refuse("mask", f"is missing: {entry.id} is an inpainting model", "a multipart file part, or outpaint_*, with an image", "")
    if wanted and entry.traits.multimodal:
        refuse("mask", f"{entry.id} ({entry.model.family}) does not inpaint", "leave it out", "")
    for name in ("mask_blur", "inpainting_fill", "inpaint_full_res"):
        if not wanted and getattr(request, name) is not None:
            refuse(name, "only has a meaning with a mask or outpaint_*", "leave it out, or send mask", getattr(request, name))
    if mask is None and request.inpainting_mask_invert is not None:
        refuse("inpainting_mask_invert", "only has a meaning with a mask", "leave it out, or send mask", request.inpainting_mask_invert)
    if not request.inpaint_full_res and request.inpaint_full_res_padding is not None:
        refuse("inpaint_full_res_padding", "only has a meaning with inpaint_full_res", "leave it out, or inpaint_full_res=true", request.inpaint_full_res_padding)
    return wanted and image is not None


def mask_of(pixels: Pixels, size: Size, invert: bool) -> Image.Image:
    """A mask of 0 and 255: white (half or more) is repainted."""
    grey = Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data).convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    return grey.point([0 if (level >= 128) == invert else 255 for level in range(256)])


def _masked(image: Pixels, mask: Pixels | None, invert: bool, sides: Box) -> Box | None:
    """The box around what is repainted, on the grown canvas."""
    left, top, right, bottom = sides
    width, height = image.width + left + right, image.height + top + bottom
    boxes = [box for grows, box in zip(sides, ((0, 0, left, height), (0, 0, width, top), (width - right, 0, width, height), (0, height - bottom, width, height)), strict=True) if grows]
    if mask is not None and (found := mask_of(mask, (image.width, image.height), invert).getbbox()):
        boxes.append((found[0] + left, found[1] + top, found[2] + left, found[3] + top))
    if not boxes:
        return None
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def _padded(box: Box, by: int, within: Size) -> Box:
    return max(0, box[0] - by), max(0, box[1] - by), min(within[0], box[2] + by), min(within[1], box[3] + by)


def _shaped(box: Box, drawn: Size, within: Size) -> Box:
    """The box, grown to the shape of `drawn` as far as there is room."""
    width, height = box[2] - box[0], box[3] - box[1]
    width, height = max(width, round(height * drawn[0] / drawn[1])), max(height, round(width * drawn[1] / drawn[0]))
    left, right = _grown(box[0], box[2], width, within[0])
    top, bottom = _grown(box[1], box[3], height, within[1])
    return left, top, right, bottom


def _grown(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    length = min(length, limit)
    start = min(max(0, start - (length - (end - start)) // 2), limit - length)
    return start, start + length


def _own(size: Size, entry: Entry) -> Size | None:
    """A size, rounded up to what the model can draw; None where it is out of its range."""
    step = entry.traits.multiple
    width, height = (math.ceil(length / step) * step for length in size)
    return (width, height) if entry.min_size <= min(width, height) and max(width, height) <= entry.max_size else None
