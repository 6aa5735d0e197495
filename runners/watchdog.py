"""Ends a runner whose work hangs, so that it is started anew: BentoML does that with a process that has ended.

runners.diffusion has `watch` run on its event loop. What hangs with the interpreter's lock held stops that loop too; then a
thread of `faulthandler`, which needs no lock, ends the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os

from core.problems import problem, runner_gone
from runners.queue import DeviceQueue

log = logging.getLogger("easel.runner")
EVERY_S = 1.0
TELL_S = 1.0  # what answers get to leave before the process ends
STATUS = 70  # of the process: EX_SOFTWARE


async def watch(queue: DeviceQueue, hang_timeout_s: float) -> None:
    """Until the process ends: tell those who wait for work that comes to no step for `hang_timeout_s`, and end the process. Where
    the loop itself stands still, those who wait see their connection break. Either way every thread's stack goes to stderr."""
    while queue.stalled_s < hang_timeout_s:
        faulthandler.dump_traceback_later(hang_timeout_s + EVERY_S + TELL_S, exit=True)
        await asyncio.sleep(min(EVERY_S, hang_timeout_s / 4))
    log.critical("the device's work came to no step for %g s; this process ends", hang_timeout_s)
    faulthandler.dump_traceback()
    detail = f"The work made no progress for {hang_timeout_s:g} s (queue.hang_timeout_s); the runner is being restarted. The server's log has where it hung."
    queue.abandon(problem(500, "hung", "Hung", detail), runner_gone())
    await asyncio.sleep(TELL_S)
    os._exit(STATUS)
