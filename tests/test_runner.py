"""Between entry and runner: a cancel before the device has the work, and a runner that is late or gone."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from pathlib import Path

import pytest
import uvicorn

from api import backend, probing, reading
from core.catalogue import Catalogue
from core.draining import Draining
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Plan
from core.problems import Problem
from core.settings import Settings
from core.status import RunnerStatus
from runners import diffusion
from runners.diffusion import DiffusionRunner

SETTINGS = Settings(models=Models(default="m", catalogue=[Model(id="m", family="sd15", source="/nowhere")], cpu_threads=1))


def plan() -> Plan:
    return Catalogue(SETTINGS).plan(reading.parse({"prompt": "x"}), None, "test")


def test_a_client_that_leaves_while_weights_are_fetched_is_not_drawn_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, fetched, drawn = DiffusionRunner(), threading.Event(), []
    runner.start("test", SETTINGS, SETTINGS.models, Draining(1, 0))

    def slow_fetch(_: object) -> Path:
        fetched.wait(60)
        return Path("/nowhere")

    monkeypatch.setattr(runner.device, "fetch", slow_fetch)
    monkeypatch.setattr(runner.device, "submit", lambda *args: drawn.append(args))

    async def leave() -> Generation:
        wanted = plan()
        work = asyncio.create_task(DiffusionRunner.run.func(runner, wanted))
        await asyncio.sleep(0.1)
        assert await DiffusionRunner.cancel.func(runner, wanted.id)
        outcome = await asyncio.wait_for(work, 5)
        fetched.set()
        assert not await DiffusionRunner.cancel.func(runner, wanted.id)
        return outcome

    outcome = asyncio.run(leave())
    assert outcome.problem.status == 499
    assert not drawn
    runner.device.queue.close()


class Elsewhere:
    """A runner that draws for half a second and whose status answers, hangs or has no connection, in turn."""

    def __init__(self, answers: list[str], pid: int | None = None) -> None:
        self.answers, self.asked, self.pid = answers, 0, pid
        self.cancelled: list[str] = []

    async def run(self, _: Plan) -> Generation:
        await asyncio.sleep(0.5)
        return Generation(seeds=[1])

    async def cancel(self, plan_id: str) -> bool:
        self.cancelled.append(plan_id)
        return True

    async def status(self) -> RunnerStatus:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else "well"
        if answer == "hangs":
            await asyncio.Event().wait()
        if answer == "refuses":
            raise ConnectionRefusedError
        return RunnerStatus.model_construct(pid=self.pid)


@pytest.mark.parametrize(("answers", "kept"), [(["hangs", "well", "hangs"], True), (["refuses"] * 20, True), (["hangs"] * 20, False)])
def test_only_a_runner_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, answers: list[str], kept: bool) -> None:
    monkeypatch.setattr(probing, "EVERY_S", 0.01)
    monkeypatch.setattr(probing, "TIMEOUT_S", 0.02)
    monkeypatch.setattr(probing, "_processes", {})
    monkeypatch.setattr(backend, "workers_of", lambda _: {"StableDiffusion": Elsewhere(list(answers))})
    if kept:
        assert asyncio.run(backend.generate(plan(), None)).seeds == [1]
    else:
        with pytest.raises(Problem) as caught:
            asyncio.run(backend.generate(plan(), None))
        assert caught.value.details.status == 503


@pytest.mark.parametrize(("killed", "kept"), [(False, True), (True, False)], ids=["starved", "killed"])
def test_a_runner_that_answers_no_probe_keeps_its_work_while_its_process_lives(monkeypatch: pytest.MonkeyPatch, killed: bool, kept: bool) -> None:
    monkeypatch.setattr(probing, "EVERY_S", 0.02)
    monkeypatch.setattr(probing, "TIMEOUT_S", 0.02)
    monkeypatch.setattr(probing, "MISSED_UNSEEN", 1000)
    monkeypatch.setattr(probing, "_processes", {})
    with subprocess.Popen(["sleep", "60"]) as process:
        runner = Elsewhere(["well", *["hangs"] * 100], process.pid)
        monkeypatch.setattr(backend, "workers_of", lambda _: {"StableDiffusion": runner})

        async def drawn() -> Generation:
            drawing = asyncio.ensure_future(backend.generate(plan(), None))
            while runner.asked < 2:
                await asyncio.sleep(0.01)
            if killed:
                process.kill()  # and not waited for: a zombie
            return await drawing

        try:
            if kept:
                assert asyncio.run(drawn()).seeds == [1]
                assert runner.asked > 2 + probing.MISSED
            else:
                with pytest.raises(Problem) as caught:
                    asyncio.run(drawn())
                assert caught.value.details.type.endswith("runner-gone")
        finally:
            process.kill()


def test_work_whose_waiter_is_cancelled_is_cancelled_at_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = Elsewhere([]), plan()
    monkeypatch.setattr(backend, "workers_of", lambda _: {"StableDiffusion": runner})

    async def give_up() -> None:
        waiting = asyncio.ensure_future(backend.generate(asked, None))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(give_up())
    assert runner.cancelled == [asked.id]


def test_all_who_wait_for_a_runner_ask_together_whether_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "EVERY_S", 0.1)
    runner = Elsewhere([])
    monkeypatch.setattr(backend, "workers_of", lambda _: {"StableDiffusion": runner})

    async def wait() -> None:
        await asyncio.gather(*(backend.generate(plan(), None) for _ in range(50)))
        asked = runner.asked
        assert 1 <= asked <= 5  # of the half second that each takes, a tenth apart
        await asyncio.sleep(0.25)
        assert runner.asked == asked  # nobody waits, and nobody asks

    asyncio.run(wait())


@pytest.mark.parametrize(("fetch_s", "slug"), [(0.05, "deadline-passed"), (2, "model-downloading")])
def test_a_deadline_that_passes_is_a_504_but_for_models_that_are_downloaded(monkeypatch: pytest.MonkeyPatch, fetch_s: float, slug: str) -> None:
    monkeypatch.setattr(diffusion, "LOCAL_S", 0.5)
    runner, fetched = DiffusionRunner(), threading.Event()
    runner.start("test", SETTINGS, SETTINGS.models, Draining(1, 0))

    def fetch(_: object) -> Path:
        fetched.wait(fetch_s)
        return Path("/nowhere")

    monkeypatch.setattr(runner.device, "fetch", fetch)
    outcome = asyncio.run(DiffusionRunner.run.func(runner, plan().model_copy(update={"deadline_s": 5e-324})))
    runner.device.queue.close()
    assert outcome.problem is not None
    assert outcome.problem.type.endswith(slug)


def test_an_idle_connection_is_let_go_before_the_worker_closes_it() -> None:
    assert uvicorn.Config("service:http").timeout_keep_alive / 2 > backend.KEPT_S
