"""From a contract to its runner and back: the current service itself, or its dependency.

Waits for a picture while watching the client and the runner: work whose client has gone is
cancelled, and a runner that died gives a clear 503 instead of a hanging call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, TypeVar, cast

import bentoml
from bentoml.exceptions import BentoMLException
from starlette.requests import Request

from api import probing, routing
from api.routing import Runner
from core import logs, settings, trials
from core.generation import Generation
from core.placement import MAX_WORKERS, runner_of
from core.plans import Plan
from core.problems import GONE, Problem, cancelled, problem, runner_gone
from core.status import RunnerStatus

log = logging.getLogger("easel.api")
T = TypeVar("T")
Service = Literal["StableDiffusion", "UniDiffuser"]
Follow = Callable[[Runner], Awaitable[None]]
# By the names of the entry's dependencies.
SERVICES: dict[Service, str] = {"StableDiffusion": "stable_diffusion", "UniDiffuser": "unidiffuser"}
ANSWER_S = 3.0
KEPT_S = 2.0  # an idle connection to a worker
ATTEMPTS = 2


def attribute(worker: str) -> str:
    """The entry's dependency for a worker: stable_diffusion2 for StableDiffusion2."""
    name = runner_of(worker)
    return SERVICES[cast(Service, name)] + worker.removeprefix(name)


def started() -> bool:
    """Whether there are `workers` to ask for: BentoML makes the service known once all of its start hooks have run."""
    try:
        return bool(workers())
    except BentoMLException:
        return False


def workers() -> dict[str, Runner]:
    """The workers that are served here: the entry's dependencies, or this very service."""
    service: Any = bentoml.get_current_service()
    if alone := getattr(service, "name", None):
        return {alone: cast(Runner, _Here(service))}
    return _dependencies(service)


def _dependencies(entry: Any) -> dict[str, Runner]:
    names = (f"{name}{number or ''}" for name in SERVICES for number in (0, *range(2, MAX_WORKERS + 1)))
    return {name: cast(Runner, getattr(entry, attribute(name))) for name in names if hasattr(entry, attribute(name))}


def workers_of(name: Service) -> dict[str, Runner]:
    """Those of one runner.

    Raises:
        Problem: 404 where another runner is served alone here.
    """
    here = workers()
    if not (own := {worker: runner for worker, runner in here.items() if runner_of(worker) == name}):
        detail = f"This is served by {name}; {next(iter(here))} runs alone here. Start `bentoml serve` for both, or `bentoml serve service:{name}`."
        raise problem(404, "not-served-here", "Not served here", detail)
    return own


async def connect(entry: Any, elsewhere: set[str], key: str) -> None:
    """Let every call through from the entry to the workers, whose queues have bounds of their own. aiohttp keeps to 100 connections
    at once, and the next call, a probe, say, would wait for a picture to be done. It also keeps idle ones for 15 s, while uvicorn, at the
    worker, closes them after 5: a call that takes one at that moment breaks. The key is shown to those that are served elsewhere."""
    for name, runner in _dependencies(entry).items():
        sessions = cast(Any, runner)._async._session_manager
        if name in elsewhere:
            sessions._headers = {**sessions._headers, "Authorization": f"Bearer {key}"}
        session = await sessions.get_session()
        session.connector._limit, session.connector._keepalive_timeout = 0, KEPT_S


class _Here:
    """This process's own runner, called directly: BentoML would send the call through the public
    listener, to be refused there for want of a key."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name).local


async def statuses() -> dict[str, RunnerStatus | Problem]:
    """Each worker's status, or the 503 where it does not answer in time."""
    here = workers()
    answers = await asyncio.gather(*(_answer(r.status) for r in here.values()), return_exceptions=True)
    found: dict[str, RunnerStatus | Problem] = {}
    for name, answer in zip(here, answers, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, Problem):
            raise answer
        if isinstance(answer, RunnerStatus):
            probing.seen(name, answer.pid)
        found[name] = answer
    return found


async def unload(worker: str, model_id: str) -> int:
    return await workers()[worker].unload(model_id)


async def generate(
    plan: Plan, request: Request | None, name: Service = "StableDiffusion", *, gone: asyncio.Event | None = None, follow: Follow | None = None
) -> Generation:
    """Have a plan done by one of a runner's workers; by another where that one dies.

    Args:
        request: whose client's leaving ends the work; None for a call within this process.
        gone: ends it as well.
        follow: runs as long as a worker has the plan.

    Raises:
        Problem: what the worker says; 503 where all are gone; 499 where the client is; 404 where the runner is not here.
    """
    able = workers_of(name)
    plan = plan.model_copy(update={"request_id": logs.request_id.get(), "job_id": logs.job_id.get()})
    logs.note(**logs.of_plan(plan))
    several = len(able) > 1
    if plan.experiment and plan.experiment.counts:
        await asyncio.to_thread(trials.configured(settings.load()).count, plan.experiment)
    end = asyncio.ensure_future(_ended(request, gone))
    try:
        while True:
            worker = await routing.choose(able, plan.model_id)
            try:
                with routing.in_hand(worker, plan.model_id), _meanwhile(follow, able[worker]):
                    generation = await _watched(worker, able[worker], plan, end)
                break
            except Problem as problem:
                if not problem.details.type.endswith(GONE) or len(able) == 1:
                    raise
                routing.set_aside(worker, able.pop(worker))
    finally:
        end.cancel()
    if generation.problem:
        raise Problem(generation.problem)
    if several and generation.ran:
        generation.ran.worker = worker
    if plan.experiment and generation.ran:
        generation.ran.experiment, generation.ran.variant = plan.experiment.experiment, plan.experiment.variant
    return generation


async def _watched(worker: str, target: Runner, plan: Plan, gone: asyncio.Future[None]) -> Generation:
    """The runner's answer, as long as the client stays and the runner lives."""
    work: asyncio.Future[Generation] = asyncio.ensure_future(_submit(target, plan))
    try:
        with probing.death(worker, target) as death:
            waiting: set[asyncio.Future[Any]] = {work, gone, death}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            await _answer(lambda: target.cancel(plan.id))
            raise cancelled()
        raise runner_gone()
    except asyncio.CancelledError:  # who asked is no longer there to hear of it; the work would go on for nobody
        with contextlib.suppress(Problem):
            await _answer(lambda: target.cancel(plan.id))
        raise
    finally:
        if not work.done():
            work.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await work


async def _submit(target: Runner, plan: Plan) -> Generation:
    """Call the runner; once more where the connection broke and the runner is there: it closes idle
    connections after 5 s, and a call may be just on its way into one. The cancel makes sure that
    the first call is not run as well."""
    for attempt in range(ATTEMPTS):
        try:
            return await _reach(target.run(plan))
        except Problem as gone:
            log.error("the runner did not answer: %s", type(gone.__cause__).__name__)
            if attempt + 1 == ATTEMPTS:
                raise
            await _answer(lambda: target.cancel(plan.id))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _meanwhile(follow: Follow | None, runner: Runner) -> Iterator[None]:
    """Run what follows a plan at its worker."""
    task = asyncio.ensure_future(follow(runner)) if follow else None
    try:
        yield
    finally:
        if task:
            task.cancel()


async def _ended(request: Request | None, gone: asyncio.Event | None) -> None:
    """Return when the client has closed its connection, or `gone` is set."""
    ends = [asyncio.ensure_future((gone or asyncio.Event()).wait()), *([asyncio.ensure_future(_left(request))] if request else [])]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()


async def _left(request: Request) -> bool:
    """Return when the client has closed its connection. The request's body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return True


async def _answer(call: Callable[[], Awaitable[T]]) -> T:
    """A short call, bounded (while a runner restarts, calls to it hang) and tried twice (see `_submit`)."""
    for attempt in range(ATTEMPTS):
        try:
            return await asyncio.wait_for(_reach(call()), ANSWER_S)
        except TimeoutError:
            raise runner_gone() from None
        except Problem:
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


async def _reach(call: Awaitable[T]) -> T:
    try:
        return await call
    except (Problem, TimeoutError, asyncio.CancelledError):
        raise
    except Exception as error:
        raise runner_gone() from error
