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


def test_an_answered_request_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "TimeoutMiddleware", traffic.TimeoutMiddleware)
    timers.take_out()
    assert not kept(traffic.TimeoutMiddleware)
