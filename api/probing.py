"""Whether a worker lives, asked for all requests that wait for it together.

A runner that died may leave the calls to it hanging (BentoML starts another one behind the same socket), so those who wait
need to be told. One that is only slow, on a machine that others use, keeps its work: its process is looked at as well, where it is on
this machine, and what hangs in it is runners.watchdog's to end. api.backend waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from api.routing import Runner
from core import settings
from core.placement import addresses

log = logging.getLogger("easel.api")
EVERY_S = 2.0
TIMEOUT_S = 3.0
MISSED = 2  # of a runner whose process is gone
MISSED_UNSEEN = 6  # of one whose process is not to be seen from here, which may be slow


@dataclass(eq=False)
class _Watch:
    death: asyncio.Task[None]
    waiting: int = 0


_watches: dict[str, _Watch] = {}
_processes: dict[str, psutil.Process] = {}


@contextlib.contextmanager
def death(worker: str, runner: Runner) -> Iterator[asyncio.Task[None]]:
    """A task that is done once the worker has not answered for a while; one probe for all who wait for it at the same time."""
    watch = _watches.get(worker)
    if watch is None or watch.death.done():
        watch = _watches[worker] = _Watch(asyncio.ensure_future(_dead(worker, runner)))
    watch.waiting += 1
    try:
        yield watch.death
    finally:
        watch.waiting -= 1
        if not watch.waiting:
            watch.death.cancel()
            if _watches.get(worker) is watch:
                del _watches[worker]


def seen(worker: str, pid: int | None) -> None:
    """A worker has answered, from this process."""
    known = _processes.get(worker)
    if pid is None or (known and known.pid == pid) or worker in addresses(settings.load()):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        _processes[worker] = psutil.Process(pid)


def _lives(worker: str) -> bool | None:
    """Whether the process that answered last is there; None where it is not known."""
    if (process := _processes.get(worker)) is None:
        return None
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _dead(worker: str, runner: Runner) -> None:
    missed = 0
    while missed < MISSED or (lives := _lives(worker)) or (lives is None and missed < MISSED_UNSEEN):
        await asyncio.sleep(EVERY_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):  # wait_for would lose a cancel that comes with the answer
                status = await runner.status()
            seen(worker, status.pid)
            missed = 0
        except TimeoutError:
            missed += 1
        except Exception:  # a runner that shuts down takes no new connection, and finishes what it has;
            log.debug("no new connection to the runner")  # if it dies, the work's own connection breaks
