"""Jobs: generations that nobody waits for, as callers see them. core.job_store keeps them; api.jobs and api.job_work
serve and do them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from core.generation import Generation
from core.plans import Plan
from core.problems import ProblemDetails

Status = Literal["queued", "running", "succeeded", "failed", "expired", "canceling", "canceled"]
ACTIVE: tuple[Status, ...] = ("queued", "running", "canceling")


class JobProgress(BaseModel):
    """Denoising steps done, of `steps` (null where their number is not known before), and the part that is done, 0 to 1."""

    value: float
    step: int
    steps: int | None


class JobOutput(BaseModel):
    """One thing that was made, and where it can be had; `seed` is null for embeddings."""

    index: int
    url: str
    media_type: str
    seed: int | None


class JobMetrics(BaseModel):
    """Milliseconds that the job waited, and that it ran."""

    queue_ms: int | None
    execution_ms: int | None


class JobUrls(BaseModel):
    self: str
    events: str
    result: str
    cancel: str


class JobSnapshot(BaseModel):
    """A job as it is. `queue_position` is 1 for the next one; `expires_at` is when its result is forgotten."""

    id: str
    task: str
    status: Status
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None
    queue_position: int | None
    progress: JobProgress
    outputs: list[JobOutput]
    error: ProblemDetails | None
    metrics: JobMetrics
    urls: JobUrls


class JobList(BaseModel):
    """A page of jobs, newest first; `next` is for `after`, null on the last page."""

    jobs: list[JobSnapshot]
    next: str | None


@dataclass(frozen=True)
class Job:
    """A job as it is kept, but for its plan and what came of it. Times are seconds since 1970. `version` grows with
    every change; `outputs` are (media type, seed)."""

    id: str
    client: str
    task: str
    service: str
    status: Status
    version: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    position: int | None
    step: int
    steps: int | None
    outputs: list[list[Any]]
    error: dict[str, Any] | None
    preview_step: int | None
    watched_until: float
    attempts: int
    webhook_url: str | None
    digest: str | None

    @property
    def over(self) -> bool:
        return self.status not in ACTIVE

    def state(self) -> JobSnapshot:
        """As callers see it."""
        at, single = f"/jobs/{self.id}", f"/jobs/{self.id}/outputs"
        done, step, steps = self.status == "succeeded", self.step, self.steps
        if done and steps is not None:  # the last ones may have been made since the runner was asked
            step = steps = max(step, steps)
        value = 1.0 if done else round(min(1.0, step / steps), 4) if steps else 0.0
        ended = self.completed_at
        return JobSnapshot(
            id=self.id,
            task=self.task,
            status=self.status,
            created_at=_time(self.created_at),
            started_at=_time(self.started_at) if self.started_at else None,
            completed_at=_time(ended) if ended else None,
            expires_at=_time(self.expires_at) if self.expires_at else None,
            queue_position=self.position if self.status == "queued" else None,
            progress=JobProgress(value=value, step=step, steps=steps),
            outputs=[JobOutput(index=i, url=f"{single}/{i}", media_type=kind, seed=seed) for i, (kind, seed) in enumerate(self.outputs)],
            error=ProblemDetails(**self.error) if self.error else None,
            metrics=JobMetrics(
                queue_ms=round(1000 * (self.started_at - self.created_at)) if self.started_at else None,
                execution_ms=round(1000 * (ended - self.started_at)) if self.started_at and ended else None,
            ),
            urls=JobUrls(self=at, events=f"{at}/events", result=f"{at}/result", cancel=at),
        )


def pack(model: BaseModel) -> bytes:
    """A plan or a generation, its pictures included, as the store keeps it."""
    return zlib.compress(model.model_dump_json().encode(), 1)


def unpack_generation(data: bytes) -> Generation:
    return Generation.model_validate_json(zlib.decompress(data))


def unpack_plan(data: bytes) -> Plan:
    return Plan.model_validate_json(zlib.decompress(data))


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
