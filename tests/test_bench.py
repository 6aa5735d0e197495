"""The benchmark's arithmetic: arrivals, percentiles, ratios, and what its scenarios ask for. It measures nothing here."""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.settings import ROOT


@pytest.fixture(autouse=True)
def _beside_the_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its modules are scripts that find each other by their folder."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield
    for name in ("arrivals", "scenarios", "driving", "contenders", "environments", "turns", "plot", "report"):
        sys.modules.pop(name, None)


class Slow:
    """A contender that takes one picture at a time, each for a fixed time."""

    name, alone = "slow", False

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free = seconds, asyncio.Lock()

    async def draw(self, picture: object, session: object, slowly: float = 0) -> tuple[bytes, float | None]:
        async with self.free:
            await asyncio.sleep(self.seconds)
        return b"\x89PNG", None


def test_arrivals_come_at_the_asked_rate_are_irregular_and_can_be_repeated() -> None:
    from arrivals import poisson

    times = poisson(rate=4, count=4000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times)
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.08)  # of a Poisson process, the gaps' mean and deviation are equal
    assert times == poisson(rate=4, count=4000, seed=1) != poisson(rate=4, count=4000, seed=2)


def test_percentiles_are_measured_values_that_the_share_does_not_exceed() -> None:
    from arrivals import percentile

    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7


def test_a_request_that_could_not_be_sent_in_time_has_waited_since_it_was_meant_to_be_sent() -> None:
    from driving import block
    from scenarios import Scenario, different

    scenario = Scenario("all at once", "burst", different(5))
    latencies = sorted(asyncio.run(block(Slow(0.05), scenario)).latencies)
    for i, latency in enumerate(latencies, 1):
        assert latency >= 0.05 * i - 0.005  # counted from when it was its turn, each would have taken the same


def test_a_closed_loop_counts_each_picture_once_from_the_end_of_the_one_before() -> None:
    from driving import block
    from scenarios import Scenario, different

    measured = asyncio.run(block(Slow(0.02), Scenario("two clients", "closed", different(6), clients=2)))
    assert len(measured.samples) == 6
    assert measured.seconds >= 6 * 0.02
    assert measured.seconds < sum(measured.latencies) <= 2 * measured.seconds  # both clients wait all the time


def test_over_one_is_faster_by_rate_and_by_latency() -> None:
    from arrivals import Block, Sample, ratio

    fast, slow = Block([Sample(0, 1), Sample(1, 2)], 2), Block([Sample(0, 2), Sample(1, 4)], 4)
    assert ratio(fast, slow, by_latency=False) == 2
    assert ratio(fast, slow, by_latency=True) == 2.5
    assert ratio(slow, fast, by_latency=False) == 0.5


def test_the_mixed_scenario_has_three_step_counts_two_schedulers_two_loras_and_input_pictures() -> None:
    from scenarios import LORAS, mixed

    pictures = mixed(16, b"png")
    assert {p.steps for p in pictures} == {15, 20, 25}
    assert len({p.scheduler for p in pictures}) == 2
    assert {p.lora for p in pictures} == {None, *LORAS}
    assert sum(p.image is not None for p in pictures) == 4
    assert not any(p.plain for p in pictures if p.image or p.lora or p.scheduler)


def test_no_seed_is_zero_and_quick_asks_for_little() -> None:
    from scenarios import quick, scenarios

    full = scenarios(b"png", miniature_steps=10)
    assert all(p.seed for s in full for p in s.pictures)
    assert [s.way for s in quick(full)] == [s.way for s in full]
    assert sum(p.steps for s in quick(full) for p in s.pictures) < sum(p.steps for s in full for p in s.pictures) / 10


def test_the_results_have_the_ratio_of_each_round_with_its_spread_and_a_plot(tmp_path: Path) -> None:
    import plot
    import report
    from arrivals import Block, Sample
    from scenarios import Scenario, different

    scenario = Scenario("1 client", "closed", different(1))
    mine, raw = ([Block([Sample(0, s)], s) for s in seconds] for seconds in ((1.0, 2.0, 4.0), (2.0, 2.0, 2.0)))
    assert report.ratios(scenario, [mine[0], None, mine[2]], raw) == [2.0, 0.5]  # a block that failed takes its round with it
    assert report.text(report.ratios(scenario, mine, raw)) == "1.00 (0.50 to 2.00)"
    plot.draw(tmp_path / "results.svg", {"1 client": {"Easel": [0.5, 1.0, 2.0], "LitServe": []}})
    drawn = (tmp_path / "results.svg").read_text()
    assert "Easel" in drawn
    assert "1 client" in drawn
