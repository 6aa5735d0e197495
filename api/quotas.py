"""The quotas of this process, for the gate and for whoever has work done."""

from __future__ import annotations

from functools import lru_cache

from api import job_store, usage
from core import settings
from core.auth import admins
from core.quotas import Quotas


@lru_cache(maxsize=1)
def of_process() -> Quotas:
    """The limits of all keys."""
    configured = settings.load()
    return Quotas(configured.quotas, admins(configured, settings.secrets()), job_store.of_process, usage.made_today)
