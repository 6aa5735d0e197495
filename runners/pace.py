"""How many pictures are worth drawing at once: measured while they are drawn, not a constant."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator

import torch

_GAIN = 1.05  # a larger batch is worth it where it draws at least so many times the pictures a second
_ENOUGH, _KEPT = 8, 32  # passes measured of a size before it is judged, and those remembered
_FRESH_S = 60  # what is older is forgotten, so that a size is tried again
_EVERY_ON_GPU = 8  # measuring waits for the device, so that only every so many passes are


class Pace:
    """The seconds that a model's passes take at one size of picture, by how many pictures are in them."""

    def __init__(self) -> None:
        self._took: dict[int, deque[tuple[float, float]]] = {}  # (when, seconds)
        self._turn = itertools.count()

    @contextlib.contextmanager
    def timed(self, pictures: int, device: torch.device) -> Iterator[None]:
        """Measure a pass; one that fails does not count."""
        if device.type == "cuda":
            if next(self._turn) % _EVERY_ON_GPU:
                yield
                return
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.note(pictures, time.perf_counter() - began)

    def note(self, pictures: int, seconds: float) -> None:
        self._took.setdefault(pictures, deque(maxlen=_KEPT)).append((time.monotonic(), seconds))

    def worth(self, ceiling: int) -> int:
        """How many pictures to draw at once, `ceiling` at most: the smallest number after which a larger one, where it
        was measured, did not draw more pictures a second. What was not measured is taken to be worth trying."""
        now = time.monotonic()
        # The fastest pass of each: what else the machine does can only slow one down.
        fastest = {n: min(s for _, s in took) for n, took in sorted(self._took.items()) if len(took) >= _ENOUGH and now - took[-1][0] < _FRESH_S}
        chosen = ceiling
        for n, seconds in reversed(fastest.items()):
            larger = [m / fastest[m] for m in fastest if m > n]
            if larger and max(larger) < _GAIN * n / seconds:
                chosen = n
        return min(chosen, ceiling)
