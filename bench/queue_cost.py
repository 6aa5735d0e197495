"""What a waiting request costs: `.venv/bin/python bench/queue_cost.py` writes its section of bench/results.md.

In this process, a device's queue is filled with 10,000 requests of many keys behind one that holds the device; then adding to it,
reading its state and taking a request out again are timed, each at that length, and the process's memory is compared with before. Over
HTTP, hundreds of clients wait for pictures at a real server, whose processes' memory is compared with before.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import turns
from arrivals import percentile
from scenarios import STARTER
from turns import ROOT, Server

sys.path.insert(0, str(ROOT))
from core import settings
from core.catalogue import Catalogue
from core.plans import Plan
from core.requests import GenerationRequest
from runners import loading
from runners.device import Device
from runners.work import Job

SECTION = "## Waiting requests"
KEYS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=2000, help="how often each is timed")
    parser.add_argument("--clients", type=int, default=400, help="that wait over HTTP; 0: none")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    lines = [SECTION, "", turns.where("bench/queue_cost.py", load), "", *in_process(options.waiting, options.times)]
    turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    if options.clients:
        lines += over_http(options.clients)
        turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    print("\n".join(lines))


def in_process(waiting: int, times: int) -> list[str]:
    """Milliseconds and KiB at a device's queue."""
    os.environ |= {"EASEL_QUEUE__LIMIT": str(2 * waiting), "EASEL_QUEUE__PER_KEY": str(2 * waiting)}
    configured = settings.load()
    catalogue = Catalogue(configured)
    device = Device(configured, catalogue)
    path, go = loading.fetch(catalogue.find(STARTER), None), threading.Event()
    device.queue.submit(Job("held", "held", lambda _: go.wait(), 3600))

    def plan(number: int) -> Plan:
        return catalogue.plan(GenerationRequest(prompt=f"red apple on table {number}", model_id=STARTER, seed=number), None, f"key {number % KEYS}")

    before = memory([os.getpid()])
    futures = [device.submit(plan(number), path) for number in range(waiting)]
    each = (memory([os.getpid()]) - before) / waiting
    extra = [plan(waiting + number) for number in range(times)]
    took: dict[str, list[float]] = {"add one": [], "read the state": [], "take one out": []}

    def timed(kind: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        work()
        took[kind].append(1000 * (time.perf_counter() - began))

    for one in extra:
        timed("add one", lambda one=one: futures.append(device.submit(one, path)))
        timed("read the state", device.queue.status)
        timed("take one out", lambda one=one: device.queue.cancel(one.id))
    assert device.queue.status().waiting == waiting
    for future in futures:
        future.cancel()
    go.set()
    device.queue.close()
    return [
        f"A device's queue with {waiting} requests of {KEYS} keys waiting; adding counts the estimate of the request's memory:",
        "",
        "| what | ms, median | p95 | p99 |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {kind} | {statistics.median(some):.3f} | {percentile(some, 0.95):.3f} | {percentile(some, 0.99):.3f} |" for kind, some in took.items()),
        "",
        f"- Memory of a waiting request in the runner's process, its plan included: {each:.1f} KiB.",
    ]


def over_http(clients: int) -> list[str]:
    """KiB of a server's processes for each client that waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8 * clients)), hard))
    with tempfile.TemporaryDirectory() as folder, Server(env={"EASEL_USAGE__PATH": f"{folder}/usage.sqlite3"}) as server:
        server.start_with("/post_config", {"prompt": "red apple", "model_id": STARTER, "num_inference_steps": 2, "seed": 1})
        each = asyncio.run(_waiting(server, clients))
    return [f"- Memory of a client that waits over HTTP, in all of the server's processes, connection and all: {each:.1f} KiB ({clients} clients)."]


async def _waiting(server: Server, clients: int) -> float:
    processes = [server.pid, *(p.pid for p in psutil.Process(server.pid).children(recursive=True))]
    params = {"prompt": "red apple", "model_id": STARTER, "num_inference_steps": 150}
    headers = {"X-API-Key": server.key}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)) as session:

        async def ask(seed: int) -> int:
            async with session.post(server.url + "/post_config", params={**params, "seed": seed}, headers=headers) as answer:
                await answer.read()
                return answer.status

        async def state() -> int:
            async with session.get(server.url + "/buffer_status", headers=headers) as answer:
                return int((await answer.json())["queue"]["waiting"])

        first = [asyncio.create_task(ask(seed)) for seed in range(1, 33)]  # so that a batch is running, and buffers have grown
        await asyncio.sleep(5)
        before, waited = await asyncio.to_thread(memory, processes), await state()
        rest = [asyncio.create_task(ask(seed)) for seed in range(100, 100 + clients)]
        end = time.monotonic() + 120
        while (now := await state()) < waited + 0.95 * clients and time.monotonic() < end:
            await asyncio.sleep(1)
        each = (await asyncio.to_thread(memory, processes) - before) / (now - waited)
        answered = [task.result() for task in rest if task.done()]
        for task in [*first, *rest]:
            task.cancel()
        await asyncio.gather(*first, *rest, return_exceptions=True)
    if answered and any(status != 200 for status in answered):
        raise RuntimeError(f"clients did not wait: {answered[:5]}")
    return each


def memory(processes: list[int]) -> float:
    """KiB that processes have for themselves."""
    gc.collect()
    return sum(psutil.Process(pid).memory_full_info().uss for pid in processes) / 1024


if __name__ == "__main__":
    main()
