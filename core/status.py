"""How a runner is: what GET /buffer_status and readiness tell of it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from core.plans import Pixels
from core.problems import ProblemDetails


class ResidentLora(BaseModel):
    """A LoRA kept in memory beside its model."""

    name: str
    resident_bytes: int


class ResidentGuide(BaseModel):
    """A ControlNet or an IP-Adapter kept in memory beside its model."""

    id: str
    resident_bytes: int


class ResidentModel(BaseModel):
    """A model as /buffer_status shows it."""

    model_id: str
    family: str
    state: Literal["cold", "downloading", "loading", "warm", "failed"]
    device: str | None = None
    torch_dtype: str | None = None
    resident_bytes: int = 0
    host_bytes: int = 0  # in CPU memory, of an offloaded model
    remembered_bytes: int = 0  # of resident_bytes: embeddings of prompts and encodings of pictures, kept for the next time
    loras: list[ResidentLora] = []
    guides: list[ResidentGuide] = []
    last_used_s_ago: float | None = None
    unload_in_s: float | None = None
    error: str | None = None


class Progress(BaseModel):
    """What the device is drawing: denoising steps done, of those expected for all
    requests that it draws together; null where their number is not known before (diffusion upscalers' tiles)."""

    model_id: str
    steps_done: int
    steps: int | None


class PlanProgress(BaseModel):
    """How one plan is at a runner: `position` is 1 for the next one that runs; `preview`, where one is wanted, is
    what there is after step `preview_step`, small or coarse."""

    state: Literal["unknown", "waiting", "running"] = "unknown"
    position: int | None = None
    progress: Progress | None = None
    preview: Pixels | None = None
    preview_step: int | None = None


class QueueStatus(BaseModel):
    running: int
    progress: Progress | None = None
    waiting: int
    limit: int
    mean_service_s: float | None


class RunnerStatus(BaseModel):
    """A runner's answer to "how are you": its models, queue and device."""

    service: str
    pid: int | None = None  # of its process, on its own machine
    ready: bool
    draining: bool
    device: str
    memory_budget_bytes: int
    resident_bytes: int
    models: list[ResidentModel]
    queue: QueueStatus


class RunnerDown(BaseModel):
    """In the place of a status: why a runner does not answer."""

    service: str
    ready: bool = False
    problem: ProblemDetails
