"""A job on its way to a device, and what it says of being run together with others. runners.queue has them wait."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from core import problems
from core.plans import Pixels
from core.status import Progress

R = TypeVar("R")
W = TypeVar("W")


@dataclass(frozen=True)
class Share(Generic[W, R]):
    """How a job may be run together with others.

    Args:
        key: jobs with equal keys may share a batch.
        work: this job's part of it.
        rows: how much of a batch that takes, of `limit` in all.
        run: does all jobs' work, one outcome each; it calls `check_all` between its steps. None where others join
            while the job's own `run` goes on, which takes them by `DeviceQueue.join` and tells them by `settle`.
        steps: how many it takes, where others may join.
    """

    key: Hashable
    work: W
    rows: int
    limit: int
    run: Callable[[list[Job[R]], list[W]], list[R]] | None = None
    steps: int = 0


@dataclass(eq=False)
class Job(Generic[R]):
    """Work on its way to the device: `run` does it, calling `check()` between its steps."""

    id: str
    client: str
    run: Callable[[Job[R]], R]
    deadline_s: float
    share: Share[Any, R] | None = None
    submitted: float = field(default_factory=time.monotonic)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # of who submits it: the request's id, for logs
    started: float | None = None
    stepped: float = 0  # when it last came to a step
    progress: Progress | None = None
    watched_until: float = 0  # of time.monotonic: previews are made so long
    preview: Pixels | None = None
    preview_step: int | None = None
    previewed: float = 0  # when it was made
    future: Future[R] = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise the Problem that ends this job, if there is one: cancelled, or out of time."""
        self.stepped = time.monotonic()
        if self._cancelled.is_set():
            raise problems.cancelled()
        if time.monotonic() - self.submitted > self.deadline_s:
            raise problems.deadline_passed(self.deadline_s)

    def fail(self, problem: problems.Problem) -> None:
        """End a job that never ran."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(problem)


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
