"""The process's part in the jobs of the store: it claims them, has its runners do them, and puts down how they are.

api.jobs takes jobs and tells of them; any process with the same store may do them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from api import backend, usage
from api.backend import SERVICES
from api.routing import Runner
from api.tasks import Task, of_job
from api.webhooks import Event, Webhooks
from core import images, logs, problems, tracing
from core.draining import Draining
from core.generation import Generation
from core.job_store import Store
from core.jobs import Job
from core.placement import runner_of
from core.plans import Plan
from core.problems import Problem
from core.status import RunnerStatus

log = logging.getLogger("easel.jobs")
POLL_S = 1.0  # how often the store is asked for what other processes took in
CLOSE_S = 5.0  # what webhooks on their way get when the process ends
_PUT_AGAIN_S = (0.5, 1.0, 2.0, 4.0)  # between tries of a change that the store does not take
FOLLOW_S = 0.5  # how often a runner is asked how a job of its is
# Problems that end an attempt, not the job: its runner died or shuts down (that counts), or has no room for it now.
_GONE, _FULL = (problems.GONE, "draining", "unavailable"), ("queue-full",)


class Work:
    """The jobs that this process does, on its event loop."""

    def __init__(self, store: Store, draining: Draining, webhooks: Webhooks) -> None:
        self.store, self.draining, self.webhooks = store, draining, webhooks
        self._doing: dict[str, asyncio.Task[None]] = {}
        self._down: dict[str, asyncio.Task[None]] = {}  # runners that do not answer; their jobs are left to others meanwhile
        self._woken = asyncio.Event()
        self._begun: set[str] = set()  # whose webhooks know that they run
        self._loops = [asyncio.create_task(loop()) for loop in (self._claiming, self._beating)]

    def wake(self) -> None:
        """There is a new job."""
        self._woken.set()

    async def close(self) -> None:
        """Give back what is not done."""
        for task in (*self._loops, *self._doing.values(), *self._down.values()):
            task.cancel()
        await asyncio.gather(*self._loops, *self._doing.values(), return_exceptions=True)
        await self.webhooks.close(CLOSE_S)
        await asyncio.to_thread(self.store.close)

    async def _claiming(self) -> None:
        while not backend.started():
            await asyncio.sleep(0.1)
        while not self.draining.active:
            with _logged():
                room = self.store.settings.at_once - len(self._doing)
                here = sorted(({runner_of(worker) for worker in backend.workers()} & SERVICES.keys()) - self._down.keys())
                for job in await asyncio.to_thread(self.store.claim, here, room) if here and room > 0 else []:
                    task = self._doing[job.id] = asyncio.create_task(self._held(job))
                    task.add_done_callback(partial(self._done, job.id))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):  # wait_for would lose a cancel that comes with a wake
                    await self._woken.wait()
            self._woken.clear()

    def _done(self, id: str, _: object) -> None:
        self._doing.pop(id, None)
        self.wake()

    async def _beating(self) -> None:
        while True:
            with _logged():
                await asyncio.to_thread(self.store.beat, list(self._doing))
                for job in await asyncio.to_thread(self.store.sweep):
                    self.webhooks.send(job, "completed")
            await asyncio.sleep(self.store.settings.lease_s / 3)

    async def _held(self, job: Job) -> None:
        with self.draining.holding():
            await self._do(job)

    async def _do(self, job: Job) -> None:
        """One attempt."""
        gone = asyncio.Event()
        logs.begin(None, job.id)
        try:
            plan, wanted, accept = await asyncio.to_thread(self.store.work, job.id)
            logs.begin(plan.request_id, job.id)
            task = of_job(job.task)
            try:
                follow = partial(self._follow, job.id, plan, gone)
                with tracing.span("job"):
                    generation = await backend.generate(plan, None, task.service, gone=gone, follow=follow)
                await usage.record(plan, generation)
            except Problem as problem:
                await self._failed(job, problem)
            else:
                outputs = _outputs(task, task.model.model_validate_json(wanted), generation, accept)
                await self._put(self.store.finish, job.id, "succeeded", generation, outputs)
        except asyncio.CancelledError:
            await self._put(self.store.release, job.id, 0, False)
            raise
        except Exception:
            log.exception("%s failed", job.id)
            error = problems.problem(500, "internal", "Internal error", f"The server failed; its log has the cause, by {job.id}.")
            await self._put(self.store.finish, job.id, "failed", None, None, error.details)
        finally:
            self._begun.discard(job.id)

    async def _failed(self, job: Job, problem: Problem) -> None:
        """Try again, elsewhere perhaps, or end the job."""
        slug, now = problem.details.type.rsplit(":", 1)[-1], await asyncio.to_thread(self.store.mine, job.id)
        if now is None:
            return
        if now.status == "canceling":
            await self._put(self.store.finish, job.id, "canceled")
        elif slug == "cancelled" or (slug == "draining" and self.draining.active):  # by ourselves, on the way out
            await self._put(self.store.release, job.id, 0, False)
        elif slug in _FULL or (slug in _GONE and now.attempts < self.store.settings.attempts):
            log.info("%s is tried again: %s", job.id, problem.details.detail)
            if slug in _GONE and job.service not in self._down:
                self._down[job.service] = asyncio.create_task(self._until_back(job.service))
            await self._put(self.store.release, job.id, 1 if slug in _FULL else 0, slug in _GONE)
        else:
            await self._put(self.store.finish, job.id, "failed", None, None, problem.details)

    async def _until_back(self, service: str) -> None:
        try:
            while True:
                with _logged():
                    states = await backend.statuses()
                    if any(isinstance(state, RunnerStatus) and not state.draining for name, state in states.items() if runner_of(name) == service):
                        return
                await asyncio.sleep(POLL_S)
        finally:
            del self._down[service]
            self.wake()

    async def _put(self, call: Callable[..., Any], *args: Any) -> None:
        """A change that must not be lost, to a cancel, or to a store that is away or full for a while; where it ends the job, its webhook is told."""
        for wait in (*_PUT_AGAIN_S, None):
            try:
                job = await asyncio.shield(asyncio.to_thread(call, *args))
                break
            except SQLAlchemyError:
                if wait is None:
                    raise
                log.exception("jobs: the store does not take a change; it is tried again")
                await asyncio.sleep(wait)
        if job is not None:
            events: list[Event] = ["start", "output", "completed"]
            told = {"start"} if job.id in self._begun else set()
            told |= set() if job.status == "succeeded" else {"output"}
            self.webhooks.send(job, *(event for event in events if event not in told))

    async def _follow(self, id: str, plan: Plan, gone: asyncio.Event, runner: Runner) -> None:
        """Put down how a job is as long as a runner has it; set `gone` when it has to end."""
        told: dict[str, Any] = {}
        started, seen = False, None
        for wait in _waits():
            with _logged(logging.DEBUG):
                job = await asyncio.to_thread(self.store.mine, id)
                # On the way out, what does not run yet is left to the next process.
                if job is None or job.status == "canceling" or (self.draining.active and not started):
                    gone.set()
                    return
                now = await asyncio.wait_for(runner.progress(plan.id, job.watched_until > time.time()), 3)
                values: dict[str, Any] = {}
                if now.state == "running" and not started:
                    started, values["started_at"] = True, time.time()
                if now.state != "unknown":
                    values |= {"position": now.position}
                if now.progress:
                    values |= {"step": now.progress.steps_done, "steps": now.progress.steps}
                if now.preview and now.preview_step != seen:
                    seen = now.preview_step
                    values |= {"preview": await asyncio.to_thread(images.encode, now.preview, "jpeg", 80), "preview_step": seen}
                changed = {k: v for k, v in values.items() if k not in told or told[k] != v}
                if changed:
                    after = await asyncio.to_thread(partial(self.store.tell, id, **changed))
                    if after and "started_at" in changed and id not in self._begun:
                        self._begun.add(id)
                        self.webhooks.send(after, "start")
                    told |= changed
            await asyncio.sleep(wait)


def _waits() -> Any:
    """Soon again at first, so that short jobs are seen to run."""
    yield from (0.05, 0.1, 0.2)
    while True:
        yield FOLLOW_S


def _outputs(task: Task[Any, Any], wanted: Any, generation: Generation, accept: str) -> list[list[Any]]:
    """What was made, as (media type, seed)."""
    if task.pictures and generation.pictures:
        kind = images.MEDIA_TYPES[wanted.format]
        return [[kind, seed] for seed in generation.seeds]
    return [[task.negotiate(wanted, accept), generation.seeds[0] if generation.seeds else None]]


@contextlib.contextmanager
def _logged(level: int = logging.ERROR) -> Any:
    """Outlive what the store or a runner fails at: it is tried again."""
    try:
        yield
    except Exception:
        log.log(level, "jobs: will be tried again", exc_info=True)
