"""The bounded queue in front of a device, and the one thread that owns the device.

Others only submit and cancel. Keys take turns: a key with fifty requests waiting does not hold up
one with a single request. A slot is free only when the thread is really done with its work. Jobs that
can share a batch are taken together when the first of them has its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from core import metrics, problems
from core.status import PlanProgress, Progress, QueueStatus
from runners.turns import Turns
from runners.work import Job, Share, check_all

log = logging.getLogger("easel.queue")
R = TypeVar("R")


class DeviceQueue:
    """Jobs waiting by key, and the worker thread.

    Args:
        rest: called in the worker thread about once a second when nothing is waiting.
        limit: how many jobs may wait in all; `per_key`: how many of one key.
    """

    def __init__(self, rest: Callable[[], None], limit: int, per_key: int) -> None:
        self._rest, self.limit, self.per_key = rest, limit, per_key
        # By key, and of a key in the order of their coming; that, and the index by id, so that one among thousands is found at once.
        self._waiting: OrderedDict[str, OrderedDict[Job[Any], None]] = OrderedDict()
        self._by_id: dict[str, Job[Any]] = {}
        self._running: list[Job[Any]] = []
        self._count = 0
        self._turns = Turns()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job[R]) -> Future[R]:
        """Queue a job; its future holds the outcome.

        Raises:
            Problem: 429 with Retry-After when the queue, or the key's share of it, is full.
        """
        with self._changed:
            own = len(self._waiting.get(job.client, ()))
            if self._count >= self.limit or own >= self.per_key:
                whose = "queue is" if self._count >= self.limit else "key's share of the queue is"
                raise problems.problem(
                    429, "queue-full", "Too many requests",
                    f"The {whose} full ({self._count} requests wait). Try again later.",
                    retry_after=self._turns.wait_s(1 if self._count >= self.limit else len(self._waiting)),
                )
            self._waiting.setdefault(job.client, OrderedDict())[job] = None
            self._by_id[job.id] = job
            self._count += 1
            self._changed.notify()
        return job.future

    def join(self, key: Hashable, limit: int, taken: int, left: int, fit: Callable[[list[Any]], bool] = lambda _: True) -> list[Job[Any]]:
        """In the worker thread: jobs that may join the one that runs at its next step, one of each key in turn. A key's
        jobs keep their order. Once one has its turn that cannot join, only those that take no longer than what is running
        join: they do not make it wait for more steps.

        Args:
            key: of their `Share`.
            limit: how many rows may run at once, of which `taken` are; a job of more rows counts as `limit`.
            left: the steps until all that is running is done.
            fit: whether jobs' works may run beside what is running.
        """
        joined: list[Job[Any]] = []
        with self._changed:
            barred, found = False, True
            while found:
                found = False
                for client in list(self._waiting):
                    share = next(iter(self._waiting[client])).share
                    rows = min(share.rows, limit) if share else 0
                    if share is None or share.key != key or taken + rows > limit or not fit([*(job.share.work for job in joined if job.share), share.work]):
                        barred = True
                    elif not barred or share.steps <= left:
                        joined.append(self._take(client))
                        taken += rows
                        found = True
            self._running += joined
            self._freed(len(joined))
        return [job for job in joined if self._begun(job)]

    def settle(self, job: Job[R], outcome: Callable[[], R]) -> None:
        """In the worker thread: tell one job's waiter what `outcome` returns or raises, while others go on."""
        result, failure = None, None
        try:
            result = outcome()
        except BaseException as error:
            failure = error
        with self._changed:
            self._running.remove(job)
            self._measure(job)
        if failure is not None:
            job.future.set_exception(failure)
        else:
            job.future.set_result(cast(R, result))

    def cancel(self, job_id: str) -> bool:
        """Stop a job, waiting or running (then at its next step); False for an unknown one."""
        with self._changed:
            for job in self._running:
                if job.id == job_id:
                    job.cancel()
                    return True
            if waiting := self._by_id.get(job_id):
                jobs = self._waiting[waiting.client]
                self._leave(jobs, waiting)
                if not jobs:
                    del self._waiting[waiting.client]
                waiting.fail(problems.cancelled())
                return True
        return False

    def progress(self, job_id: str, watch_s: float = 0) -> PlanProgress:
        """How one job is; for so long, its previews are made."""
        with self._changed:
            if waiting := self._by_id.get(job_id):
                waiting.watched_until = max(waiting.watched_until, time.monotonic() + watch_s)
                return PlanProgress(state="waiting", position=1 + self._ahead(waiting))
            for job in self._running:
                if job.id == job_id:
                    job.watched_until = max(job.watched_until, time.monotonic() + watch_s)
                    shown = (job.preview, job.preview_step) if watch_s else (None, None)
                    return PlanProgress(state="running", progress=job.progress, preview=shown[0], preview_step=shown[1])
        return PlanProgress()

    def _ahead(self, job: Job[Any]) -> int:
        """How many that wait have their turn before a job, if none comes to share a batch."""
        place = list(self._waiting[job.client]).index(job)
        earlier, ahead = True, place
        for client, jobs in self._waiting.items():
            if client == job.client:
                earlier = False
            else:
                ahead += min(len(jobs), place + earlier)
        return ahead

    def status(self) -> QueueStatus:
        with self._changed:
            progress = _all(list({id(job.progress): job.progress for job in self._running if job.progress}.values()))  # a batch of alike jobs has one
            return QueueStatus(running=len(self._running), progress=progress, waiting=self._count, limit=self.limit, mean_service_s=self._turns.mean_s)

    @property
    def stalled_s(self) -> float:
        """How long what is running has come to no step; 0 where nothing runs."""
        with self._changed:
            now = time.monotonic()
            return now - max((max(job.stepped, job.started or now) for job in self._running), default=now)

    def abandon(self, running: problems.Problem, waiting: problems.Problem) -> None:
        """Tell all who wait, since the thread does not come back; the process is to end after that."""
        with self._changed:
            self._closed = True
            for job in self._running:
                if not job.future.done():
                    job.future.set_exception(running)
            self._fail_waiting(waiting)

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._running and self._count == 0

    def close(self) -> None:
        """End the thread after the job in hand; what still waits gets a 503."""
        with self._changed:
            self._closed = True
            self._fail_waiting(problems.unavailable("The service is shutting down.", retry_after=10))
            self._changed.notify()
        self._thread.join()

    def _fail_waiting(self, problem: problems.Problem) -> None:
        for jobs in self._waiting.values():
            for job in jobs:
                job.fail(problem)
        self._waiting.clear()
        self._by_id.clear()
        self._count = 0

    def _freed(self, places: int) -> None:
        if self._count:
            self._turns.freed(places)
        else:
            self._turns.forget()

    def _next(self) -> list[Job[Any]]:
        """The next job in turn, the first of the key that has waited longest for its turn, and those
        that share its batch."""
        with self._changed:
            if not self._count and not self._closed:
                self._changed.wait(timeout=1)
            if not self._count:
                return []
            first = self._take(next(iter(self._waiting)))
            self._running = [first, *(self._companions(first.share) if first.share and first.share.run else [])]
            self._freed(len(self._running))
            return list(self._running)

    def _take(self, client: str) -> Job[Any]:
        jobs = self._waiting.pop(client)
        job = next(iter(jobs))
        self._leave(jobs, job)
        if jobs:
            self._waiting[client] = jobs  # at the back: the other keys come first
        return job

    def _leave(self, jobs: OrderedDict[Job[Any], None], job: Job[Any]) -> None:
        del jobs[job]
        if self._by_id.get(job.id) is job:
            del self._by_id[job.id]
        self._count -= 1

    def _companions(self, share: Share[Any, Any]) -> list[Job[Any]]:
        """Jobs that fill the batch, one of each key in turn. A key's jobs keep their order, so that only
        its next one is looked at."""
        companions, room, found = [], share.limit - share.rows, True
        while room > 0 and found:
            found = False
            for client in list(self._waiting):
                head = next(iter(self._waiting[client])).share
                if head is not None and head.key == share.key and head.rows <= room:
                    companions.append(self._take(client))
                    room -= head.rows
                    found = True
        return companions

    def _run(self) -> None:
        while not self._closed:
            taken = self._next()
            if not taken:
                self._safely_rest()
                continue
            jobs = [job for job in taken if self._begun(job)]
            self._work(jobs)
            del jobs, taken

    def _begun(self, job: Job[Any]) -> bool:
        """Tell a job that it runs now; False where its caller has given up meanwhile."""
        job.started = time.monotonic()
        metrics.WAIT_SECONDS.labels(metrics.here()).observe(job.started - job.submitted)
        if job.future.set_running_or_notify_cancel():
            return True
        with self._changed:
            self._running.remove(job)
        return False

    def _work(self, jobs: list[Job[Any]]) -> None:
        """Run jobs, alone or together, and tell their waiters."""
        outcomes: list[Any] = []
        failure: BaseException | None = None
        try:
            if len(jobs) == 1:
                jobs[0].check()
                outcomes = [jobs[0].context.copy().run(jobs[0].run, jobs[0])]
            elif jobs:
                check_all(jobs)
                shares = [job.share for job in jobs if job.share is not None]
                run = shares[0].run
                assert run is not None
                outcomes = jobs[0].context.copy().run(run, jobs, [share.work for share in shares])
        except BaseException as error:
            failure = error
        told = dict(zip((job.id for job in jobs), outcomes, strict=False))
        for job in self._finish():
            if job.future.done():
                continue
            if failure is not None:
                job.future.set_exception(failure)
            else:
                job.future.set_result(told[job.id])

    def _finish(self) -> list[Job[Any]]:
        """Free the slot before the waiters hear of it, so that they see a free slot; returns those who were not told yet."""
        with self._changed:
            left, self._running = self._running, []
            if left:
                self._measure(left[0])
        return left

    def _measure(self, job: Job[Any]) -> None:
        self._turns.served(time.monotonic() - (job.started or job.submitted))

    def _safely_rest(self) -> None:
        try:
            self._rest()
        except Exception:
            log.exception("housekeeping failed")


def _all(progress: list[Progress]) -> Progress | None:
    """The progress of all jobs that run together."""
    if not progress:
        return None
    steps = [p.steps for p in progress if p.steps is not None]
    return Progress(model_id=progress[0].model_id, steps_done=sum(p.steps_done for p in progress), steps=sum(steps) if len(steps) == len(progress) else None)
