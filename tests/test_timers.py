"""A request that was answered is not kept in memory."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref

import pytest
from bentoml._internal.server.http import traffic
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message

from core import timers


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undone after each test."""
    monkeypatch.setattr(traffic, "TimeoutMiddleware", traffic.TimeoutMiddleware)
    monkeypatch.setattr(asyncio.base_events, "_MIN_SCHEDULED_TIMER_HANDLES", asyncio.base_events._MIN_SCHEDULED_TIMER_HANDLES)


class Request:
    """What a context keeps alive."""


def kept(middleware: type) -> bool:
    """Whether BentoML's part of a service keeps a request once it was answered."""
    current: contextvars.ContextVar[Request] = contextvars.ContextVar("current")

    async def run() -> bool:
        app: ASGIApp = middleware(PlainTextResponse("done"), timeout=60)

        async def serve() -> weakref.ref[Request]:
            request = Request()
            current.set(request)

            async def receive() -> Message:
                return {"type": "http.request"}

            async def send(_: Message) -> None:
                pass

            await app({"type": "http", "method": "GET", "headers": []}, receive, send)
            return weakref.ref(request)

        request = await asyncio.create_task(serve())
        await asyncio.sleep(0)
        gc.collect()
        return request() is not None

    return asyncio.run(run())


def test_an_answered_request_is_let_go() -> None:
    timers.let_go()
    assert not kept(traffic.TimeoutMiddleware)


@pytest.mark.parametrize("ours", [True, False])
def test_a_deadline_that_did_not_come_keeps_no_request(ours: bool) -> None:
    if ours:
        timers.let_go()
    current: contextvars.ContextVar[Request] = contextvars.ContextVar("current")

    async def serve() -> weakref.ref[Request]:
        request = Request()
        current.set(request)
        async with asyncio.timeout(600):
            await asyncio.sleep(0)
        return weakref.ref(request)

    async def run() -> int:
        asyncio.get_running_loop().call_later(60, print)  # those that were cancelled before the next one's time go at once
        requests = [await asyncio.create_task(serve()) for _ in range(40)]
        await asyncio.sleep(0.01)
        gc.collect()
        return sum(request() is not None for request in requests)

    kept = asyncio.run(run())
    assert (kept <= timers.SWEPT_FROM) == ours, kept
