"""When requests are meant to be sent, and what waiting for their answers came to: no clocks, no network.

A latency counts from the moment at which a request was meant to be sent. A client that is kept waiting sends its next
request late; counted from the sending, the wait of those that could not be sent in time would not appear at all.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One answered request; seconds since its block began."""

    intended: float
    ended: float

    @property
    def latency(self) -> float:
        return self.ended - self.intended


@dataclass(frozen=True)
class Block:
    """Requests that one contender answered without a pause, and the seconds from the first intended one to the last answer."""

    samples: list[Sample]
    seconds: float

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.samples) / self.seconds

    @property
    def latencies(self) -> list[float]:
        return [sample.latency for sample in self.samples]


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """The seconds at which `count` requests arrive that know nothing of each other, `rate` a second on average."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        times.append(at)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratio(mine: Block, other: Block, by_latency: bool) -> float:
    """How many times as fast as the other, over 1 being faster: by pictures a second, or by the median latency."""
    if by_latency:
        return statistics.median(other.latencies) / statistics.median(mine.latencies)
    return mine.rate / other.rate
