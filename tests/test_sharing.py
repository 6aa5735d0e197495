"""Requests for the very same are computed once; each has its own deadline, and may leave alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TypeVar

import pytest
import torch

from core.catalogue import Catalogue
from core.draining import Draining
from core.generation import Generation
from core.model_settings import Model, Models, Queue
from core.plans import Inputs, Pixels, Plan
from core.requests import GenerationRequest
from core.settings import Settings
from runners.diffusion import DiffusionRunner
from tests.conftest import held, wait_for

T = TypeVar("T")
SETTINGS = Settings(models=Models(default="starter", catalogue=[Model(id="starter", family="starter", source="starter/stable-diffusion")], cpu_threads=1), queue=Queue(limit=8, per_key=4))


@pytest.fixture(scope="module")
def runner() -> Iterator[DiffusionRunner]:
    made = DiffusionRunner()
    made.start("test", SETTINGS, SETTINGS.models, Draining(1, 0))
    yield made
    made.device.queue.close()
    torch.set_num_threads(2)


def plan(client: str = "me", image: Pixels | None = None, **values: object) -> Plan:
    asked = {"prompt": "red apple", "seed": 1, "num_inference_steps": 2, **values}
    return Catalogue(SETTINGS).plan(GenerationRequest.model_validate(asked), Inputs(image=image), client)


def run(runner: DiffusionRunner, wanted: Plan) -> Awaitable[Generation]:
    return asyncio.ensure_future(DiffusionRunner.run.func(runner, wanted))


def steps(runner: DiffusionRunner, work: Callable[[], Coroutine[None, None, T]]) -> tuple[T, int]:
    """What comes of some work, and how often the denoiser ran for it."""
    entry = runner.device.catalogue.find("starter")
    unet = runner.device.residency.acquire(entry, runner.device.fetch(entry), torch.float32).base.unet
    passes: list[int] = []
    hook = unet.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        return asyncio.run(work()), len(passes)
    finally:
        hook.remove()


async def waiting(runner: DiffusionRunner, jobs: int, waiters: int) -> None:
    """Until so many jobs wait in the queue, and so many requests for them."""
    while runner.device.queue.status().waiting != jobs or len(runner._in_hand._of) != waiters:
        await asyncio.sleep(0.005)


def test_what_is_asked_for_twice_at_once_is_computed_once(runner: DiffusionRunner) -> None:
    async def work() -> list[Generation]:
        go = held(runner.device)
        works = [run(runner, plan()) for _ in range(3)]
        await waiting(runner, 1, 3)
        go.set()
        return await asyncio.gather(*works)

    drawn, passes = steps(runner, work)
    assert passes == 2
    assert len({g.pictures[0].data for g in drawn}) == 1
    drawn[0].ran.timing.encode = 5  # each answer's to write
    assert [g.ran.timing.encode for g in drawn[1:]] == [0, 0]
    again, passes = steps(runner, lambda: DiffusionRunner.run.func(runner, plan()))
    assert passes == 2  # what is done is not kept
    assert again.pictures == drawn[0].pictures


def test_only_the_very_same_is(runner: DiffusionRunner) -> None:
    one, other = (Pixels(width=8, height=8, data=bytes([shade] * 192)) for shade in (1, 2))
    different = [
        plan(), plan("you"), plan(seed=2), plan(prompt="blue apple"), plan(negative_prompt="x"), plan(guidance_scale=3), plan(width=48), plan(count_returned=2),
        plan(image=one, strength=1), plan(image=other, strength=1), plan(image=one, strength=0.9), plan(image=Pixels(width=4, height=16, data=one.data), strength=1),
    ]  # fmt: skip
    assert len({p.identity for p in different}) == len(different)
    assert plan(image=one).identity == plan(image=one, deadline_s=5).identity


def test_one_that_leaves_takes_nobody_along_and_the_last_ends_the_work(runner: DiffusionRunner) -> None:
    async def work() -> list[Generation]:
        go = held(runner.device)
        plans = [plan() for _ in range(3)]
        works = [run(runner, each) for each in plans]
        await waiting(runner, 1, 3)
        assert await DiffusionRunner.cancel.func(runner, plans[0].id)  # whose job it is
        assert not await DiffusionRunner.cancel.func(runner, plans[0].id)
        left = await works[0]
        await waiting(runner, 1, 2)
        go.set()
        stayed = await asyncio.gather(*works[1:])

        go = held(runner.device)
        works = [run(runner, each) for each in plans[:2]]
        await waiting(runner, 1, 2)
        for each in plans[:2]:
            assert await DiffusionRunner.cancel.func(runner, each.id)
        gone = await asyncio.gather(*works)
        await waiting(runner, 0, 0)
        late = run(runner, plan())  # is begun anew
        await waiting(runner, 1, 1)
        go.set()
        return [left, *stayed, *gone, await late]

    outcomes, passes = steps(runner, work)
    assert [len(g.pictures) for g in outcomes] == [0, 1, 1, 0, 0, 1]
    assert [g.problem.status for g in outcomes if g.problem] == [499] * 3
    assert passes == 4


def test_a_running_work_that_nobody_waits_for_stops_at_its_next_step(runner: DiffusionRunner) -> None:
    async def work() -> Generation:
        endless = plan(num_inference_steps=150)
        drawing = run(runner, endless)
        while runner.device.queue.status().progress is None:
            await asyncio.sleep(0.005)
        assert await DiffusionRunner.cancel.func(runner, endless.id)
        return await drawing

    outcome, passes = steps(runner, work)
    assert outcome.problem.status == 499
    wait_for(lambda: runner.device.queue.idle, 5)
    assert passes < 100


def test_each_has_its_own_deadline_and_hears_of_it_at_once(runner: DiffusionRunner) -> None:
    """The device is held all the while: who waits does not have to have a turn to be told."""

    async def work() -> tuple[list[Generation], float]:
        go = held(runner.device)
        began = time.monotonic()
        short, long = run(runner, plan(deadline_s=0.3)), run(runner, plan(deadline_s=60))
        alone = run(runner, plan(seed=2, deadline_s=0.3))
        late = await asyncio.gather(short, alone)
        took = time.monotonic() - began
        await waiting(runner, 1, 1)  # nobody waits for the second seed any more
        go.set()
        return [*late, await long], took

    (short, alone, long), took = asyncio.run(work())
    assert [short.problem.status, alone.problem.status] == [504, 504]
    assert "0.3 s" in short.problem.detail
    assert 0.3 <= took < 3
    assert len(long.pictures) == 1


def test_equal_requests_are_bounded_as_others_are(runner: DiffusionRunner) -> None:
    """Four of a key wait for one piece of work; more wait as work of their own, which the queue refuses at four."""

    async def work() -> list[Generation]:
        go = held(runner.device)
        works = [run(runner, plan()) for _ in range(18)]
        await waiting(runner, 4, 16)
        go.set()
        return await asyncio.gather(*works)

    outcomes, passes = steps(runner, work)
    assert sorted(g.problem.status if g.problem else 200 for g in outcomes) == [200] * 16 + [429] * 2
    assert passes < 16 * 2
