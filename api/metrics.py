"""GET /metrics: the counts of all of a server's processes, for Prometheus.

BentoML's own metrics are off (service.py): they have each path that anyone asks for as a label, without a key and without end.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.responses import Response

from api import backend, document
from core import metrics, settings
from core.placement import addresses, runner_of
from core.problems import Problem

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response, responses=document.gives("Prometheus' text format.", {"text/plain": {"type": "string"}}))
async def prometheus() -> Response:
    """Counts and gauges of this server ([what they are](docs/operations.md)); with a key, unless auth.public_metrics."""
    # The workers set their gauges when they are asked how they are.
    # Those that are served elsewhere are replicas, which come and go: it matters that one of them answers.
    up: dict[str, bool] = {}
    elsewhere = addresses(settings.load())
    for name, status in (await backend.statuses()).items():
        runner = runner_of(name) if name in elsewhere else name
        up[runner] = up.get(runner, False) or not isinstance(status, Problem)
    for runner, answers in up.items():
        metrics.RUNNER_UP.labels(runner).set(answers)
    return Response(await asyncio.to_thread(_collected), media_type=CONTENT_TYPE_LATEST)


def _collected() -> bytes:
    folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    for pid in {int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_live*.db")}:
        if not _lives(pid):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
