"""Load that does not wait for its answers, at 0.5 to 5 times what a real server can do: `make load`, or
`python -m tests.reliability.load --minutes 5`.

What the server can do is measured in the same run, before and after each level, by clients that ask again as soon as they are answered: a
machine that others use is not the same from one minute to the next. A level's requests come at random (Poisson) and count from the moment at which each was meant
to be sent. It exits with 1 where, at more than capacity, fewer pictures come than 90 % of it; where a
refusal is no 429 whose Retry-After is roughly how long it took until a request of that key was admitted; where an admitted one is later than
its deadline; or where a process' memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.arrivals import percentile, poisson
from tests.conftest import USER, Server, serving, wait_for
from tests.reliability.watching import Held, look

LEVELS = (0.5, 1.0, 2.0, 5.0)
KEYS = [USER, "second-key", "third-key"]
DEADLINE_S = 60.0
LATE_S = 2.0  # what an answer may take on its way, beside the deadline
GOODPUT, RIGHT = 0.9, 0.8  # the least share of capacity; of refusals whose Retry-After is roughly right
MEMORY, SLACK = 0.05, 4 * 2**20
MiB = 2**20
OVERRIDES = {
    "models": {"catalogue": [{"id": "starter/stable-diffusion", "family": "starter"}], "warm_up": ["starter/stable-diffusion"], "cpu_threads": 1},
    "queue": {"limit": 24, "per_key": 12},
}


@dataclass(frozen=True)
class Sample:
    """One request; seconds since its level began."""

    key: str
    intended: float
    sent: float
    ended: float
    status: int
    retry_after: int | None

    @property
    def latency(self) -> float:
        return self.ended - self.intended


async def ask(session: aiohttp.ClientSession, url: str, key: str, seed: int, steps: int) -> tuple[int, int | None]:
    """The status and Retry-After of a picture; status 0 where the connection broke."""
    params = {"prompt": "red apple", "seed": seed, "num_inference_steps": steps, "width": 64, "height": 64, "deadline_s": DEADLINE_S}
    try:
        async with session.post(url + "/post_config", params=params, headers={"X-API-Key": key}) as answer:
            await answer.read()
            told = answer.headers.get("Retry-After")
            return answer.status, int(told) if told else None
    except (aiohttp.ClientError, TimeoutError):
        return 0, None


async def capacity(session: aiohttp.ClientSession, url: str, seconds: float, steps: int, clients: int) -> float:
    """Pictures a second, of clients that ask again as soon as they have one, until the last is answered."""
    began, ends = time.perf_counter(), []

    async def client(number: int) -> None:
        while time.perf_counter() - began < seconds:
            status, _ = await ask(session, url, KEYS[number % len(KEYS)], random.getrandbits(32), steps)
            assert status == 200, status
            ends.append(time.perf_counter() - began)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return len(ends) / max(ends)


async def level(session: aiohttp.ClientSession, server: Server, rate: float, seconds: float, steps: int) -> tuple[list[Sample], list[list[Held]]]:
    """Requests that come `rate` a second, and what the processes held meanwhile."""
    arrivals = poisson(rate, max(1, round(rate * seconds)), seed=round(rate * 1000))
    began, held = time.perf_counter(), []

    async def one(number: int, at: float) -> Sample:
        await asyncio.sleep(at - (time.perf_counter() - began))
        key, sent = KEYS[number % len(KEYS)], time.perf_counter() - began
        status, told = await ask(session, server.url, key, number, steps)
        return Sample(key, at, sent, time.perf_counter() - began, status, told)

    async def watch() -> None:
        while True:
            held.append(await asyncio.to_thread(look, server.process.pid))
            await asyncio.sleep(max(1.0, seconds / 60))

    watching = asyncio.create_task(watch())
    samples = await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals)))
    watching.cancel()
    return samples, held


def waits(samples: Iterable[Sample]) -> list[tuple[int, float]]:
    """Of each refusal, what it was told to wait, and how long it really was until a request of its key was sent that was admitted."""
    admitted: dict[str, list[float]] = {}
    samples = list(samples)
    for sample in samples:
        if sample.status == 200:
            admitted.setdefault(sample.key, []).append(sample.sent)
    last = {key: max(times) for key, times in admitted.items()}
    found = []
    for sample in samples:
        if sample.status == 429 and sample.retry_after is not None and sample.sent < last.get(sample.key, 0):
            found.append((sample.retry_after, min(at for at in admitted[sample.key] if at > sample.sent) - sample.sent))
    return found


def roughly(told: int, real: float) -> bool:
    """One that waits so long finds room, and does not wait much longer than it must. Whole seconds is all that the header has."""
    return real <= told + 1 and told <= 3 * real + 3


def grown(held: list[list[Held]]) -> list[str]:
    """Processes that have more memory in the last fifth of a level than in the second."""
    faults, fifth = [], max(1, len(held) // 5)
    for first in held[0]:
        series = [h.uss for each in held for h in each if h.pid == first.pid]
        if len(series) < len(held):
            faults.append(f"{first.role} ({first.pid}) is gone")
            continue
        before, after = statistics.median(series[fifth : 2 * fifth]), statistics.median(series[-fifth:])
        if after > before * (1 + MEMORY) + SLACK:
            faults.append(f"{first.role} had {before / MiB:.0f} MiB and came to {after / MiB:.0f}")
    return faults


def judged(times: float, seconds: float, able: float, samples: list[Sample], held: list[list[Held]]) -> tuple[str, list[str]]:
    """A level's line of the table, and what is wrong with it."""
    statuses = Counter(sample.status for sample in samples)
    good = [sample for sample in samples if sample.status == 200]
    late = [sample for sample in good if sample.ended - sample.sent > DEADLINE_S + LATE_S]
    within = sum(sample.ended <= seconds for sample in good)
    goodput = within / seconds
    told = waits(samples)
    right = sum(roughly(*one) for one in told) / len(told) if told else 1.0
    faults = [f"{sum(statuses[s] for s in statuses if s not in (200, 429))} answers were neither 200 nor 429"] if statuses.keys() - {200, 429} else []
    if times > 1 and goodput < GOODPUT * able:
        faults.append(f"{goodput:.2f} pictures/s came, of {able:.2f} that it can do")
    if times < 1 and statuses[429]:
        faults.append("some were refused below capacity")
    if any(s.status == 429 and s.retry_after is None for s in samples):
        faults.append("a refusal had no Retry-After")
    if right < RIGHT:
        faults.append(f"Retry-After was roughly right for {right:.0%} alone")
    if late:
        faults.append(f"{len(late)} came after their deadline")
    faults += grown(held)
    latencies = [sample.latency for sample in good]
    shown = f"{statistics.median(t for t, _ in told):.0f} told, {statistics.median(r for _, r in told):.1f} real; {right:.0%}" if told else ""
    sizes = ", ".join(f"{h.uss / MiB:.0f}" for h in held[-1] if h.role in ("ImageGeneration", "StableDiffusion"))
    line = f"| {times:g} | {len(samples) / seconds:.2f} | {able:.2f} | {goodput:.2f} ({goodput / able:.0%}) | {', '.join(f'{s}: {n}' for s, n in sorted(statuses.items()))} | {shown} | {percentile(latencies, 0.5):.1f}, {percentile(latencies, 0.99):.1f} | {sizes} |"
    return line, [f"at {times:g} times capacity: {fault}" for fault in faults]


async def run(server: Server, seconds: float, measure_s: float, steps: int, levels: Iterable[float] = LEVELS, clients: int = 16) -> list[str]:
    """Every level; prints the table, returns what is wrong. `clients` measure what the server can do."""
    print("| load | asked/s | capacity/s | pictures/s | answers | Retry-After, s | latency p50, p99, s | MiB |\n| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    faults = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(DEADLINE_S + 60)) as session:
        await capacity(session, server.url, measure_s / 2, steps, clients)  # warm-up
        before = await capacity(session, server.url, measure_s, steps, clients)
        for times in levels:
            samples, held = await level(session, server, times * before, seconds, steps)
            after = await capacity(session, server.url, measure_s, steps, clients)
            line, wrong = judged(times, seconds, (before + after) / 2, samples, held)
            print(line, flush=True)
            faults += wrong
            before = after
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 0, 30, server)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5, help="of each level")
    parser.add_argument("--measure", type=float, default=20, metavar="SECONDS", help="of capacity, before and after each level")
    parser.add_argument("--steps", type=int, default=10, help="of each picture")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--keep", type=Path, help="a folder for the server's log")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with serving(folder, OVERRIDES, env={"API_KEY": ",".join(KEYS)}) as server:
            faults = asyncio.run(run(server, 60 * asked.minutes, asked.measure, asked.steps, asked.levels))
    print("\n" + ("\n".join(faults) if faults else "within all bounds"))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
