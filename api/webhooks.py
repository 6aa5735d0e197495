"""Webhooks: a job's `webhook_url` is told when it starts, has its output, and is over.

Signed as Standard Webhooks says (https://www.standardwebhooks.com), tried again with growing waits, and sent to public
addresses only, like downloads. Polling is the truth: what a process has not delivered when it ends is not delivered.
"""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from typing import Literal

import httpx
from pydantic import SecretStr
from standardwebhooks import Webhook
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from core import __version__
from core.egress import Checked, Rules, origin
from core.jobs import Job
from core.outgoing import quiet_logs
from core.problems import Problem, invalid_field
from core.settings import WebhookSettings

log = logging.getLogger("easel.webhooks")
Event = Literal["start", "output", "completed"]
OUTPUT_S = 0.5  # at most one output of a job in so long


class Undelivered(Exception):
    """An answer, or none, after which it is worth trying again."""


class Webhooks:
    """Deliveries on this event loop, those of a job one after another.

    Args:
        secret: whsec_ and base64, or anything else, which is taken as it is.
    """

    def __init__(self, settings: WebhookSettings, secret: SecretStr) -> None:
        quiet_logs()
        self.settings, self._secret = settings, secret.get_secret_value()
        self._rules = Rules("webhooks", settings.allowed_schemes, settings.allowed_hosts, settings.allow_private_hosts, settings.timeout_s)
        self._client = httpx.AsyncClient(transport=Checked(self._rules), timeout=settings.timeout_s, trust_env=False, headers={"User-Agent": f"Easel/{__version__}"})
        self._last: dict[str, asyncio.Task[None]] = {}

    def check(self, url: str) -> None:
        """Whether a job may name an address; it is looked at once more when it is called.

        Raises:
            Problem: 422.
        """
        if not self._secret:
            raise invalid_field("webhook_url", "cannot be signed: there is no WEBHOOK_SECRET here", "leave it out, or have WEBHOOK_SECRET set")
        try:
            parsed = httpx.URL(url)
            if not parsed.host or parsed.userinfo:
                raise httpx.InvalidURL("no host")
            self._rules.check(parsed)
        except (httpx.InvalidURL, UnicodeError):
            raise invalid_field("webhook_url", "is no address", "like https://HOST/PATH, without a user", url) from None
        except Problem as problem:
            raise invalid_field("webhook_url", problem.details.detail, f"{' or '.join(self.settings.allowed_schemes)}, at webhooks.allowed_hosts", url) from None

    def send(self, job: Job, *events: Event) -> None:
        """Deliver what happened to a job, after what is on its way already."""
        if job.webhook_url is None or not self._secret:
            return
        before = self._last.get(job.id)
        task = self._last[job.id] = asyncio.create_task(self._in_turn(before, job, events))
        task.add_done_callback(lambda done: self._last.pop(job.id) if self._last.get(job.id) is done else None)

    async def close(self, wait_s: float) -> None:
        """Give what is on its way some seconds."""
        if self._last:
            await asyncio.wait(self._last.values(), timeout=wait_s)
        for task in self._last.values():
            task.cancel()
        await self._client.aclose()

    async def _in_turn(self, before: asyncio.Task[None] | None, job: Job, events: tuple[Event, ...]) -> None:
        if before:
            await asyncio.wait([before])
        for event in events:
            try:
                await self._deliver(job, event)
            except (Undelivered, httpx.HTTPError, Problem) as error:
                log.warning("%s: the webhook %s is not delivered: %s", job.id, event, error)

    async def _deliver(self, job: Job, event: Event) -> None:
        body = json.dumps({"type": f"job.{event}", "timestamp": datetime.now(UTC).isoformat(), "data": job.state().model_dump(mode="json")})
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((Undelivered, httpx.TransportError)), stop=stop_after_attempt(self.settings.attempts),
            wait=wait_random_exponential(self.settings.retry_wait_s, max=self.settings.max_wait_s), reraise=True,
        )  # fmt: skip
        async for attempt in retrying:
            with attempt:
                await self._post(job, f"{job.id}.{event}", body)

    async def _post(self, job: Job, id: str, body: str) -> None:
        assert job.webhook_url is not None
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json", "Webhook-Id": id, "Webhook-Timestamp": str(int(now.timestamp())),
            "Webhook-Signature": Webhook(self._secret.removeprefix("whsec_") if self._secret.startswith("whsec_") else self._secret.encode()).sign(id, now, body),
        }  # fmt: skip
        async with self._client.stream("POST", job.webhook_url, content=body, headers=headers) as answer:  # the body is not read
            status = answer.status_code
        if status in (408, 425, 429) or status >= 500:
            raise Undelivered(f"{origin(httpx.URL(job.webhook_url))[1]} answered {status}")
        if status >= 300:
            log.warning("%s: the webhook's host answered %d; it is not tried again", job.id, status)
