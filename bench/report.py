"""What was measured, as a section of bench/results.md."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import environments
import plot
import turns
from arrivals import Block, percentile, ratio
from scenarios import Scenario

if TYPE_CHECKING:
    from run import Measured

SECTION = "## Against the raw loop and other servers"
RAW = "raw loop"


def write(results: Path, measured: Measured) -> None:
    """Put the section into the results, and the plot beside them."""
    names = [contender.name for contender in measured.started.running if contender.name != RAW]
    rows = {s.name: {name: ratios(s, measured.of(s, name), measured.of(s, RAW)) for name in names} for s in measured.scenarios}
    plot.draw(results.with_suffix(".svg"), rows)
    whole = section(measured, results.with_suffix(".svg").name)
    turns.write(results, SECTION, whole)
    print(whole)


def ratios(scenario: Scenario, mine: Sequence[Block | None], raw: Sequence[Block | None]) -> list[float]:
    """To the raw loop's block of the same round; over 1 is faster."""
    return [ratio(a, b, scenario.by_latency) for a, b in zip(mine, raw, strict=False) if a and b]


def text(values: list[float]) -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else middle


def section(measured: Measured, picture: str) -> str:
    names = [contender.name for contender in measured.started.running]
    others = [name for name in names if name != RAW]
    peers = "; ".join(environments.versions(name.lower()) for name in others if name != "Easel")
    lines = [
        SECTION,
        "",
        turns.where("bench/run.py", measured.load) + (f" Peers: {peers}." if peers else ""),
        "",
        "The starter draws 64x64, 25 steps, guidance 5; the miniature (bench/models.py) 128x128 in as many steps as take the raw loop about "
        f"a second, here {next((s.pictures[0].steps for s in measured.scenarios if 'miniature' in s.name), 0)}; float32. All draw the same pictures in turns, "
        "round by round; each ratio is to the raw loop's block of the same round: median (least to greatest), over 1 is faster than the raw loop. "
        "Pictures a second are compared; where arrivals wait for nobody, the median latency.",
        "",
        f"![Ratios to the raw loop, by scenario]({picture})",
        "",
        f"| scenario | pictures, rounds | {' | '.join(others)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in others)} |",
        *(_row(measured, scenario, others) for scenario in measured.scenarios),
        "",
        "Latency from the moment at which a picture was meant to be asked for, ms, p50 / p95 / p99 of all rounds:",
        "",
        f"| scenario | {' | '.join(names)} |",
        f"| --- | {' | '.join('---:' for _ in names)} |",
        *(f"| {scenario.name} | {' | '.join(_latency(measured, scenario, name) for name in names)} |" for scenario in measured.scenarios),
        "",
        *_notes(measured),
    ]
    return "\n".join(lines) + "\n"


def _row(measured: Measured, scenario: Scenario, names: list[str]) -> str:
    raw = measured.of(scenario, RAW)
    cells = [text(ratios(scenario, measured.of(scenario, name), raw)) for name in names]
    return f"| {scenario.name} | {len(scenario.pictures)}, {len(raw)} | {' | '.join(cells)} |"


def _latency(measured: Measured, scenario: Scenario, name: str) -> str:
    latencies = [s for block in measured.of(scenario, name) if block for s in block.latencies]
    return " / ".join(f"{1000 * percentile(latencies, share):.0f}" for share in (0.5, 0.95, 0.99)) if latencies else "-"


def _notes(measured: Measured) -> list[str]:
    lines = []
    one = next((s for s in measured.scenarios if s.name == "1 client"), None)
    if one:
        pairs = [(a, b) for a, b in zip(measured.of(one, "Easel"), measured.of(one, RAW), strict=False) if a and b]
        added = [1000 * (statistics.median(a.latencies) - statistics.median(b.latencies)) for a, b in pairs]
        if added:
            lines.append(f"- Added latency of Easel at 1 client, p50 against the raw pipeline call: {turns.spread(added, 1)} ms.")
    apart = ", ".join(f"{name} {value}" for name, value in measured.differences.items() if name != RAW)
    lines.append(f"- Largest difference to the raw loop's pictures of the same requests, of 255: {apart}.")
    lines.append(f"- All contenders' processes together took {measured.idle_cpu:.2f} cores while nothing was asked of them; they were stopped while another had its turn.")
    lines += [f"- {name} did not run: {why.strip().splitlines()[-1] if why.strip() else 'no reason given'}" for name, why in measured.started.failed.items()]
    if "--quick" in sys.argv:
        lines.append("- Made with --quick, to see that it runs: these figures say nothing.")
    return lines
