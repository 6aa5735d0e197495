"""The quotas of this process, for the gate and for whoever has work done."""

from __future__ import annotations

from functools import lru_cache

from api import usage
from core import settings
from core.auth import Keys, NoKeys
from core.quotas import Quotas


@lru_cache(maxsize=1)
def of_process() -> Quotas:
    """The counters of all keys, in this process."""
    configured = settings.load()
    try:
        admins = Keys(configured, settings.secrets()).admins
    except NoKeys:  # a process that serves nobody: service.py refuses to start without keys
        admins = set()
    return Quotas(configured.quotas, admins, usage.made_today)
