"""Every Prometheus metric, named once; docs/operations.md says what to make of them.

The processes of a server share their counts in files, which api.metrics puts together at GET /metrics. Labels are few
and known: no prompt, no key, no path or model id that a caller made up.
"""

from __future__ import annotations

from typing import Literal

from bentoml._internal.context import server_context
from prometheus_client import Counter, Gauge, Histogram

from core.families import Entry
from core.generation import Generation
from core.problems import Problem
from core.status import RunnerStatus

OTHER, UNLISTED = "other", "unlisted"
_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
_LONG = (0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_LIVE: Literal["livemostrecent"] = "livemostrecent"  # of a process that was started again, the new one's

# Of a public listener.
REQUESTS = Counter("easel_http_requests_total", "Answers, by route (as in the OpenAPI document), method and status", ["service", "route", "method", "status"])
REQUEST_SECONDS = Histogram("easel_http_request_seconds", "From a request's headers to its answer's end", ["service", "route"], buckets=_SHORT)
PROBLEMS = Counter("easel_problems_total", "Answers that are errors, by their problem type", ["service", "kind"])
RUNNER_UP = Gauge("easel_runner_up", "Whether a worker answered within 3 s when this was asked for", ["runner"], multiprocess_mode=_LIVE)

# Of a worker: as it last answered.
QUEUE_DEPTH = Gauge("easel_queue_depth", "Requests that wait", ["runner"], multiprocess_mode=_LIVE)
QUEUE_LIMIT = Gauge("easel_queue_limit", "Requests that may wait", ["runner"], multiprocess_mode=_LIVE)
RUNNING = Gauge("easel_requests_running", "Requests on the device", ["runner"], multiprocess_mode=_LIVE)
RESIDENT_BYTES = Gauge("easel_resident_bytes", "Memory of the models on the device, with what is beside them", ["runner", "model"], multiprocess_mode=_LIVE)
MEMORY_BUDGET = Gauge("easel_memory_budget_bytes", "What the models may take together", ["runner"], multiprocess_mode=_LIVE)

# Of a worker: as it happens.
WAIT_SECONDS = Histogram("easel_queue_wait_seconds", "How long requests waited for the device", ["runner"], buckets=_SHORT)
STAGE_SECONDS = Histogram("easel_stage_seconds", "How long each stage of a finished request took", ["runner", "stage"], buckets=_SHORT)
BATCH_ROWS = Histogram("easel_batch_rows", "Pictures (texts, embeddings) in a pass of the denoiser", ["runner"], buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32))
STEPS = Counter("easel_steps_total", "Denoising steps of requests", ["runner", "model"])
RESULTS = Counter("easel_results_total", "What was made: pictures, texts, embeddings", ["runner", "model", "kind"])
LOAD_SECONDS = Histogram("easel_model_load_seconds", "Loading a model", ["runner", "model"], buckets=_LONG)
LOAD_FAILURES = Counter("easel_model_load_failures_total", "Models that could not be loaded, by problem type", ["runner", "model", "kind"])
UNLOAD_SECONDS = Histogram("easel_model_unload_seconds", "Unloading a model, by why", ["runner", "model", "reason"], buckets=_SHORT)
OUT_OF_MEMORY = Counter("easel_out_of_memory_total", "Times that the device's memory ran out; mostly less was tried then", ["runner"])
FLAGGED = Counter("easel_flagged_pictures_total", "Pictures flagged by the safety checker, sent in or drawn", ["where"])
WITHHELD = Counter("easel_withheld_texts_total", "Texts that UniDiffuser wrote, withheld for a word of the blocklist")

_shown: set[str] = set()  # models that RESIDENT_BYTES has told of


def here() -> str:
    """This process's service: the value of the labels `runner` and `service`."""
    return server_context.service_name or "none"


def begin() -> None:
    """Show a worker's counts of what should not happen before it does: a rate needs a first value."""
    OUT_OF_MEMORY.labels(here())
    for where in ("input", "output"):
        FLAGGED.labels(where)


def model(entry: Entry) -> str:
    """The value of the label `model`: an id of the catalogue; callers choose the others."""
    return entry.id if entry.listed else UNLISTED


def kind(problem_type: str) -> str:
    """The value of the label `kind` for an error."""
    return problem_type.rpartition(":")[2]


def problem(error: Problem) -> None:
    """Count an answer that is an error."""
    PROBLEMS.labels(here(), kind(error.details.type)).inc()


def done(generation: Generation, listed: str) -> None:
    """Count what came of a plan; `listed` is its model's label."""
    for name, made in (("picture", generation.pictures), ("text", generation.texts), ("embedding", generation.embeddings)):
        if made:
            RESULTS.labels(here(), listed, name).inc(len(made))
    if generation.ran:
        for stage, ms in generation.ran.timing.model_dump().items():
            if ms:
                STAGE_SECONDS.labels(here(), stage).observe(ms / 1000)


def show(status: RunnerStatus, listed: set[str]) -> None:
    """Set a worker's gauges to what it answers."""
    queue, runner = status.queue, here()
    for gauge, value in ((QUEUE_DEPTH, queue.waiting), (QUEUE_LIMIT, queue.limit), (RUNNING, queue.running), (MEMORY_BUDGET, status.memory_budget_bytes)):
        gauge.labels(runner).set(value)
    held: dict[str, int] = dict.fromkeys(_shown, 0)
    for one in status.models:
        if one.state == "warm":
            name = one.model_id if one.model_id in listed else UNLISTED
            held[name] = held.get(name, 0) + one.resident_bytes
    for name, size in held.items():
        RESIDENT_BYTES.labels(runner, name).set(size)
    _shown.update(held)
