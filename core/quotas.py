"""What a key may use: requests a minute, pictures a day, generations at once, and the size of one.

Counted by the `limits` library, in this process or in the store that several entries share (`quotas.storage`).
User keys have the limits of the configuration, or their own (`quotas.keys`, by the hash that the usage log
shows); admin keys only their own. api.gate counts requests, api.backend what is generated.
Headers: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (draft 10).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string

from core.auth import Caller
from core.plans import Plan
from core.problems import Problem, invalid_field, problem
from core.settings import Quota, QuotaSettings

log = logging.getLogger("easel.quotas")


class Quotas:
    """The counters of all keys.

    Args:
        settings: the limits.
        admins: the ids of admin keys.
        made_today: how many pictures a key had made since the day (UTC) began, from the usage log: a
            restart forgets what a process has counted.
        jobs: how many jobs of a key wait or run, and how many pictures they will make.
    """

    def __init__(self, settings: QuotaSettings, admins: set[str], made_today: Callable[[str], int] = lambda _: 0, jobs: Callable[[str], tuple[int, int]] = lambda _: (0, 0)) -> None:
        self.settings, self._admins, self._made_today, self._jobs = settings, admins, made_today, jobs
        storage = storage_from_string(f"async+{settings.storage}")
        self._requests, self._pictures = SlidingWindowCounterRateLimiter(storage), FixedWindowRateLimiter(storage)
        self._at_work: Counter[str] = Counter()
        self._promised: Counter[str] = Counter()
        self._seeded: set[tuple[str, str]] = set()

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
    async def work(self, plan: Plan, admitted: bool = False) -> AsyncIterator[None]:
        """Hold one of the key's places for generations at once; count the pictures if they come to be made.

        Args:
            admitted: a job's plan, which `admit` saw, and whose place the store of jobs holds.

        Raises:
            Problem: 422 where the plan is larger than the key may ask for at once, 429 with Retry-After where
                its places are taken or its pictures of the day (UTC) used up.
        """
        client, quota = plan.client, self.of(plan.client)
        if not admitted:
            await self.admit(plan)
            self._at_work[client] += 1
            self._promised[client] += plan.rows
        try:
            yield
            if quota.pictures_per_day is not None:
                await self._count_pictures(client, quota.pictures_per_day, plan.rows)
        finally:
            if not admitted:
                self._at_work[client] -= 1
                self._promised[client] -= plan.rows

    async def admit(self, plan: Plan) -> None:
        """Whether the key may have so much now; raises as `work`."""
        client, quota = plan.client, self.of(plan.client)
        wanted = plan.rows * plan.width * plan.height * max(1, plan.steps)
        if quota.pixel_steps is not None and wanted > quota.pixel_steps:
            allowed = f"at most {quota.pixel_steps} for this key: fewer steps or pictures, or a smaller size"
            raise invalid_field("num_inference_steps", f"pixels times steps of all pictures are {wanted}", allowed, plan.num_inference_steps)
        if quota.concurrent is None and quota.pictures_per_day is None:
            return
        jobs, promised = await asyncio.to_thread(self._jobs, client)
        if quota.concurrent is not None and self._at_work[client] + jobs >= quota.concurrent:
            raise _exceeded("concurrency-limit", f"This key may have {quota.concurrent} generations at once, waiting ones included.", 1)
        if quota.pictures_per_day is not None:
            await self._check_pictures(client, quota.pictures_per_day, plan.rows, self._promised[client] + promised)

    async def _check_pictures(self, client: str, amount: int, count: int, promised: int) -> None:
        now = datetime.now(UTC)
        item, day = RateLimitItemPerDay(amount), _day(now)
        try:
            if self.settings.storage == "memory://" and (client, day) not in self._seeded:
                self._seeded.add((client, day))
                if made := self._made_today(client):
                    await self._add_pictures(item, client, day, made)
            left = (await self._pictures.get_window_stats(item, "pictures", client, day)).remaining
        except Exception:
            log.exception("the store of the quotas does not answer; the request passes")
            return
        left = max(0, left - promised)
        if count > left:
            midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
            detail = f"This key may have {amount} pictures a day (UTC) made; {left} are left, and {count} were asked for."
            raise _exceeded("picture-quota", detail, math.ceil((midnight - now).total_seconds()))

    async def _count_pictures(self, client: str, amount: int, count: int) -> None:
        try:
            await self._add_pictures(RateLimitItemPerDay(amount), client, _day(datetime.now(UTC)), count)
        except Exception:
            log.exception("the store of the quotas does not answer; %d pictures are not counted", count)

    async def _add_pictures(self, item: RateLimitItemPerDay, client: str, day: str, count: int) -> None:
        await self._pictures.storage.incr(item.key_for("pictures", client, day), item.get_expiry(), count)


def _day(now: datetime) -> str:
    """The calendar day that pictures are counted for: a window of the library's own begins with its first picture."""
    return now.date().isoformat()


def _exceeded(slug: str, detail: str, wait_s: int, headers: dict[str, str] | None = None) -> Problem:
    return problem(429, slug, "Too many requests", detail, retry_after=wait_s, headers=headers)
