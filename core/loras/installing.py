"""Adding LoRAs and embeddings: jobs that look up, download and register, with progress.

A job goes on when the client that asked for it has gone. The same LoRA asked for twice at once is
downloaded once: whoever comes second waits, and finds it there. api.loras calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from pathlib import Path
from typing import Literal

import httpx
from pydantic import BaseModel

from core.loras import civitai, hub, rights
from core.loras.civitai import Civitai, Offer, Reference
from core.loras.contents import check_family
from core.loras.download import download, held, sweep, uninterrupted
from core.loras.egress import Egress
from core.loras.keeping import already_there, now, with_terms
from core.loras.messages import Added, AddLora, CivitaiSource, DownloadProgress, HubSource, JobState
from core.loras.registry import Lora, Registry, name_taken
from core.problems import Problem, invalid_field, problem
from core.settings import Secrets, Settings

log = logging.getLogger("easel.loras")
KEPT_JOBS = 200
RATE_WINDOW_S = 10.0


class Job:
    """One adding. `task` is set until it is over: a task keeps what it ran with, its request among that, and jobs are kept for long."""

    def __init__(self, wanted: AddLora) -> None:
        source = wanted.source.model_dump(exclude_none=True) if isinstance(wanted.source, BaseModel) else wanted.source
        self.state = JobState(id=f"lora_{uuid.uuid4().hex}", source=str(source)[:500], status="queued", created_at=now(), progress=DownloadProgress())
        self.wanted = wanted
        self.task: asyncio.Task[None] | None = None
        self._problem: Problem | None = None
        self._marks: list[tuple[float, int]] = []

    async def result(self) -> Added:
        """Wait for it. Who stops waiting does not stop the job.

        Raises:
            Problem: what stood in the way.
        """
        if self.task:
            await asyncio.wait([self.task])
        if self._problem:
            raise Problem(self._problem.details, self._problem.headers)
        assert self.state.result is not None
        return self.state.result

    def progress(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        self._marks = [m for m in self._marks if now - m[0] < RATE_WINDOW_S and m[1] <= done] + [(now, done)]
        since, had = self._marks[0]
        rate = (done - had) / (now - since) if now > since else 0.0
        eta = (total - done) / rate if total is not None and rate else None
        self.state.progress = DownloadProgress(value=done / total if total else 0, bytes=done, total_bytes=total, rate=round(rate), eta_s=None if eta is None else round(eta, 1))

    def finish(self, status: Literal["succeeded", "failed", "canceled"], result: Added | None = None, error: Problem | None = None) -> None:
        self.state.status, self.state.result, self.state.completed_at, self.task = status, result, now(), None
        if status == "failed" and error:
            self.state.error = error.details
        self._problem = error and Problem(error.details, error.headers)  # without its traceback


class Installer:
    """The LoRAs of this service: the registry and the jobs that add to it."""

    def __init__(self, settings: Settings, secrets: Secrets, base: Path) -> None:
        self.settings = settings
        self.registry = Registry(base / settings.loras.registry, base / settings.loras.folder)
        self.egress = Egress(settings.loras, secrets)
        self.jobs: dict[str, Job] = {}
        self._slots = asyncio.Semaphore(settings.loras.concurrent_downloads)
        sweep(self.registry.folder, settings.loras.deadline_s + 3600)

    def start(self, wanted: AddLora) -> Job:
        """Begin a job; its result is to be waited for or left alone."""
        job = Job(wanted)
        self.jobs[job.state.id] = job
        for old in [j for j in self.jobs.values() if j.state.completed_at][: max(0, len(self.jobs) - KEPT_JOBS)]:
            del self.jobs[old.state.id]
        job.task = asyncio.create_task(self._run(job))
        return job

    def job(self, id: str) -> Job:
        if id not in self.jobs:
            raise problem(404, "job-not-found", "No such job", f"There is no job {id[:80]!r}; the last {KEPT_JOBS} of this process are kept.")
        return self.jobs[id]

    async def cancel(self, id: str) -> Job:
        """Stop a job and take away what it had; one that is over stays as it is."""
        job = self.job(id)
        if task := job.task:
            task.cancel()
            await asyncio.wait([task])
        if job.state.completed_at is None:  # it had not begun
            job.finish("canceled", error=_cancelled())
        return job

    async def close(self) -> None:
        """Cancel what is running."""
        for id in [id for id, job in self.jobs.items() if not job.state.completed_at]:
            await self.cancel(id)

    async def _run(self, job: Job) -> None:
        try:
            job.state.status, job.state.started_at = "running", now()
            added = await self._add(job)
            job.finish("succeeded", added)
            log.info("%s", added.message)
        except asyncio.CancelledError:
            job.finish("canceled", error=_cancelled())
        except Problem as error:
            job.finish("failed", error=error)
            log.warning("LoRA from %r was not added: %s", job.state.source, error.details.detail)
        except Exception:
            job.finish("failed", error=problem(500, "internal", "Internal error", "The server failed; its log says how."))
            log.exception("LoRA from %r was not added", job.state.source)

    async def _add(self, job: Job) -> Added:
        wanted = job.wanted
        reference = self._reference(wanted)
        if there := self._there(reference):
            return already_there(there)
        async with self.egress.client() as client:
            offer = await self._offer(wanted, reference, client)
        target = self.registry.file(offer.lora)
        async with held(target):
            known = self.registry.entries()
            same = next((lora for lora in known.values() if self.registry.file(lora) == target), None)
            if same and target.is_file():
                return already_there(same)
            lora = offer.lora if offer.again else same or _named(offer.lora, wanted, known)
            async with self._slots:
                local = await download(self.egress, offer.remote, target, job.progress, wanted.kind or offer.kind)
            lora = lora.model_copy(update={"kind": local.kind, "sha256": local.sha256, "size": local.size, "file_name": target.name, "date_added": lora.date_added or now()})
            try:
                with contextlib.suppress(asyncio.CancelledError):  # too late: it is there
                    await uninterrupted(self._put, lora, lora.name in known)
            except Problem:
                if lora.name not in known:
                    target.unlink(missing_ok=True)
                raise
        return Added(name=lora.name, already_there=False, message=f"{lora.name!r} was added.", lora=lora.entry(), notes=list(offer.notes))

    def _put(self, lora: Lora, known: bool) -> None:
        check_family(lora.kind, rights.Base(lora.family or "sd15", lora.base_model))
        self.registry.put(lora, known)

    def _reference(self, wanted: AddLora) -> Reference | HubSource:
        source = wanted.source
        if isinstance(source, HubSource):
            return source
        if isinstance(source, CivitaiSource):
            if source.model_id is None and source.version_id is None:
                raise invalid_field("source", "names nothing", "model_id, version_id, or both")
            return Reference(source.model_id, source.version_id)
        if isinstance(source, str) and source.strip() in self.registry.entries():
            return Reference(name=source.strip())
        return civitai.parse(str(source), self.settings.loras.civitai_url.rstrip("/"))

    def _there(self, reference: Reference | HubSource) -> Lora | None:
        """The entry that is meant, where that is certain without asking and its weights are there."""
        for lora in self.registry.entries().values():
            same = isinstance(reference, Reference) and (
                lora.name == reference.name or (reference.version_id is not None and lora.version_id == reference.version_id)
            )
            if same and self.registry.file(lora).is_file():
                return lora
        return None

    async def _offer(self, wanted: AddLora, reference: Reference | HubSource, client: httpx.AsyncClient) -> Offer:
        if isinstance(reference, HubSource):
            return await hub.resolve(self.egress, client, self.settings, reference.repo_id, reference.filename, reference.revision, wanted.base_model)
        if wanted.base_model is not None:
            raise invalid_field("base_model", "is what Civitai says, for a LoRA from there", "leave it out", wanted.base_model)
        entry = self.registry.entries().get(reference.name or "")
        if entry is not None:
            return await self._again(entry, client)
        return await Civitai(self.egress, client, self.settings, wanted.kind).resolve(reference)

    async def _again(self, lora: Lora, client: httpx.AsyncClient) -> Offer:
        """Where to get the weights of an entry whose file is not on this machine."""
        if found := hub.parse_url(lora.lora_path, self.settings.loras.hub_url):
            repo_id, revision, filename = found
            offer = await hub.resolve(self.egress, client, self.settings, repo_id, filename, revision, lora.base_model)
        elif lora.version_id or lora.lora_path.startswith(("http://", "https://")):
            reference = Reference(version_id=lora.version_id) if lora.version_id else civitai.parse(lora.lora_path, self.settings.loras.civitai_url)
            offer = await Civitai(self.egress, client, self.settings, lora.kind).resolve(reference)
        else:
            raise problem(409, "lora-weights-missing", "Weights missing", f"The weights of {lora.name!r} are not at {lora.lora_path}, and its entry does not say where to get them.")
        remote = dataclasses.replace(offer.remote, sha256=lora.sha256 or offer.remote.sha256)
        if lora.file_name is None:
            lora = lora.model_copy(update={"file_name": offer.lora.file_name})
        return Offer(lora, remote, offer.notes, again=True, kind=lora.kind)


def _named(lora: Lora, wanted: AddLora, known: dict[str, Lora]) -> Lora:
    """The entry as the admin wants it, under a name that is free."""
    name = wanted.name or lora.name
    if name in known and wanted.name is None:  # another version, or another's LoRA of the same name
        name = f"{name[:80].strip('. ')}-{(lora.file_name or '').removesuffix('.safetensors').split('-')[-1]}"
    if name in known:
        raise name_taken(name)
    return with_terms(lora.model_copy(update={"name": name}), wanted)


def _cancelled() -> Problem:
    return problem(499, "lora-cancelled", "Cancelled", "Adding this LoRA was cancelled; nothing was kept.")
