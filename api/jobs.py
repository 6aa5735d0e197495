"""Jobs over HTTP: POST /jobs takes any generation and answers at once; the others tell of it, hand out its result, or
cancel it. `Prefer: respond-async` does the same on the generations' own routes (api.tasks)."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import bentoml
from bentoml._internal.context import server_context
from fastapi import APIRouter, Query, Request
from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from api import answering, job_store, quotas, reading, tasks
from api.job_work import Work
from api.tasks import TASKS, Task, Uploads
from core import images, settings
from core.draining import Draining
from core.jobs import Job, JobList, JobState, Status
from core.problems import invalid_field, nearest, problem

router = APIRouter(tags=["jobs"])
EVENT_S = 0.5  # at most two snapshots a second
WATCH_S = 5.0  # previews are made as long as somebody asked for events so lately
_work: list[Work] = []


class JobsLife:
    """Has a service do jobs as long as it runs; for a BentoML service to inherit."""

    draining: Draining

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def do_jobs(self) -> None:
        if server_context.service_type == "entry_service":  # not a runner behind an entry
            _work.append(Work(await asyncio.to_thread(job_store.of_process), self.draining))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def leave_jobs(self) -> None:
        while _work:
            await _work.pop().close()


class JobRequest(BaseModel):
    """What POST /jobs takes beside the fields of the task's own request."""

    model_config = ConfigDict(extra="allow")

    task: str = Field("generate", description=f"One of {', '.join(TASKS)}.")


@router.post("/jobs", status_code=202, response_model=JobState)
async def submit(request: Request) -> Response:
    """Leave a generation to be done. The fields and files are those of the task's own route, with `task` beside them."""
    most = settings.load().limits.images
    parts: dict[str, int] = {}
    for task in TASKS.values():
        for name, count in task.parts.items():
            parts[name] = max(parts.get(name, 0), count or most)
    asked, uploads = await reading.read_as(JobRequest, request, parts)
    task = _task(asked.task)
    _check_parts(task, uploads, most)
    wanted = reading.check(task.model, dict(asked.model_extra or {}))
    return await submitted(task, wanted, uploads, request)


async def submitted(task: Task[Any, Any], wanted: BaseModel, uploads: Uploads, request: Request, applied: bool = False) -> Response:
    """Put a checked request into the store; answers 202 with the job.

    Raises:
        Problem: as the generation's own route would before its work; 429 where the key is at a limit, or too many wait.
    """
    accept = task.accepted(request.headers.get("accept"))
    task.negotiate(wanted, accept)
    plan = await asyncio.to_thread(task.plan, wanted, uploads, request.state.caller.id)
    await quotas.of_process().admit(plan)
    queue = tasks.catalogue(task.service).queue
    job = await asyncio.to_thread(job_store.of_process().add, task.name, task.service, plan, wanted.model_dump_json(exclude_unset=True), accept, queue)
    assert job is not None
    for work in _work:
        work.wake()
    return await _accepted(job, applied)


async def _accepted(job: Job, applied: bool) -> Response:
    headers = {"Location": f"/jobs/{job.id}"} | ({"Preference-Applied": "respond-async"} if applied else {})
    return Response((await _state(job)).model_dump_json(), 202, headers, "application/json")


@router.get("/jobs")
async def listing(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Annotated[Status | None, Query(description="Only those.")] = None,
    after: Annotated[str | None, Query(max_length=40, description="Only those older than this job: `next` of the page before.")] = None,
) -> JobList:
    """One's own jobs, newest first (an admin key: everyone's)."""
    for name in request.query_params:
        if name not in ("limit", "status", "after"):
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, ['limit', 'status', 'after'])}", ["limit", "status", "after"])
    caller = request.state.caller
    client = None if caller.role == "admin" else caller.id
    found = await asyncio.to_thread(job_store.of_process().newest, client, status, after, limit + 1)
    return JobList(jobs=[await _state(job) for job in found[:limit]], next=found[limit - 1].id if len(found) > limit else None)


@router.get("/jobs/{id}")
async def one(id: str, request: Request) -> JobState:
    """A job as it is."""
    return await _state(await _find(id, request))


@router.delete("/jobs/{id}")
async def cancel(id: str, request: Request) -> JobState:
    """Cancel a job; one that is over stays as it is."""
    job = await _find(id, request)
    changed = None if job.over else await asyncio.to_thread(job_store.of_process().cancel, id)
    return await _state(changed or job)


@router.get("/jobs/{id}/result", response_class=Response)
async def result(id: str, request: Request) -> Response:
    """What the generation's own route would have answered, by Accept; 409 while it is not there."""
    job = await _find(id, request)
    task, wanted, accept, generation = await _made(job)
    return await tasks.answered(task, wanted, generation, _accept(request, task, accept))


@router.get("/jobs/{id}/outputs/{index}", response_class=Response)
async def output(id: str, index: int, request: Request) -> Response:
    """One of the things that were made, alone: a picture with its own metadata."""
    job = await _find(id, request)
    task, wanted, accept, generation = await _made(job)
    if not 0 <= index < len(job.outputs):
        raise problem(404, "not-found", "Not found", f"{id} has {len(job.outputs)} outputs, counted from 0.")
    if not (task.pictures and generation.pictures):
        return await tasks.answered(task, wanted, generation, accept)
    assert generation.ran is not None
    embed = settings.load().metadata.embed
    file = await asyncio.to_thread(answering.encode, generation, index, wanted.format, wanted.quality, embed)
    return Response(file, media_type=images.MEDIA_TYPES[wanted.format], headers=answering.describe(generation.ran, [generation.seeds[index]]))


@router.get("/jobs/{id}/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
async def events(id: str, request: Request) -> Response:
    """How a job goes, as server-sent events: `status`, `progress` and `output` with the whole job, `preview` with a picture."""
    job = await _find(id, request)
    return StreamingResponse(_events(job, request), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _events(job: Job, request: Request) -> AsyncIterator[bytes]:
    """A snapshot at once and after every change, until the job is over or the client has gone. An event's id is the
    job's version: a client that comes back with it is told only what it does not know."""
    known = request.headers.get("last-event-id", "")
    told, status, seen = (int(known) if known.isdecimal() else 0), None, None
    quiet = 0.0
    while True:
        if not job.over:
            await asyncio.to_thread(job_store.of_process().watch, job.id, WATCH_S)
        if job.version != told or job.over:
            quiet, told = 0, job.version
            state = (await _state(job)).model_dump_json()
            if job.preview_step is not None and job.preview_step != seen and (data := await asyncio.to_thread(job_store.of_process().preview, job.id)):
                seen = job.preview_step
                shown = {"step": seen, "media_type": "image/jpeg", "b64_json": base64.b64encode(data).decode()}
                yield format_sse_event(event="preview", data_str=json.dumps(shown))
            if job.status == "succeeded":
                yield format_sse_event(event="output", data_str=state)
            kind = "progress" if job.status == status and not job.over else "status"
            status = job.status
            yield format_sse_event(event=kind, data_str=state, id=str(job.version))
        elif (quiet := quiet + EVENT_S) % 15 == 0:
            yield format_sse_event(comment="still there")
        if job.over or any(work.draining.active for work in _work):
            return
        await asyncio.sleep(EVENT_S)
        if await request.is_disconnected():
            return
        found = await asyncio.to_thread(job_store.of_process().find, job.id)
        job = found or job


async def _find(id: str, request: Request) -> Job:
    """A job of the caller's.

    Raises:
        Problem: 404 where there is none, or it is another's; 410 where it has expired.
    """
    job = await asyncio.to_thread(job_store.of_process().find, id)
    caller = request.state.caller
    if job is None or (job.client != caller.id and caller.role != "admin"):
        raise problem(404, "not-found", "Not found", f"There is no job {id[:60]!r}.")
    if job.status == "expired":
        raise problem(410, "job-expired", "Gone", f"{id} is over, and its result is no longer kept (jobs.retention_s).")
    return job


async def _state(job: Job) -> JobState:
    """As callers see it; of one that nobody has taken yet, the place is the store's to tell."""
    state = job.state()
    if job.status == "queued" and job.position is None:
        state.queue_position = 1 + await asyncio.to_thread(job_store.of_process().ahead, job)
    return state


async def _made(job: Job) -> tuple[Task[Any, Any], Any, str, Any]:
    """What came of a job.

    Raises:
        Problem: 409 where it is not there; what made the job fail.
    """
    if job.status != "succeeded" or (found := await asyncio.to_thread(job_store.of_process().result, job.id)) is None:
        detail = f"{job.id} is {job.status}; its result is there once it has succeeded."
        if job.error:
            detail = f"{job.id} failed: {job.error['detail']}"
        raise problem(409, "job-not-done", "No result", detail, retry_after=None if job.over else 1)
    task, (wanted, accept, generation) = TASKS[job.task], found
    return task, task.model.model_validate_json(wanted), accept, generation


def _accept(request: Request, task: Task[Any, Any], submitted: str) -> str:
    """What this client accepts; where it does not say, what the one who submitted the job does."""
    header = request.headers.get("accept", "")
    return submitted if header.strip() in ("", "*/*") else header


def _task(name: str) -> Task[Any, Any]:
    if name not in TASKS:
        raise invalid_field("task", f"there is no task {name[:40]!r}{nearest(name, TASKS)}", list(TASKS), name)
    return TASKS[name]


def _check_parts(task: Task[Any, Any], uploads: Uploads, most: int) -> None:
    for name, files in uploads.items():
        if name not in task.parts:
            raise invalid_field(name, f"{task.name} takes no such file", list(task.parts) or None)
        if len(files) > (limit := task.parts[name] or most):
            raise invalid_field(name, "is given too often", f"at most {limit} times")
