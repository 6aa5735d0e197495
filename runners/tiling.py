"""A picture enlarged tile by tile, the tiles laid together with soft edges, so that a large one fits memory.

core.tiling says where the tiles are. runners.upscaling and runners.hires call it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core.tiling import spans


def enlarge(
    model: Callable[[Tensor], Tensor], picture: np.ndarray, scale: int, tile: int, check: Callable[[], None]
) -> np.ndarray:
    """A picture `scale` times as large.

    Args:
        model: makes (1, 3, h, w) in 0..1 into (1, 3, h * scale, w * scale).
        picture: (H, W, 3), uint8.
        scale: the model's factor.
        tile: the longest side that the model is given, pixels.
        check: raises when the work should stop; called before each tile.

    Returns:
        (H * scale, W * scale, 3) floats, about 0..1. A model that looks no further than three eighths of the
        overlap gives what it gives of the whole picture.
    """
    height, width, _ = picture.shape
    tops, lefts = spans(height, tile), spans(width, tile)
    if len(tops) == len(lefts) == 1:
        check()
        return _run(model, picture)
    result = np.zeros((height * scale, width * scale, 3), np.float32)
    downs, rights = _weights(tops, min(tile, height), scale), _weights(lefts, min(tile, width), scale)
    for top, down in zip(tops, downs, strict=True):
        for left, right in zip(lefts, rights, strict=True):
            check()
            made = _run(model, picture[top : top + tile, left : left + tile])
            made *= (down[:, None] * right)[..., None]
            y, x = top * scale, left * scale
            result[y : y + made.shape[0], x : x + made.shape[1]] += made
    return result


def _run(model: Callable[[Tensor], Tensor], picture: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return model(pixels)[0].permute(1, 2, 0).float().cpu().numpy()


def _weights(starts: list[int], side: int, scale: int) -> list[np.ndarray]:
    """How much each tile along one axis counts at each of its pixels: a ramp over the middle quarter of an
    overlap, so that the edges, which the model saw without their surroundings, do not count. Sums to 1."""
    weights = []
    for i, start in enumerate(starts):
        weight = np.ones(side * scale, np.float32)
        if i:
            weight *= _ramp(side, starts[i - 1] + side - start, scale)
        if i + 1 < len(starts):
            weight *= _ramp(side, start + side - starts[i + 1], scale)[::-1]
        weights.append(weight)
    total = np.zeros((starts[-1] + side) * scale, np.float32)
    for start, weight in zip(starts, weights, strict=True):
        total[start * scale : (start + side) * scale] += weight
    return [weight / total[start * scale : (start + side) * scale] for start, weight in zip(starts, weights, strict=True)]


def _ramp(side: int, shared: int, scale: int) -> np.ndarray:
    """0 before three eighths of the `shared` pixels, 1 after five."""
    at = (np.arange(side * scale, dtype=np.float32) + 0.5) / (shared * scale)
    return np.clip((at - 0.375) / 0.25, 0, 1)
