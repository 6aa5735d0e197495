"""What a key may use: requests a minute, pictures a day, generations at once, and the size of one.

Requests are counted by the `limits` library, in this process or in the store that several entries share (`quotas.storage`);
pictures by the usage log, and what is in the making by the store of jobs, which entries share where these are in PostgreSQL.
User keys have the limits of the configuration, or their own (`quotas.keys`, by the hash that the usage log
shows); admin keys only their own. api.gate counts requests, api.tasks and api.jobs ask for what is generated.
Headers: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (draft 10).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta

from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string

from core.auth import Caller
from core.job_store import Store
from core.plans import Plan
from core.problems import Problem, invalid_field, problem
from core.settings import Quota, QuotaSettings

log = logging.getLogger("easel.quotas")


class Quotas:
    """The limits of all keys, and what they have used.

    Args:
        settings: the limits.
        admins: the ids of admin keys.
        store: what is in the making: jobs, and the places of requests that somebody waits for.
        made_today: how many pictures a key has had made since the day (UTC) began.
    """

    def __init__(self, settings: QuotaSettings, admins: set[str], store: Callable[[], Store], made_today: Callable[[str], int]) -> None:
        self.settings, self._admins, self._store, self._made_today = settings, admins, store, made_today
        self._requests = SlidingWindowCounterRateLimiter(storage_from_string(f"async+{settings.storage}"))

    def of(self, client: str) -> Quota:
        """The limits of a key; none for an admin's, unless it has its own."""
        return self.settings.keys.get(client) or (Quota() if client in self._admins else self.settings)

    async def request(self, caller: Caller) -> dict[str, str]:
        """Count a request; the RateLimit headers of its answer.

        Raises:
            Problem: 429 with Retry-After, beyond the key's requests a minute.
        """
        amount = self.of(caller.id).requests_per_minute
        if amount is None:
            return {}
        item = RateLimitItemPerMinute(amount)
        try:
            admitted = await self._requests.hit(item, "requests", caller.id)
            reset, left = await self._requests.get_window_stats(item, "requests", caller.id)
        except Exception:  # each store has its own errors
            log.exception("the store of the quotas does not answer; the request passes")
            return {}
        wait = max(1, math.ceil(reset - time.time()))
        headers = {"RateLimit-Policy": f'"requests";q={amount};w=60', "RateLimit": f'"requests";r={left};t={wait}'}
        if not admitted:
            raise _exceeded("rate-limit", f"This key may send {amount} requests a minute.", wait, headers)
        return headers

    @contextlib.asynccontextmanager
    async def place(self, plan: Plan) -> AsyncIterator[None]:
        """Hold one of the key's places for generations at once, until the pictures are in the usage log, or the job in its store.

        Raises:
            Problem: 422 where the plan is larger than the key may ask for at once, 429 with Retry-After where
                its places are taken or its pictures of the day (UTC) used up.
        """
        client, quota = plan.client, self.of(plan.client)
        wanted = plan.rows * plan.width * plan.height * max(1, plan.steps)
        if quota.pixel_steps is not None and wanted > quota.pixel_steps:
            allowed = f"at most {quota.pixel_steps} for this key: fewer steps or pictures, or a smaller size"
            raise invalid_field("num_inference_steps", f"pixels times steps of all pictures are {wanted}", allowed, plan.num_inference_steps)
        if quota.concurrent is None and quota.pictures_per_day is None:
            yield
            return
        place: str | None = None
        try:
            with _passing():
                place, generations, coming = await asyncio.to_thread(self._store().take, client, plan.rows)
                if quota.concurrent is not None and generations > quota.concurrent:
                    raise _exceeded("concurrency-limit", f"This key may have {quota.concurrent} generations at once, waiting ones included.", 1)
                if quota.pictures_per_day is not None:
                    made = await asyncio.to_thread(self._made_today, client)  # last, so that what is done meanwhile is counted, if twice
                    _check_pictures(quota.pictures_per_day, plan.rows, made + coming - plan.rows)
            yield
        finally:
            if place:
                with _passing():
                    await asyncio.shield(asyncio.to_thread(self._store().give_back, place))


@contextlib.contextmanager
def _passing() -> Iterator[None]:
    """A store that does not answer lets requests pass: it is logged."""
    try:
        yield
    except Problem:
        raise
    except Exception:
        log.exception("the store of what keys have used does not answer; the request passes")


def _check_pictures(amount: int, count: int, used: int) -> None:
    if count > (left := max(0, amount - used)):
        now = datetime.now(UTC)
        midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
        detail = f"This key may have {amount} pictures a day (UTC) made; {left} are left, and {count} were asked for."
        raise _exceeded("picture-quota", detail, math.ceil((midnight - now).total_seconds()))


def _exceeded(slug: str, detail: str, wait_s: int, headers: dict[str, str] | None = None) -> Problem:
    return problem(429, slug, "Too many requests", detail, retry_after=wait_s, headers=headers)
