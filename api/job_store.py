"""The jobs of this process, for the routes, the work and the quotas."""

from __future__ import annotations

from functools import lru_cache

from core import settings
from core.job_store import SCHEMA, Store


@lru_cache(maxsize=1)
def of_process() -> Store:
    """Where this process's jobs are kept."""
    return Store(settings.load().jobs)


def prepare() -> None:
    """Look at the store before anything starts. Raises: LaterVersion: where it is a later Easel's."""
    SCHEMA.check(settings.load().jobs.store)
