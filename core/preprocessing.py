"""Preprocessors: from a picture to the map that a ControlNet follows. Classical filters alone, no weights.

By the names and with the defaults that A1111's ControlNet extension gives them. runners.guides runs them on
control images, at the size that is drawn; POST /preprocess shows what they make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]


def run(name: str, image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """The map of an RGB picture by the preprocessor `name` (of NAMES), at `size` (width, height) or the picture's own."""
    if size and size != image.size:
        # At the final size, before the filter: a map that was resized has blurred lines.
        image = image.resize(size, Image.Resampling.LANCZOS)
    made = _FILTERS[name](np.asarray(image))
    return Image.fromarray(made).convert("RGB")


def canny(rgb: Array) -> Array:
    """Edges, white on black: (H, W), uint8. Source: Canny 1986, thresholds 100 and 200."""
    edges: Array = cv2.Canny(rgb, 100, 200)
    return edges


def lineart_standard(rgb: Array) -> Array:
    """What is darker than its surroundings, white on black, as a pencil would draw it: (H, W), uint8.
    The difference to the picture blurred by 6 pixels, above 8 levels of 255, scaled by its median (A1111's lineart_standard)."""
    pixels = rgb.astype(np.float32)
    darker = np.min(cv2.GaussianBlur(pixels, (0, 0), 6.0) - pixels, axis=2).clip(0, 255)
    lines = darker[darker > 8]
    scale = max(16.0, float(np.median(lines))) if lines.size else 16.0
    drawn: Array = (darker / scale * 127).clip(0, 255).astype(np.uint8)
    return drawn


def scribble_xdog(rgb: Array) -> Array:
    """Thick strokes, white on black: (H, W), uint8: where a difference of Gaussians (0.5 and 5 pixels) is above 32
    levels. Source: Winnemoeller 2011, without its soft threshold."""
    pixels = rgb.astype(np.float32)
    fine, coarse = cv2.GaussianBlur(pixels, (0, 0), 0.5), cv2.GaussianBlur(pixels, (0, 0), 5.0)
    dog = (255 - np.min(coarse - fine, axis=2)).clip(0, 255).astype(np.uint8)
    return np.where(2 * (255 - dog.astype(np.int32)) > 32, 255, 0).astype(np.uint8)


def invert(rgb: Array) -> Array:
    """Black lines on white to white on black: (H, W, 3), uint8."""
    return 255 - rgb


_FILTERS: dict[str, Callable[[Array], Array]] = {
    "none": lambda rgb: rgb,
    "canny": canny,
    "lineart_standard": lineart_standard,
    "scribble_xdog": scribble_xdog,
    "invert": invert,
}
NAMES = list(_FILTERS)
