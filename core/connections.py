"""Bounds on the public listener's connections: how many there may be, and how slowly they may ask and read. uvicorn has none, so that
whoever opens some, and then does next to nothing, would keep others out.

Bodies that come slowly are the gate's (api.gate), which can answer them.
"""

from __future__ import annotations

import asyncio
import resource
from typing import ClassVar, cast

import uvicorn.config
from bentoml._internal.context import server_context
from uvicorn.protocols.http.h11_impl import H11Protocol

from core.settings import Server

FILES = 512  # what a process may have open beside its connections
LOOKS = 8  # how often a connection is looked at within its patience
SHARE = 16  # where there are too many, this part of them goes at once, so that looking for them is rare


def bound(server: Server) -> None:
    """For each of the server's processes, before it listens."""
    Bounded.bounds, Bounded.most = server, _room(server.connections)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Bounded.__name__}"  # BentoML passes uvicorn no choice


def _room(connections: int) -> int:
    """So many, or what open files allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = connections + FILES if hard == resource.RLIM_INFINITY else min(hard, connections + FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, min(connections, most - FILES))


class Bounded(H11Protocol):
    """A connection that is closed where it keeps the server waiting: for the whole of its next request's headers `patience_s`; for what it
    reads of an answer, that and what `least_rate` gives it for its length. A runner's, behind the entry's, are left alone."""

    bounds: ClassVar[Server]
    most: ClassVar[int]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._looking: asyncio.TimerHandle | None = None
        if server_context.service_type != "entry_service":
            return
        self.waits_since, self._unread_since, self._unread = self.loop.time(), 0.0, 0
        self._last: object = None
        self._look()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._looking:
            self._looking.cancel()

    @property
    def waits(self) -> bool:
        """Whether no request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _look(self) -> None:
        now = self.loop.time()
        if not self.waits or self.cycle is not self._last:
            self.waits_since, self._last = now, self.cycle
        unread = self.transport.get_write_buffer_size()
        if not unread or not self._unread:
            self._unread_since = now
        self._unread = max(self._unread, unread) if unread else 0
        patience = self.bounds.patience_s
        if (self.waits and not unread and now - self.waits_since > patience) or now - self._unread_since > patience + self._unread / self.bounds.least_rate:
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(patience / LOOKS, self._look)

    def _make_room(self) -> None:
        """Close the connections that have waited longest for a request; this one, where all have one."""
        waiting = sorted((one for one in cast("set[Bounded]", self.connections) if one.waits), key=lambda one: one.waits_since)
        for one in waiting[: max(1, self.most // SHARE)]:
            one.transport.abort()
