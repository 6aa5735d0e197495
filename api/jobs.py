"""Jobs over HTTP: POST /jobs takes any generation and answers at once; the others tell of it, hand out its result, or
cancel it. `Prefer: respond-async` does the same on the generations' own routes (api.tasks)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import bentoml
from bentoml._internal.context import server_context
from fastapi import APIRouter, Query, Request
from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from api import answering, backend, document, job_store, quotas, reading, tasks, uploading
from api.job_work import Work
from api.seed import PICTURES
from api.tasks import TASKS, Task, Uploads
from api.webhooks import Webhooks
from core import images, logs, settings
from core.draining import Draining
from core.jobs import Job, JobList, JobSnapshot, Status
from core.problems import invalid_field, nearest, problem

router = APIRouter(tags=["jobs"])
# Of any task; how many of each its own may have, `_check_parts` says.
PARTS = {name: max(task.parts.get(name, 0) or (uploading.PARTS if name in task.parts else 0) for task in TASKS.values()) for name in ("image", "mask", *reading.GUIDES)}
# Of all tasks, for the OpenAPI document.
_FIELDS = {name: own for task in reversed(TASKS.values()) for name, own in task.model.model_json_schema()["properties"].items()}
_TAKEN: document.Responses = {202: {"description": "The job, as it is now.", "headers": {"Location": {"description": "Where it is.", "schema": {"type": "string"}}}}}
_OF_ONE = document.refuses(404, 410)
_MADE = document.refuses(406, 409)
EVENT_S = 0.5  # at most two snapshots a second
WATCH_S = 5.0  # previews are made as long as somebody asked for events so lately
_work: list[Work] = []
_on_their_way: set[tuple[str, str]] = set()  # callers' Idempotency-Keys, until their jobs are in the store


class JobsLife:
    """Has a service do jobs as long as it runs; for a BentoML service to inherit."""

    draining: Draining

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def do_jobs(self) -> None:
        if server_context.service_type == "entry_service":  # not a runner behind an entry
            _work.append(Work(await asyncio.to_thread(job_store.of_process), self.draining, Webhooks(settings.load().webhooks, settings.secrets().webhook_secret)))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def leave_jobs(self) -> None:
        while _work:
            await _work.pop().close()


class JobRequest(BaseModel):
    """What POST /jobs takes: `task`, and the fields of the task's own request."""

    model_config = ConfigDict(extra="allow")

    webhook_url: str | None = Field(None, max_length=2000, description="Told when the job starts, has its output, and is over.")
    task: str = Field("generate", description=f"One of {', '.join(TASKS)}.")


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobSnapshot,
    responses=_TAKEN | document.refuses(404, 406, 409),
    openapi_extra=document.takes_either(document.takes_json(JobRequest, **_FIELDS), document.takes_form(JobRequest, "JobForm", PARTS, **_FIELDS)),
)
async def submit(request: Request) -> Response:
    """Leave a generation to be done. The fields and files are those of the task's own route, with `task` beside them."""
    asked, uploads = await reading.read_as(JobRequest, request, PARTS)
    task = _task(asked.task)
    if asked.webhook_url is not None:
        _webhooks().check(asked.webhook_url)
    _check_parts(task, uploads)
    wanted = reading.check(task.model, dict(asked.model_extra or {}))
    return await submitted(task, wanted, uploads, request, asked.webhook_url)


async def submitted(task: Task[Any, Any], wanted: BaseModel, uploads: Uploads, request: Request, webhook_url: str | None = None) -> Response:
    """Put a checked request into the store; answers 202 with the job. With an Idempotency-Key that the caller has used
    within a day, the answer is the job that there is.

    Raises:
        Problem: as the generation's own route would before its work; 429 where the key is at a limit, or too many wait;
            422 where the Idempotency-Key was used for another request, 409 while that one is on its way into the store.
    """
    key, client = reading.idempotency_key(request), request.state.caller.id
    if key is None:
        return _accepted(await _state(await _add(task, wanted, uploads, request, webhook_url)), request)
    digest = _digest(task, wanted, uploads, webhook_url)
    if job := await asyncio.to_thread(job_store.of_process().of_key, client, key):
        return await _replayed(job, digest, request)
    if (client, key) in _on_their_way:
        raise problem(409, "idempotency-in-flight", "In flight", "A request with this Idempotency-Key is on its way.", retry_after=1)
    _on_their_way.add((client, key))
    try:
        added = await _add(task, wanted, uploads, request, webhook_url, key, digest)
    except _Known:  # another entry was faster
        found = await asyncio.to_thread(job_store.of_process().of_key, client, key)
        assert found is not None
        return await _replayed(found, digest, request)
    finally:
        _on_their_way.discard((client, key))
    return _accepted(await _state(added), request)


class _Known(Exception):
    """The Idempotency-Key has its job."""


async def _add(task: Task[Any, Any], wanted: BaseModel, uploads: Uploads, request: Request, webhook_url: str | None = None, key: str | None = None, digest: str | None = None) -> Job:
    accept = task.accepted(request.headers.get("accept"))
    task.negotiate(wanted, accept)
    backend.workers_of(task.service)
    plan = await asyncio.to_thread(task.plan, wanted, uploads, request.state.caller.id)
    plan = plan.model_copy(update={"request_id": logs.request_id.get()})  # for the lines of the work, later on
    queue = tasks.catalogue(task.service).queue
    async with quotas.of_process().place(plan):
        job = await asyncio.to_thread(job_store.of_process().add, task.name, task.service, plan, wanted.model_dump_json(exclude_unset=True), accept, queue, webhook_url, key, digest)
    if job is None:
        raise _Known
    logs.of_job(job.id)
    for work in _work:
        work.wake()
    return job


def _accepted(state: JobSnapshot, request: Request, **headers: str) -> Response:
    headers |= {"Location": state.urls.self} | ({"Preference-Applied": "respond-async"} if reading.prefers_async(request) else {})
    return Response(state.model_dump_json(), 202, headers, "application/json")


async def _replayed(job: Job, digest: str, request: Request) -> Response:
    if job.digest != digest:
        raise invalid_field("Idempotency-Key", "was used for another request", "a key of its own for each request, for a day")
    logs.of_job(job.id)
    return _accepted(await _state(job), request, **{"Idempotency-Replayed": "true"})


def _digest(task: Task[Any, Any], wanted: BaseModel, uploads: Uploads, webhook_url: str | None) -> str:
    """What makes two requests the same: task, values, files and webhook."""
    files = {name: [hashlib.sha256(file).hexdigest() for file in given] for name, given in sorted(uploads.items())}
    return hashlib.sha256(json.dumps([task.name, wanted.model_dump(mode="json", exclude_unset=True), files, webhook_url], sort_keys=True).encode()).hexdigest()


@router.get("/jobs")
async def listing(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="At most so many.")] = 20,
    status: Annotated[Status | None, Query(description="Only those.")] = None,
    after: Annotated[str | None, Query(max_length=40, description="Only those older than this job: `next` of the page before.")] = None,
    mine: Annotated[bool, Query(description="true: one's own alone, with an admin key too.")] = False,
) -> JobList:
    """One's own jobs, newest first (an admin key: everyone's)."""
    known = ["limit", "status", "after", "mine"]
    for name in request.query_params:
        if name not in known:
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, known)}", known)
    caller = request.state.caller
    client = None if caller.role == "admin" and not mine else caller.id
    found = await asyncio.to_thread(job_store.of_process().newest, client, status, after, limit + 1)
    return JobList(jobs=[await _state(job) for job in found[:limit]], next=found[limit - 1].id if len(found) > limit else None)


@router.get("/jobs/{id}", responses=_OF_ONE)
async def one(id: str, request: Request) -> JobSnapshot:
    """A job as it is."""
    return await _state(await _find(id, request))


@router.delete("/jobs/{id}", responses=_OF_ONE)
async def cancel(id: str, request: Request) -> JobSnapshot:
    """Cancel a job; one that is over stays as it is."""
    job = await _find(id, request)
    changed = None if job.over else await asyncio.to_thread(job_store.of_process().cancel, id)
    if changed and changed.over:  # at once: nobody worked on it
        _webhooks().send(changed, "completed")
    return await _state(changed or job)


@router.get("/jobs/{id}/result", response_class=Response, responses=PICTURES | _OF_ONE | _MADE)
async def result(id: str, request: Request) -> Response:
    """What the generation's own route would have answered, by Accept; 409 while it is not there."""
    job = await _find(id, request)
    task, wanted, accept, generation = await _made(job)
    return await tasks.answered(task, wanted, generation, _accept(request, task, accept))


@router.get("/jobs/{id}/outputs/{index}", response_class=Response, responses=document.gives("The picture.", {"image/png": document.FILE}, headers=answering.HEADERS) | _OF_ONE | _MADE | document.refuses(422))
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


@router.get("/jobs/{id}/events", response_class=StreamingResponse, responses=document.gives("The events.", {"text/event-stream": {"type": "string"}}) | _OF_ONE)
async def events(id: str, request: Request) -> Response:
    """How a job goes, as server-sent events: `status`, `progress` and `output` with the whole job, `preview` with a picture."""
    job = await _find(id, request)
    return StreamingResponse(_events(job, request), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _events(job: Job, request: Request) -> AsyncIterator[bytes]:
    """A snapshot at once and after every change, until the job is over or the client has gone. An event's id is the
    job's version: a client that comes back with it is told only what it does not know."""
    known = request.headers.get("last-event-id", "")
    told, status, seen = (int(known) if known.isdecimal() and len(known) < 19 else 0), None, None
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
    logs.of_job(job.id)
    if job.status == "expired":
        raise problem(410, "job-expired", "Gone", f"{id} is over, and its result is no longer kept (jobs.retention_s).")
    return job


async def _state(job: Job) -> JobSnapshot:
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
    task, (wanted, accept, generation) = tasks.of_job(job.task), found
    return task, task.model.model_validate_json(wanted), accept, generation


def _accept(request: Request, task: Task[Any, Any], submitted: str) -> str:
    """What this client accepts; where it does not say, what the one who submitted the job does."""
    header = request.headers.get("accept", "")
    return submitted if header.strip() in ("", "*/*") else header


def _webhooks() -> Webhooks:
    return _work[0].webhooks


def _task(name: str) -> Task[Any, Any]:
    if name not in TASKS:
        raise invalid_field("task", f"there is no task {name[:40]!r}{nearest(name, TASKS)}", list(TASKS), name)
    return TASKS[name]


def _check_parts(task: Task[Any, Any], uploads: Uploads) -> None:
    for name, files in uploads.items():
        if name not in task.parts:
            raise invalid_field(name, f"{task.name} takes no such file", list(task.parts) or None)
        if len(files) > (limit := task.parts[name] or settings.load().limits.images):
            raise invalid_field(name, "is given too often", f"at most {limit} times")
