"""How a picture is cut into tiles that overlap: where each begins. No torch: a plan tells how many there are.

core.upscaling counts them; runners.tiling enlarges them and lays them together.
"""

from __future__ import annotations

import math


def overlap(tile: int) -> int:
    """Pixels that neighbours share: 32, less where tiles are small."""
    return min(32, tile // 4)


def spans(length: int, tile: int) -> list[int]:
    """Where the tiles of a side begin: evenly spread, neighbours sharing `overlap` pixels or more; one
    where it is no longer than a tile."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap(tile)) / (tile - overlap(tile)))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def count(width: int, height: int, tile: int) -> int:
    """How many tiles cover a picture."""
    return len(spans(width, tile)) * len(spans(height, tile))
