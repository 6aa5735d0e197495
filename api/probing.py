"""Whether a worker lives, asked for all requests that wait for it together.

A runner that died leaves the calls to it hanging (BentoML starts another one behind the same socket), so those who wait
need to be told. api.backend waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from api.routing import Runner

log = logging.getLogger("easel.api")
EVERY_S = 2.0
TIMEOUT_S = 3.0
MISSED = 2  # a machine under load may be late once; a dead runner stays so


@dataclass(eq=False)
class _Watch:
    death: asyncio.Task[None]
    waiting: int = 0


_watches: dict[str, _Watch] = {}


@contextlib.contextmanager
def death(worker: str, runner: Runner) -> Iterator[asyncio.Task[None]]:
    """A task that is done once the worker has not answered for a while; one probe for all who wait for it at the same time."""
    watch = _watches.get(worker)
    if watch is None or watch.death.done():
        watch = _watches[worker] = _Watch(asyncio.ensure_future(_dead(runner)))
    watch.waiting += 1
    try:
        yield watch.death
    finally:
        watch.waiting -= 1
        if not watch.waiting:
            watch.death.cancel()
            if _watches.get(worker) is watch:
                del _watches[worker]


async def _dead(runner: Runner) -> None:
    missed = 0
    while missed < MISSED:
        await asyncio.sleep(EVERY_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):  # wait_for would lose a cancel that comes with the answer
                await runner.status()
            missed = 0
        except TimeoutError:
            missed += 1
        except Exception:  # a runner that shuts down takes no new connection, and finishes what it has;
            log.debug("no new connection to the runner")  # if it dies, the work's own connection breaks
