"""Asks contenders for the pictures of a scenario, in its way, and notes when each was meant to be asked for and when it came."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from arrivals import Block, Sample, poisson
from contenders import Contender
from scenarios import Picture, Scenario
from turns import REPLY_S

SLOW_CLIENTS, PIECE_S = 2, 0.1  # half a KiB in so many seconds: 5 KiB/s
_RECEIVE_BYTES = 2048  # of a slow client's socket, so that what it has not read waits in the server


async def block(contender: Contender, scenario: Scenario, arrivals: list[float] | None = None) -> Block:
    """One contender's pictures of a scenario.

    Args:
        arrivals: of an open one, the seconds at which its pictures are asked for.

    Raises:
        RuntimeError: where a picture does not come.
    """
    async with session() as fast:
        if scenario.way in ("open", "burst"):
            return await _open(contender, scenario.pictures, arrivals or [0.0] * len(scenario.pictures), fast)
        if contender.alone:
            return await _in_turn(contender, scenario.pictures, fast)
        if scenario.way == "slow":
            async with _slow_clients(contender, scenario.pictures):
                return await _closed(contender, scenario.pictures, scenario.clients, fast)
        return await _closed(contender, scenario.pictures, scenario.clients, fast)


def times(scenario: Scenario, raw_rate: float, number: int) -> list[float] | None:
    """The arrivals of an open scenario in one round, the same for all contenders; None for the other ways."""
    return poisson(scenario.load * raw_rate, len(scenario.pictures), seed=number) if scenario.way == "open" else None


@contextlib.asynccontextmanager
async def session(slow: bool = False) -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as there are requests, each kept open."""
    more: dict[str, Any] = {"read_bufsize": 512} if slow else {}
    connector = aiohttp.TCPConnector(limit=0, socket_factory=_small_socket if slow else None)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(REPLY_S), **more) as made:
        yield made


async def _in_turn(contender: Contender, pictures: list[Picture], session: aiohttp.ClientSession) -> Block:
    """By the contender's own clock: what it takes to tell it is not counted."""
    samples, at = [], 0.0
    for picture in pictures:
        _, took = await contender.draw(picture, session)
        assert took is not None
        samples.append(Sample(at, at + took))
        at += took
    return Block(samples, at)


async def _closed(contender: Contender, pictures: list[Picture], clients: int, session: aiohttp.ClientSession) -> Block:
    began = time.perf_counter()

    async def client(own: list[Picture]) -> list[Sample]:
        samples, intended = [], 0.0
        for picture in own:
            await contender.draw(picture, session)
            samples.append(Sample(intended, time.perf_counter() - began))
            intended = samples[-1].ended
        return samples

    return _block(await _all(client(pictures[k::clients]) for k in range(clients)))


async def _open(contender: Contender, pictures: list[Picture], arrivals: list[float], session: aiohttp.ClientSession) -> Block:
    began = time.perf_counter()

    async def one(picture: Picture, at: float) -> list[Sample]:
        await asyncio.sleep(at - (time.perf_counter() - began))
        await contender.draw(picture, session)
        return [Sample(at, time.perf_counter() - began)]

    return _block(await _all(one(picture, at) for picture, at in zip(pictures, arrivals, strict=True)))


@contextlib.asynccontextmanager
async def _slow_clients(contender: Contender, pictures: list[Picture]) -> AsyncIterator[None]:
    """Ask for pictures again and again, and read them slowly, until it is left."""

    async def client(slow: aiohttp.ClientSession) -> None:
        for picture in itertools.cycle(pictures):
            await contender.draw(picture, slow, PIECE_S)

    async with session(slow=True) as slow:
        tasks = [asyncio.create_task(client(slow)) for _ in range(SLOW_CLIENTS)]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _all(work: Any) -> list[list[Sample]]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


def _block(each: list[list[Sample]]) -> Block:
    samples = [sample for some in each for sample in some]
    return Block(samples, max(s.ended for s in samples) - min(s.intended for s in samples))


def _small_socket(address: Any) -> socket.socket:
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    made.setblocking(False)
    return made
