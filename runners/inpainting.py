"""Repainting a part of a picture: what goes into a diffusers inpaint pipeline, and the answer from what it drew.

runners.denoise calls these around the pipeline. The answer is put together in pixels, so that what the
mask keeps is kept to the last bit, whatever the VAE makes of it; a feather lies inside the mask's edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from core.images import to_pil
from core.inpainting import Box, Fill, mask_of
from core.plans import Pixels, Plan

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Painting:
    """A picture to repaint. `canvas` becomes the answer; `box` is its part that is drawn, `share` (uint8 of the
    box's size) how much of what was drawn shows there. `image` and `mask` (bool) have the size to draw at."""

    canvas: Image.Image
    box: Box
    share: Image.Image
    image: Image.Image
    mask: Array
    fill: Fill


def prepare(plan: Plan) -> Painting:
    """The canvas of a plan for inpainting, and what to give the pipeline of it."""
    asked = plan.inpainting
    assert asked is not None
    assert plan.image is not None
    # 1. The canvas: the input, grown; what is new has the colours of its edge.
    left, top, right, bottom = asked.sides
    image = to_pil(plan.image)
    grown = (image.width + left + right, image.height + top + bottom)
    canvas = Image.fromarray(cv2.copyMakeBorder(np.asarray(image), top, bottom, left, right, cv2.BORDER_REPLICATE))
    mask = Image.new("L", grown, 255)
    mask.paste(mask_of(plan.mask, image.size, asked.invert) if plan.mask else 0, (left, top, left + image.width, top + image.height))
    if grown != asked.canvas:
        canvas, mask = canvas.resize(asked.canvas, Image.Resampling.LANCZOS), _covering(mask, asked.canvas)
    # 2. How much of the drawing shows: more with the distance from what is kept.
    distance = cv2.distanceTransform(np.asarray(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = Image.fromarray((255 * np.minimum(1, distance / (asked.mask_blur + 1))).round().astype(np.uint8)).crop(asked.box)
    # 3. The part to draw, at the size to draw it.
    size = (plan.width, plan.height)
    drawn_mask = np.asarray(_covering(mask.crop(asked.box), size)) > 0
    part = canvas.crop(asked.box).resize(size, Image.Resampling.LANCZOS)
    if asked.fill == "fill":
        part = _filled(part, ~drawn_mask)
    return Painting(canvas, asked.box, share, part, drawn_mask, asked.fill)


def arguments(pipe: DiffusionPipeline, paintings: list[Painting], generators: list[torch.Generator]) -> dict[str, Any]:
    """The inpaint pipeline's pictures, for all families: latents (N, channels, height, width) to start from, masks
    that cover whole latents, and what is not masked, for models that look at it (nine channels)."""
    width, height = paintings[0].image.size
    device, dtype = pipe._execution_device, pipe.vae.dtype
    pixels = pipe.image_processor.preprocess([p.image for p in paintings], height=height, width=width)  # (N, 3, H, W), -1..1
    masks = torch.from_numpy(np.stack([p.mask for p in paintings])).float()[:, None]  # (N, 1, H, W)
    small = torch.nn.functional.max_pool2d(masks, pipe.vae_scale_factor)  # a latent is repainted where any of its pixels is
    with torch.no_grad():
        latents = pipe._encode_vae_image(pixels.to(device, dtype), generators)
    for i, painting in enumerate(paintings):
        if painting.fill == "latent noise":
            noise = randn_tensor(latents[i : i + 1].shape, generator=generators[i], device=device, dtype=latents.dtype)
            latents[i] = torch.where(small[i].to(device) > 0, noise[0], latents[i])
        elif painting.fill == "latent nothing":
            latents[i] = torch.where(small[i].to(device) > 0, torch.zeros_like(latents[i]), latents[i])
    whole: Tensor = torch.nn.functional.interpolate(small, size=(height, width))
    return {"image": latents, "mask_image": whole, "masked_image_latents": pixels * (whole < 0.5), "width": width, "height": height}


def finish(painting: Painting, drawn: Pixels) -> Pixels:
    """The canvas with what was drawn in its place."""
    answer, box = painting.canvas.copy(), painting.box
    answer.paste(to_pil(drawn).resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2], painting.share)
    return Pixels(width=answer.width, height=answer.height, data=answer.tobytes())


def _covering(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask in another size: white wherever any of it was."""
    return mask.resize(size, Image.Resampling.BOX).point([0] + [255] * 255)


def _filled(image: Image.Image, known: Array) -> Image.Image:
    """The picture with its unknown pixels (`known`: bool, (H, W)) in the colours of the known ones around them."""
    return Image.fromarray(_pulled(np.asarray(image, np.float32), known.astype(np.float32)).round().astype(np.uint8))


def _pulled(pixels: Array, known: Array) -> Array:
    """Pull-push: what is unknown comes from the picture at half its size, where fewer pixels are.
    Source: Gortler et al. 1996, "The Lumigraph", section 3.3.3.

    Args:
        pixels: (H, W, 3), float32.
        known: (H, W), 1 or 0.
    """
    if known.all():
        return pixels
    if not known.any():
        return np.full_like(pixels, 127.5)
    height, width = known.shape
    half = ((width + 1) // 2, (height + 1) // 2)
    weights = cv2.resize(known, half, interpolation=cv2.INTER_AREA)
    sums = cv2.resize(pixels * known[..., None], half, interpolation=cv2.INTER_AREA)
    coarse = _pulled(sums / np.maximum(weights, 1e-6)[..., None], (weights > 1e-6).astype(np.float32))
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(known[..., None] > 0, pixels, smooth)
