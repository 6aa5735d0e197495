"""Runners that are busy at once on one CPU divide its cores; one that is busy alone has them all."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from core.catalogue import Catalogue
from core.model_settings import Model, Models
from core.requests import GenerationRequest
from core.settings import Settings
from runners import cores
from runners.cores import LINGER_S, Cores
from runners.device import Device

FORK = multiprocessing.get_context("fork")


def run(orders: Connection, *arguments: object) -> None:
    """A runner's process: does as it is told, and answers how many threads torch has."""
    own, entered = Cores(*arguments), ExitStack()
    time.sleep(1.5 * LINGER_S)  # new files look as if just let go
    while True:
        match orders.recv():
            case "work":
                entered.enter_context(own.busy())
            case "step":
                own.divide()
            case "rest":
                entered.close()
        orders.send(torch.get_num_threads())


class Runner:
    def __init__(self, *arguments: object) -> None:
        self._orders, theirs = FORK.Pipe()
        self.process = FORK.Process(target=run, args=(theirs, *arguments), daemon=True)
        self.process.start()

    def threads(self, order: str) -> int:
        self._orders.send(order)
        assert self._orders.poll(20)
        return self._orders.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Callable[..., Runner]]:
    made = []

    def make(count: int, fixed: int | None = None) -> Runner:
        made.append(Runner(fixed, count, tmp_path / "cores"))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture(autouse=True)
def looks_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "LOOK_S", 0.0)


def test_it_looks_no_more_often_than_it_should(runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "LOOK_S", 60.0)
    one, other = runner(8), runner(8)
    assert [one.threads("work"), other.threads("work"), one.threads("step")] == [8, 4, 8]
    one.threads("rest")
    assert one.threads("work") == 4  # it looks when it begins


def test_two_that_are_busy_have_half_of_the_cores_each_and_one_alone_has_all(runner: Callable[..., Runner]) -> None:
    one, other = runner(8), runner(8)
    assert one.threads("work") == 8
    assert other.threads("work") == 4
    assert [one.threads("step"), other.threads("step")] == [4, 4]
    other.threads("rest")
    assert one.threads("step") == 4  # it may go on at once
    time.sleep(1.5 * LINGER_S)
    assert one.threads("step") == 8


def test_one_that_is_killed_leaves_its_cores(runner: Callable[..., Runner]) -> None:
    one, other = runner(2), runner(2)
    assert [one.threads("work"), other.threads("work"), one.threads("step")] == [2, 1, 1]
    other.kill()
    assert one.threads("step") == 2


def test_no_core_is_left_over_and_nobody_has_less_than_one_thread(runner: Callable[..., Runner]) -> None:
    three = [runner(8) for _ in range(3)]
    for one in three:
        one.threads("work")
    assert sorted(one.threads("step") for one in three) == [2, 3, 3]
    many = [runner(2) for _ in range(3)]
    assert all(one.threads("work") == 1 for one in many)


def test_a_configured_number_of_threads_holds_and_the_others_know_of_it(runner: Callable[..., Runner]) -> None:
    fixed, other = runner(8, 3), runner(8)
    assert [fixed.threads("work"), other.threads("work"), fixed.threads("step")] == [3, 4, 3]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cores"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with Cores(cores=4, folder=folder).busy():
        assert torch.get_num_threads() == 4
    assert "not a private folder" in caplog.text
    torch.set_num_threads(1)


def test_a_runner_divides_the_cores_between_its_steps(runner: Callable[..., Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available", lambda: 2)
    monkeypatch.setattr(cores, "FOLDER", tmp_path / "cores")
    settings = Settings(models=Models(default="starter", catalogue=[Model(id="starter", family="starter", source="starter/stable-diffusion")]))
    other = runner(2)  # before this process has the files open: they would be the fork's too
    device, seen = Device(settings, Catalogue(settings)), []

    def step(*_: object) -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            other.threads("work")
        if len(seen) == 4:
            other.kill()

    entry = device.catalogue.find("starter")
    plan = device.catalogue.plan(GenerationRequest(prompt="apple", num_inference_steps=6), None, "test")
    path = device.fetch(entry)
    device.residency.acquire(entry, path, torch.float32).base.unet.register_forward_pre_hook(step)
    generation = device.submit(plan, path).result(60)
    device.queue.close()
    assert generation.problem is None
    assert seen == [2, 2, 1, 1, 2, 2]
