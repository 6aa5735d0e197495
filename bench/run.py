"""Pictures through Easel against the raw diffusers loop and other servers, with the same weights, steps and machine.

`make bench` (`.venv/bin/python bench/run.py`) starts Easel and the peers, has them and the raw loop draw in turns, scenario by
scenario and round by round (a machine's speed drifts, and two at once would slow each other down; the others' processes are stopped meanwhile), and writes its section of
bench/results.md and bench/results.svg. Each ratio is of two neighbouring blocks. It stops beginning rounds when its time is up;
`--minutes` says when. `--quick` shows in about two minutes that everything runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import driving
import environments
import psutil
import report
from arrivals import Block
from contenders import Contender, Started, started, tree
from PIL import Image, ImageChops, ImageDraw
from scenarios import MINIATURE, STARTER, Picture, Scenario, mixed, quick, scenarios
from turns import ROOT

BLOCK_S = 400  # no block takes longer, or its contender is out of the scenario
MINIATURE_S = 1.0  # what a picture of the miniature is to take the raw loop


@dataclass
class Measured:
    """The blocks of each scenario, by contender, a round after another; None where one could not be had."""

    started: Started
    scenarios: list[Scenario]
    blocks: dict[str, dict[str, list[Block | None]]] = field(default_factory=dict)
    differences: dict[str, int] = field(default_factory=dict)
    idle_cpu: float = 0.0
    load: float = 0.0

    def of(self, scenario: Scenario, contender: str) -> list[Block | None]:
        return self.blocks.setdefault(scenario.name, {}).setdefault(contender, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="begin nothing that would not end within so long (default: 15)")
    parser.add_argument("--rounds", type=int, default=6, help="the most rounds (default: 6)")
    parser.add_argument("--quick", action="store_true", help="one round of a few pictures, to see that it runs")
    parser.add_argument("--only", default="", help="scenarios whose names have this in them")
    parser.add_argument("--peers", default="BentoML,LitServe,hf-serve", help="the peers to run, by name, with commas (empty: none)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end too
    end, load = time.monotonic() + 60 * options.minutes, os.getloadavg()[0]
    models = made_models()
    with started(models, {name for name in options.peers.split(",") if name}) as contenders:
        measured = asyncio.run(measure(contenders, options, end))
    measured.load = load
    report.write(options.results, measured)
    sys.exit(1 if any(block is None for each in measured.blocks.values() for some in each.values() for block in some) else 0)


def made_models() -> Path:
    """The folder with the miniature and the LoRAs, made on first use, and again where bench/models.py has changed."""
    folder, script = environments.CACHE / "models", ROOT / "bench" / "models.py"
    made = folder / "made"
    if not made.exists() or made.read_text() != script.read_text():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(script), str(folder)], check=True)
        made.write_text(script.read_text())
    return folder


async def measure(contenders: Started, options: argparse.Namespace, end: float) -> Measured:
    """Round by round, scenario by scenario, contender by contender, as long as the time allows."""
    image = starting_picture()
    steps = await miniature_steps(contenders.running[0])
    chosen = [s for s in scenarios(image, steps) if options.only in s.name]
    chosen = quick(chosen) if options.quick else chosen
    measured = Measured(contenders, chosen)
    await warm_up(measured, image)
    measured.idle_cpu = idle_cpu([pid for contender in contenders.running for pid in contender.pids])
    order, took, raw_rate = [*contenders.running], dict.fromkeys((s.name for s in chosen), 0.0), 1.0
    shuffled = random.Random(0)
    for number in range(1 if options.quick else options.rounds):
        for scenario in chosen:
            if number % scenario.every or (number and time.monotonic() + took[scenario.name] > end):
                continue
            began = time.monotonic()
            shuffled.shuffle(order)  # whoever always followed one that leaves a core idle would have a processor that has rested
            for contender in order:
                if all(map(contender.can, scenario.pictures)):
                    with contenders.only(contender):
                        got = await attempt(contender, scenario, driving.times(scenario, raw_rate, number))
                    measured.of(scenario, contender.name).append(got)
            took[scenario.name] = time.monotonic() - began
            told(measured, scenario, number)
            raw = [b.rate for s in chosen if s.models == {STARTER} and s.clients == 1 and s.way == "closed" for b in measured.of(s, "raw loop") if b]
            raw_rate = statistics.median(raw) if raw else raw_rate
    return measured


async def attempt(contender: Contender, scenario: Scenario, arrivals: list[float] | None) -> Block | None:
    """A block, or None with a line on standard error that says why there is none."""
    try:
        async with asyncio.timeout(BLOCK_S):
            return await driving.block(contender, scenario, arrivals)
    except Exception as error:
        causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        print(f"{contender.name}, {scenario.name}: {type(causes[0]).__name__} {causes[0]}", file=sys.stderr)
        return None


def told(measured: Measured, scenario: Scenario, number: int) -> None:
    raw = measured.of(scenario, "raw loop")
    ratios = [f"{name} {report.text(report.ratios(scenario, some, raw)[-1:])}" for name, some in measured.blocks[scenario.name].items() if name != "raw loop"]
    print(f"round {number + 1}, {scenario.name}: {', '.join(ratios)}", file=sys.stderr, flush=True)


def starting_picture() -> bytes:
    """The PNG that image-to-image starts from: flat shapes, such as the starter draws."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="red")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


async def miniature_steps(raw: Contender) -> int:
    """How many steps of the miniature take the raw loop about a second on this machine."""
    async with driving.session() as session:
        took = []
        for steps in (2, 2, 2, 8, 8):
            took.append((await raw.draw(Picture(1, "red apple", MINIATURE, steps), session))[1] or 0.0)
    each = max(1e-3, (min(took[3:]) - min(took[1:3])) / 6)
    return min(60, max(4, round((MINIATURE_S - (min(took[1:3]) - 2 * each)) / each)))


async def warm_up(measured: Measured, image: bytes) -> None:
    """Have each contender draw each kind of picture once, so that everything is loaded, and compare what they drew with the raw loop's."""
    kinds = [Picture(1, "red apple", steps=5), Picture(1, "red apple", MINIATURE, 4), *mixed(8, image, (3, 4, 5))]
    reference: list[bytes] = []
    async with driving.session() as session:
        for contender in list(measured.started.running):
            try:
                drawn = [(await contender.draw(kind, session))[0] if contender.can(kind) else b"" for kind in kinds]
            except Exception as error:
                if contender.alone:
                    raise
                measured.started.fail(contender.name, error)
                continue
            reference = reference or drawn
            measured.differences[contender.name] = max(difference(a, b) for a, b in zip(drawn, reference, strict=True) if a)


def difference(*files: bytes) -> int:
    """The largest difference of any channel between two pictures, of 255."""
    both = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    return max(int(high) for _, high in ImageChops.difference(*both).getextrema())


def idle_cpu(pids: list[int]) -> float:
    """Cores that all contenders' processes take while nothing is asked of them."""
    processes = tree(pids)

    def spent() -> float:
        total = 0.0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
        return total

    before, began = spent(), time.monotonic()
    time.sleep(3)
    return (spent() - before) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
