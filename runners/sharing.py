"""What a runner has in hand, each piece of work once, however many requests ask for the very same.

Every waiter has its own deadline and may leave at any time; the work is cancelled when the last has left. runners.diffusion
asks, and only its event loop's thread comes here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from core import problems
from core.generation import Generation
from core.plans import Plan


@dataclass(eq=False)
class Work:
    """A plan that was submitted. `id` is its job's; `waiters` are those who wait for it, by their plans' ids: done when one is to leave."""

    id: str
    outcome: asyncio.Future[Generation]
    waiters: dict[str, asyncio.Future[None]] = field(default_factory=dict)


class InHand:
    """The work in hand.

    Args:
        cancel: stops a job by its id.
        most: how many may wait for one piece of work; more submit their own, and the queue's bounds hold.
    """

    def __init__(self, cancel: Callable[[str], object], most: int) -> None:
        self._cancel, self._most = cancel, most
        self._works: dict[bytes, Work] = {}
        self._of: dict[str, Work] = {}

    async def done(self, plan: Plan, submit: Callable[[Plan], Future[Generation]], waited_s: float = 0) -> Generation:
        """What comes of a plan, or of an equal one that is in hand: of the same client, with the same seeds and all else, but id
        and deadline.

        Args:
            submit: queues a plan; it gets one without a deadline, which is kept here.
            waited_s: how much of the deadline has passed.

        Raises:
            Problem: what `submit` or the work raises; 499 where `leave` was called, 504 at the deadline.
        """
        key = plan.identity
        work = self._works.get(key)
        if work is None or len(work.waiters) >= self._most:
            work = Work(plan.id, asyncio.wrap_future(submit(plan.model_copy(update={"deadline_s": math.inf}))))
            self._works[key] = work
            work.outcome.add_done_callback(partial(self._ended, key, work))
        leaving = work.waiters[plan.id] = asyncio.get_running_loop().create_future()
        self._of[plan.id] = work
        try:
            await asyncio.wait({work.outcome, leaving}, timeout=plan.deadline_s - waited_s, return_when=asyncio.FIRST_COMPLETED)
            if work.outcome.done():
                return _own(work.outcome.result())
            raise problems.cancelled() if leaving.done() else problems.deadline_passed(plan.deadline_s)
        finally:
            if work.waiters.get(plan.id) is leaving:  # else the same plan was sent once more
                del work.waiters[plan.id], self._of[plan.id]
            if not work.waiters and not work.outcome.done():
                self._forget(key, work)
                self._cancel(work.id)

    def leave(self, plan_id: str) -> bool:
        """Have a plan's waiter told that it was cancelled; the others go on. False for an unknown one."""
        work = self._of.get(plan_id)
        if work is None or work.waiters[plan_id].done():
            return False
        work.waiters[plan_id].set_result(None)
        return True

    def job_of(self, plan_id: str) -> str:
        """The id of the job that a plan waits for; its own for an unknown one."""
        return work.id if (work := self._of.get(plan_id)) else plan_id

    def _ended(self, key: bytes, work: Work, outcome: asyncio.Future[Generation]) -> None:
        self._forget(key, work)
        if not outcome.cancelled():
            outcome.exception()  # where nobody waits for it any more, asyncio would report it

    def _forget(self, key: bytes, work: Work) -> None:
        """Nobody else joins it."""
        if self._works.get(key) is work:
            del self._works[key]


def _own(generation: Generation) -> Generation:
    """A copy whose `ran` is the waiter's own to add to."""
    return generation.model_copy(update={"ran": generation.ran and generation.ran.model_copy(deep=True)})
