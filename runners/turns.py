"""How long those who wait for a device are likely to wait, by what was measured."""

from __future__ import annotations

import math
import time
from collections import deque

_KEPT = 8  # how many of the last times that places became free tell when the next will


class Turns:
    """When places in a queue became free since it was last empty, and how many; `mean_s`: how long a job takes (exponential mean)."""

    def __init__(self) -> None:
        self.mean_s: float | None = None
        self._freed: deque[tuple[float, int]] = deque(maxlen=_KEPT)

    def served(self, seconds: float) -> None:
        self.mean_s = seconds if self.mean_s is None else 0.8 * self.mean_s + 0.2 * seconds

    def freed(self, places: int, ago_s: float = 0) -> None:
        if places:
            self._freed.append((time.monotonic() - ago_s, places))

    def forget(self) -> None:
        """The queue is empty."""
        self._freed.clear()

    def wait_s(self, turns: int) -> int:
        """Seconds until a place is likely to be free, once so many keys have had their turn: as long as it lately took, less what
        has passed since, and at least a second."""
        if len(self._freed) < 2:
            return max(1, math.ceil(self.mean_s or 1))
        (first, _), (last, _) = self._freed[0], self._freed[-1]
        gap, places = (last - first) / (len(self._freed) - 1), sum(count for _, count in self._freed) / len(self._freed)
        passed = time.monotonic() - last
        wait = gap * math.ceil(turns / places)
        return max(1, math.ceil(wait - passed if passed < gap else wait))
