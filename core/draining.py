"""Orderly shutdown: on SIGTERM, or when the server's first process has died, finish what is in hand before this one stops listening.

uvicorn stops answering at once, and BentoML stops the entry and its runners together, so a
picture in the making would be lost between them. This holds the signal back: new work is refused
with 503, readiness turns false, and the server's own handler runs once nothing is in hand. What the grace time is too short
for is ended with 503: uvicorn would wait for it for good, or cut it off with 500.

BentoML's workers outlive the process that started them where that is killed (by the kernel, for want of memory, say), and
would keep the device's memory for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from core.problems import Problem, unavailable

log = logging.getLogger("easel.draining")
PARENT_EVERY_S = 1.0
ENDING_S = 5.0  # for what is ended to be answered


class Draining:
    """Whether this process is on its way out, and what it still has in hand.

    Args:
        grace_s: how long to wait for the work in hand.
        linger_s: how long to stay after the last work: long enough for a load balancer to see that
            readiness is gone, or for the entry to fetch what a runner has made.
    """

    def __init__(self, grace_s: float, linger_s: float) -> None:
        self.grace_s, self.linger_s = grace_s, linger_s
        self.active = False
        self.over = False  # the grace time is
        self._ends: dict[object, Callable[[], object]] = {}  # what ends each thing in hand

    @property
    def in_hand(self) -> int:
        return len(self._ends)

    @contextlib.contextmanager
    def holding(self, end: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Something is in hand until the block is left; `end` has it left when the grace time is over."""
        token = object()
        self._ends[token] = end
        try:
            yield
        finally:
            del self._ends[token]

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """As `holding`, for a request that the current task answers.

        Raises:
            Problem: 503, within the block, when the grace time is over.
        """
        task = asyncio.current_task()
        assert task is not None
        try:
            with self.holding(task.cancel):
                yield
        except asyncio.CancelledError:
            if not self.over:
                raise
            task.uncancel()
            raise self.refuse() from None

    def install(self) -> None:
        """Put this before the handlers of SIGTERM and SIGINT, and end with the parent process; call it on the running event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, self._handler(loop, before))
        self._following = loop.create_task(_end_with(os.getppid()))

    def refuse(self) -> Problem:
        return unavailable("The service is shutting down.", retry_after=10, slug="draining")

    def _handler(self, loop: asyncio.AbstractEventLoop, before: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if self.over:  # a third signal
                before(number, frame)
            elif self.active:  # a second one: at once
                self.over = True
            else:
                self.active = True
                loop.call_soon_threadsafe(lambda: loop.create_task(self._wait(number, before)))

        return handle

    async def _wait(self, number: int, before: Callable[[int, FrameType | None], object]) -> None:
        log.info("shutting down: %d requests in hand", self.in_hand)
        if not await self._quiet(self.grace_s, self.linger_s):
            self.over = True
            log.warning("shutting down: %d requests in hand are ended, as the grace time is over", self.in_hand)
            for end in list(self._ends.values()):
                end()
            await self._quiet(ENDING_S, 0, ending=True)
        before(number, None)

    async def _quiet(self, within_s: float, linger_s: float, ending: bool = False) -> bool:
        """Whether nothing was in hand for so long, before the time was over; the grace time is by a second signal, too."""
        quiet_since = time.monotonic()
        end = quiet_since + within_s
        while time.monotonic() < end and (ending or not self.over):
            if self.in_hand:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since >= linger_s:
                return True
            await asyncio.sleep(0.05)
        return not self.in_hand


async def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_EVERY_S)
    log.error("the process that started this one has died, so this one ends")
    os.kill(os.getpid(), signal.SIGTERM)
