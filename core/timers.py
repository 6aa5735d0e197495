"""Timers that keep requests in memory after they were answered, and how they are kept from it.

- BentoML sets one for each request and does not cancel it: taken out of its services, however soon a request was answered. It holds the
  request and its span for the eleven minutes that a service is declared with. Easel's deadlines (`Plan.deadline_s`) end what takes too long, and
  come first.
- asyncio keeps a timer that was cancelled, with the context that it was set in, until its time comes, or until more than half of at least 100
  are cancelled; deadlines are ten minutes. So few are enough to be swept here.
"""

from __future__ import annotations

import asyncio.base_events

from bentoml._internal.server.http import traffic
from starlette.types import ASGIApp, Receive, Scope, Send

SWEPT_FROM = 8  # timers of a loop


def let_go() -> None:
    """For each of the server's processes, before its services are served."""
    traffic.TimeoutMiddleware = _Through  # type: ignore[misc, assignment]
    asyncio.base_events._MIN_SCHEDULED_TIMER_HANDLES = SWEPT_FROM  # type: ignore[attr-defined]


class _Through:
    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
