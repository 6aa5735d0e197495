"""What a process does with what it has in hand when it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from core.draining import Draining
from core.problems import Problem


class Server:
    """Stands for uvicorn: notes when its handler of SIGTERM runs."""

    def __init__(self, draining: Draining) -> None:
        self.stopped: list[float] = []
        signal.signal(signal.SIGTERM, self._stop)
        draining.install()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped.append(time.monotonic())

    def signal(self) -> None:
        signal.raise_signal(signal.SIGTERM)

    async def gone(self, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not self.stopped:
                await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def answer(draining: Draining, seconds: float) -> str:
    with draining.answering():
        await asyncio.sleep(seconds)
    return "done"


def test_what_is_done_in_time_is_delivered() -> None:
    async def run() -> None:
        draining = Draining(grace_s=20, linger_s=0)
        server = Server(draining)
        work = asyncio.create_task(answer(draining, 0.3))
        await asyncio.sleep(0.05)
        assert draining.in_hand == 1
        server.signal()
        await server.gone(5)
        assert await work == "done"
        assert draining.active
        assert not draining.over

    asyncio.run(run())


@pytest.mark.parametrize("again", [False, True], ids=["grace", "second-signal"])
def test_what_takes_longer_is_told_and_ended(again: bool) -> None:
    async def run() -> None:
        draining = Draining(grace_s=30 if again else 0.3, linger_s=0)
        server = Server(draining)
        stop = asyncio.Event()

        async def plan() -> None:
            with draining.holding(stop.set):
                await stop.wait()

        work, held = asyncio.create_task(answer(draining, 60)), asyncio.create_task(plan())
        await asyncio.sleep(0.05)
        server.signal()
        await asyncio.sleep(0.1)
        assert not work.done()
        if again:
            server.signal()
        await server.gone(3)
        await held
        with pytest.raises(Problem, match="shutting down") as told:
            await work
        assert told.value.details.status == 503
        assert work.cancelling() == 0  # it can still send that answer
        assert draining.in_hand == 0

    asyncio.run(run())


def test_two_signals_at_once_leave_no_grace_time() -> None:
    async def run() -> None:
        draining = Draining(grace_s=30, linger_s=0)
        server = Server(draining)
        work = asyncio.create_task(answer(draining, 60))
        await asyncio.sleep(0.05)
        server.signal()
        server.signal()
        await server.gone(3)
        with pytest.raises(Problem, match="shutting down"):
            await work

    asyncio.run(run())


def test_what_does_not_end_is_left_at_a_third_signal() -> None:
    async def run() -> None:
        draining = Draining(grace_s=30, linger_s=0)
        server = Server(draining)
        with draining.holding():
            for _ in range(2):
                server.signal()
                await asyncio.sleep(0.1)
            assert not server.stopped
            server.signal()
            assert server.stopped

    asyncio.run(run())


def test_a_client_that_leaves_is_no_end_of_the_grace_time() -> None:
    async def run() -> None:
        work = asyncio.create_task(answer(Draining(1, 0), 60))
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(run())
