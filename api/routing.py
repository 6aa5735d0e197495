"""Which of a runner's workers gets a plan: the one that has its model, then the least loaded.

api.backend asks, and tells what it has in hand at each worker. A worker that does not answer is set
aside until it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from core.generation import Generation
from core.plans import Plan
from core.status import PlanProgress, RunnerStatus

log = logging.getLogger("easel.api")
ASK_S = 3.0  # how long a request waits for the statuses; one that loads a model may be late
RETRY_S = 0.5
LOADS, EVICTS = 0.5, 4  # what loading a model costs, in requests that one would rather wait for; more where others must go


class Runner(Protocol):
    """What api needs of a worker's service."""

    async def run(self, plan: Plan) -> Generation: ...
    async def cancel(self, plan_id: str) -> bool: ...
    async def unload(self, model_id: str) -> int: ...
    async def status(self) -> RunnerStatus: ...
    async def progress(self, plan_id: str, preview: bool) -> PlanProgress: ...


# (worker, model) of what this process has in hand; the size of each model seen; workers that do not answer.
_given: Counter[tuple[str, str]] = Counter()
_sizes: dict[str, int] = {}
_aside: dict[str, asyncio.Task[None]] = {}


async def choose(workers: dict[str, Runner], model_id: str) -> str:
    """The worker for a plan.

    A worker's cost is the requests that it has, plus LOADS where it does not have the model, or EVICTS
    where it would have to unload others for it. So a model stays where it is; while its worker is busy
    another one takes it, if it has room; and a queue grows longer before a model is driven out. Of
    equal costs, the worker with the least in memory.
    """
    able = {name: runner for name, runner in workers.items() if name not in _aside} or workers
    if len(able) == 1:
        return next(iter(able))
    asked = {name: asyncio.ensure_future(runner.status()) for name, runner in able.items()}
    await asyncio.wait(asked.values(), timeout=ASK_S)
    statuses: dict[str, RunnerStatus] = {}
    for name, answer in asked.items():
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            statuses[name] = answer.result()
        else:
            answer.cancel()
            set_aside(name, able[name])
    for status in statuses.values():
        _sizes.update({m.model_id: max(m.resident_bytes, _sizes.get(m.model_id, 0)) for m in status.models if m.state == "warm"})
    staying = {name: status for name, status in statuses.items() if not status.draining}
    if not staying:
        return min(able, key=_in_hand)
    return min(staying, key=lambda name: (_cost(name, staying[name], model_id), staying[name].resident_bytes))


@contextlib.contextmanager
def in_hand(worker: str, model_id: str) -> Iterator[None]:
    """Count a plan as given to a worker, before its status can tell."""
    _given[worker, model_id] += 1
    try:
        yield
    finally:
        _given[worker, model_id] -= 1
        if not _given[worker, model_id]:
            del _given[worker, model_id]


def set_aside(worker: str, runner: Runner) -> None:
    """Give a worker nothing until it answers again."""
    if worker not in _aside:
        log.warning("%s does not answer; others take its work", worker)
        _aside[worker] = asyncio.ensure_future(_until_back(worker, runner))


async def _until_back(worker: str, runner: Runner) -> None:
    try:
        while True:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(runner.status(), 3)
                log.warning("%s answers again", worker)
                return
            await asyncio.sleep(RETRY_S)
    finally:
        _aside.pop(worker, None)


def _in_hand(worker: str) -> int:
    return sum(count for (name, _), count in _given.items() if name == worker)


def _cost(worker: str, status: RunnerStatus, model_id: str) -> float:
    load = max(status.queue.running + status.queue.waiting, _in_hand(worker))
    here = {m.model_id for m in status.models if m.state in ("warm", "loading", "downloading")}
    if model_id in here or _given[worker, model_id] > 0:
        return load
    room = status.memory_budget_bytes - status.resident_bytes
    return load + (LOADS if room >= _sizes.get(model_id, 0) else EVICTS)
