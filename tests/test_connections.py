"""Clients that ask or read slowly, or open connections and do nothing: closed, and others served meanwhile. The listener is a real one; what
it serves is not BentoML's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from bentoml._internal.context import server_context
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import gate
from core import connections
from core.auth import Keys
from core.draining import Draining
from core.quotas import Quotas
from core.settings import Secrets, Settings

PATIENCE_S = 1.0
SIZE = 32 * 2**20  # of an answer, more than sockets hold
ASK = b"POST /capabilities HTTP/1.1\r\nHost: localhost\r\nX-API-Key: user-key\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The length of what was sent; to a GET, much."""
    body = await Request(scope, receive).body()
    await Response(bytes(SIZE) if scope["method"] == "GET" else str(len(body)))(scope, receive, send)


@contextlib.asynccontextmanager
async def listening(monkeypatch: pytest.MonkeyPatch, **server: object) -> AsyncIterator[Callable[[bytes], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]]:
    """A listener behind the gate; gives how to connect to it and say something."""
    settings = Settings(server={"patience_s": PATIENCE_S, **server})
    http = FastAPI()
    http.state.routes = []
    door = gate.Gate(echo, settings=settings, keys=Keys(settings, Secrets(api_key="user-key")), quotas=Quotas(settings.quotas, set(), lambda: pytest.fail("not asked"), lambda _: 0), http=http, draining=Draining(1, 0))
    monkeypatch.setattr(server_context, "service_type", "entry_service")
    monkeypatch.setattr(connections.Bounded, "bounds", settings.server, raising=False)
    monkeypatch.setattr(connections.Bounded, "most", settings.server.connections, raising=False)
    made = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(door, http=connections.Bounded, log_config=None, lifespan="off"))
    running.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(running.serve([made]))

    async def connect(hello: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*made.getsockname(), limit=1024)
        writer.write(hello)
        return reader, writer

    try:
        while not running.started:
            await asyncio.sleep(0.01)
        yield connect
    finally:
        running.should_exit = running.force_exit = True
        await task


async def trickle(writer: asyncio.StreamWriter) -> None:
    """A byte now and then for as long as they are taken."""
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(PATIENCE_S / 5)


async def said(reader: asyncio.StreamReader) -> bytes:
    """All until the server closes the connection, which it does within some patience."""
    text = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20 * PATIENCE_S):
            while more := await reader.read(2**16):
                text += more
    return text


def test_who_does_not_come_to_an_end_with_asking_is_closed_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def attack() -> None:
        async with listening(monkeypatch) as connect:
            quiet = [await connect(hello) for hello in (b"", b"GET / HTTP/1.1\r\nX-Slow: ", b"GET / HT")]
            slow = await connect(ASK + b"Content-Length: 1000\r\n\r\n")
            refused = await connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
            told, unknown = (asyncio.create_task(said(reader)) for reader, _ in (slow, refused))  # at once: who writes on to a closed connection loses what it was told
            trickling = [asyncio.create_task(trickle(writer)) for _, writer in (quiet[1], slow, refused)]
            reader, _ = await connect(ASK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc")
            assert (await said(reader)).endswith(b"3")
            for reader, _ in quiet:
                assert await said(reader) == b""
            assert b" 408 " in await told
            assert b" 401 " in await unknown  # and no longer listened to
            for task in trickling:
                task.cancel()

    asyncio.run(attack())


def test_a_body_that_comes_as_fast_as_it_must_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send() -> None:
        async with listening(monkeypatch, least_rate=1000) as connect:
            reader, writer = await connect(ASK + b"Connection: close\r\nContent-Length: 9000\r\n\r\n")
            for _ in range(9):  # 3 s, of 10 that it may take
                writer.write(b"a" * 1000)
                await asyncio.sleep(PATIENCE_S / 3)
            assert (await said(reader)).endswith(b"9000")

    asyncio.run(send())


@pytest.mark.parametrize(("least_rate", "whole"), [(2**30, False), (2048, True)])
def test_who_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch, least_rate: int, whole: bool) -> None:
    async def attack() -> None:
        async with listening(monkeypatch, least_rate=least_rate) as connect:
            reader, _ = await connect(b"GET /capabilities HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-API-Key: user-key\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(3 * PATIENCE_S)
            assert (len(await said(reader)) >= SIZE) is whole

    asyncio.run(attack())


def test_beyond_their_number_the_longest_idle_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def attack() -> None:
        async with listening(monkeypatch, connections=20, patience_s=60) as connect:
            idle = []
            for _ in range(60):
                idle.append(await connect(b""))
                await asyncio.sleep(0.01)
            began = time.monotonic()
            reader, _ = await connect(ASK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc")
            assert (await said(reader)).endswith(b"3")
            gone = [await said(reader) for reader, _ in idle[:40]]
            assert gone == [b""] * 40
            assert time.monotonic() - began < 30  # long before their patience was over
            for _, writer in idle:
                writer.close()

    asyncio.run(attack())
