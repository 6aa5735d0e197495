"""BentoML's own timeout, taken out of its services.

For each request it sets a timer that it does not cancel, and that keeps the request and its span in memory until the timeout is over, however
soon it was answered: at the eleven minutes that a service is declared with, tens of megabytes for a few requests a second. Easel's
deadlines (`Plan.deadline_s`) end what takes too long, and come first.
"""

from __future__ import annotations

from bentoml._internal.server.http import traffic
from starlette.types import ASGIApp, Receive, Scope, Send


def take_out() -> None:
    """For each of the server's processes, before its services are served."""
    traffic.TimeoutMiddleware = _Through  # type: ignore[misc, assignment]


class _Through:
    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
