"""The bounded queue in front of a device, and the one thread that owns the device.

Others only submit and cancel. Keys take turns: a key with fifty requests waiting does not hold up
one with a single request. A slot is free only when the thread is really done with its work. Jobs that
can share a batch are taken together when the first of them has its turn.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from core import problems
from core.status import Progress, QueueStatus

log = logging.getLogger("easel.queue")
R = TypeVar("R")
W = TypeVar("W")


@dataclass(frozen=True)
class Share(Generic[W, R]):
    """How a job may be run together with others.

    Args:
        key: jobs with equal keys may share a batch.
        work: this job's part of it.
        rows: how much of a batch that takes, of `limit` in all.
        run: does all jobs' work, one outcome each; it calls `check_all` between its steps.
    """

    key: Hashable
    work: W
    rows: int
    limit: int
    run: Callable[[list[Job[R]], list[W]], list[R]]


@dataclass(eq=False)
class Job(Generic[R]):
    """Work on its way to the device: `run` does it, calling `check()` between its steps."""

    id: str
    client: str
    run: Callable[[Job[R]], R]
    deadline_s: float
    share: Share[Any, R] | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    progress: Progress | None = None
    future: Future[R] = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise the Problem that ends this job, if there is one: cancelled, or out of time."""
        if self._cancelled.is_set():
            raise problems.cancelled()
        if time.monotonic() - self.submitted > self.deadline_s:
            raise problems.deadline_passed(self.deadline_s)


def check_all(jobs: list[Job[R]]) -> None:
    """As `Job.check` for jobs that run together: one that has to end is told so at once, and the others
    go on; raise only where none is left."""
    if len(jobs) == 1:
        jobs[0].check()
        return
    for job in jobs:
        if not job.future.done():
            try:
                job.check()
            except problems.Problem as problem:
                job.future.set_exception(problem)
    if all(job.future.done() for job in jobs):
        raise problems.cancelled()


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
        self._mean_s: float | None = None
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
                    retry_after=self._wait_s(own if self._count < self.limit else self._count),
                )
            self._waiting.setdefault(job.client, OrderedDict())[job] = None
            self._by_id[job.id] = job
            self._count += 1
            self._changed.notify()
        return job.future

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
                _fail(waiting, problems.cancelled())
                return True
        return False

    def status(self) -> QueueStatus:
        with self._changed:
            progress = self._running[0].progress if self._running else None
            return QueueStatus(running=len(self._running), progress=progress, waiting=self._count, limit=self.limit, mean_service_s=self._mean_s)

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._running and self._count == 0

    def close(self) -> None:
        """End the thread after the job in hand; what still waits gets a 503."""
        with self._changed:
            self._closed = True
            for jobs in self._waiting.values():
                for job in jobs:
                    _fail(job, problems.unavailable("The service is shutting down.", retry_after=10))
            self._waiting.clear()
            self._by_id.clear()
            self._count = 0
            self._changed.notify()
        self._thread.join()

    def _wait_s(self, ahead: int) -> int:
        """Seconds until a place is likely to be free: one service time, at least a second."""
        return max(1, math.ceil((self._mean_s or 1) * min(ahead, 2)))

    def _next(self) -> list[Job[Any]]:
        """The next job in turn, the first of the key that has waited longest for its turn, and those
        that share its batch."""
        with self._changed:
            if not self._count and not self._closed:
                self._changed.wait(timeout=1)
            if not self._count:
                return []
            first = self._take(next(iter(self._waiting)))
            self._running = [first, *(self._companions(first.share) if first.share else [])]
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
            started = time.monotonic()
            jobs = []
            for job in taken:
                job.started = started
                if job.future.set_running_or_notify_cancel():  # if not, its caller has given up meanwhile
                    jobs.append(job)
            self._work(jobs, started)
            del jobs, job, taken

    def _work(self, jobs: list[Job[Any]], started: float) -> None:
        """Run jobs, alone or together, and tell their waiters."""
        outcomes: list[Any] = []
        failure: BaseException | None = None
        try:
            if len(jobs) == 1:
                jobs[0].check()
                outcomes = [jobs[0].run(jobs[0])]
            elif jobs:
                check_all(jobs)
                shares = [job.share for job in jobs if job.share is not None]
                outcomes = shares[0].run(jobs, [share.work for share in shares])
        except BaseException as error:
            failure = error
        self._finish(started)
        for i, job in enumerate(jobs):
            if job.future.done():
                continue
            if failure is not None:
                job.future.set_exception(failure)
            else:
                job.future.set_result(outcomes[i])

    def _finish(self, started: float) -> None:
        """Free the slot before the waiters hear of it, so that they see a free slot."""
        with self._changed:
            self._running = []
            took = time.monotonic() - started
            self._mean_s = took if self._mean_s is None else 0.8 * self._mean_s + 0.2 * took

    def _safely_rest(self) -> None:
        try:
            self._rest()
        except Exception:
            log.exception("housekeeping failed")


def _fail(job: Job[Any], problem: problems.Problem) -> None:
    """End a job that never ran."""
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(problem)
