"""The load script: what it makes of its samples, and that a real server that is asked for too much refuses, and loses nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.conftest import USER, serving
from tests.reliability import load
from tests.reliability.load import KEYS, OVERRIDES, Sample, judged, roughly, waits
from tests.reliability.watching import Held


def sample(at: float, status: int = 200, took: float = 1.0, told: int | None = None, key: str = USER) -> Sample:
    return Sample(key, at, at, at + took, status, told)


def held(mib: int) -> list[Held]:
    return [Held(pid=1, role="StableDiffusion", uss=mib * 2**20, rss=mib * 2**20, files=1, threads=1, cpu_s=0)]


def test_a_refusal_has_waited_until_its_own_key_is_admitted() -> None:
    samples = [sample(0, 429, told=3), sample(1), sample(2, key=KEYS[1]), sample(3, 429, told=1), sample(5), sample(9, 429, told=1)]
    assert waits(samples) == [(3, 1), (1, 2)]  # the last one's key is never admitted after it


def test_retry_after_is_roughly_right_in_whole_seconds() -> None:
    assert all(roughly(told, real) for told, real in ((1, 0.1), (1, 2), (10, 4), (30, 29)))
    assert not any(roughly(told, real) for told, real in ((1, 3), (60, 5), (5, 20)))


@pytest.mark.parametrize(
    ("samples", "sizes", "said"),
    [
        ([sample(i) for i in range(10)], [100] * 10, []),
        ([sample(i) for i in range(5)], [100] * 10, ["0.50 pictures/s came, of 1.00 that it can do"]),
        ([*(sample(i) for i in range(10)), sample(1, 503)], [100] * 10, ["1 answers were neither 200 nor 429"]),
        ([*(sample(i) for i in range(10)), sample(1, 429)], [100] * 10, ["a refusal had no Retry-After"]),
        ([*(sample(i, took=0.5) for i in range(10)), sample(0, took=70)], [100] * 10, ["1 came after their deadline"]),
        ([sample(i) for i in range(10)], [100, 100, 100, 100, 100, 110, 110, 110, 120, 120], ["StableDiffusion had 100 MiB and came to 120"]),
    ],
)
def test_what_a_level_is_judged_by(samples: list[Sample], sizes: list[int], said: list[str]) -> None:
    line, faults = judged(2, 10, 1.0, samples, [held(size) for size in sizes])
    assert faults == [f"at 2 times capacity: {one}" for one in said]
    assert line.startswith("| 2 | ")


@pytest.mark.http
def test_what_is_too_much_is_refused_and_the_rest_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = OVERRIDES | {"queue": {"limit": 6, "per_key": 3}}
    with serving(tmp_path, overrides, env={"API_KEY": ",".join(KEYS)}) as server:
        faults = asyncio.run(load.run(server, 5, 2, 2, levels=(4,), clients=3))
    timed = ("pictures/s came", "Retry-After was roughly right")  # of a machine that others use, a few seconds say nothing of those
    assert [fault for fault in faults if not any(one in fault for one in timed)] == []
    assert "429: " in capsys.readouterr().out
