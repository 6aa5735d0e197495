"""Several workers of one runner: where they run, and which of them gets a request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from api import backend, routing
from core.generation import Generation
from core.model_settings import Model, Models, Runner
from core.placement import Place, gpus_seen, places, share
from core.status import QueueStatus, ResidentModel, RunnerStatus
from tests.conftest import Server, serving, wait_for
from tests.test_runner import plan

MODELS = Models(default="m", catalogue=[Model(id="m", family="sd15")])


def test_each_worker_is_dealt_a_gpu_of_its_own() -> None:
    assert share(None, 2, 0) == 0
    assert [share(None, workers, gpus) for workers, gpus in ((2, 1), (2, 2), (3, 2), (5, 8))] == [0.5, 1, 0.5, 1]
    assert places("SD", 1, MODELS, 0.5, 1, True) == [Place("SD", None, 0.5)]
    assert places("SD", 3, MODELS, 1, 4, True) == [Place("SD", None, 1), Place("SD2", None, 1), Place("SD3", None, 1)]
    assert places("SD", 2, MODELS, 1, 2, False) == [Place("SD", "cuda:0", 1), Place("SD2", "cuda:1", 1)]
    assert places("SD", 2, MODELS, 0, 0, True) == [Place("SD", None, 0), Place("SD2", None, 0)]
    assert places("SD", ["cuda:1", "cuda:3", "cpu"], MODELS, 1, 4, True) == [Place("SD", "cuda:1", 0), Place("SD2", "cuda:3", 0), Place("SD3", "cpu", 0)]
    assert places("SD", 2, MODELS.model_copy(update={"device": "cpu"}), 1, 2, True) == [Place("SD", "cpu", 0), Place("SD2", "cpu", 0)]


def test_places_that_would_share_a_gpu_or_lack_one_are_refused() -> None:
    on_second = MODELS.model_copy(update={"device": "cuda:1"})
    spread = Models(default="m", catalogue=[Model(id="m", family="sd15", optimise={"device_map": "balanced"})])
    for workers, models, gpu, said in (
        (2, on_second, 1, "list their devices"),
        (["cuda:0", "cuda:0"], MODELS, 1, "more than once"),
        (["cuda:0"], on_second, 1, "not in both"),
        (3, MODELS, 1, "do not fit the 2"),
        (1, spread, 1, "several GPUs"),
    ):
        with pytest.raises(ValueError, match=said):
            places("SD", workers, models, gpu, 2, True)
    assert places("SD", 1, spread, 2, 2, True) == [Place("SD", None, 2)]
    with pytest.raises(ValueError, match="String should match pattern"):
        Runner(workers=["gpu0"])


def test_workers_processes_see_the_gpus_as_the_first_process_did() -> None:
    first: dict[str, str] = {}
    assert gpus_seen(4, first) == (4, True)
    assert gpus_seen(4, {**first, "CUDA_VISIBLE_DEVICES": "2"}) == (4, True)  # in a worker, as BentoML dealt
    assert gpus_seen(4, {"CUDA_VISIBLE_DEVICES": "1,3"}) == (2, False)
    assert gpus_seen(4, {"CUDA_VISIBLE_DEVICES": ""}) == (0, False)


class Worker:
    """A worker with some models in memory, requests waiting, and a life."""

    def __init__(self, *models: str, waiting: int = 0, free: int = 100, alive: bool = True) -> None:
        self.models, self.waiting, self.free, self.alive, self.done = models, waiting, free, alive, 0

    async def status(self) -> RunnerStatus:
        if not self.alive:
            raise ConnectionError
        models = [ResidentModel(model_id=m, family="sd15", state="warm", resident_bytes=10) for m in self.models]
        resident = 10 * len(models)
        queue = QueueStatus(running=0, waiting=self.waiting, limit=64, mean_service_s=None)
        return RunnerStatus(
            service="w", ready=True, draining=False, device="cpu", memory_budget_bytes=resident + self.free, resident_bytes=resident, models=models, queue=queue
        )  # fmt: skip

    async def run(self, _: object) -> Generation:
        if not self.alive:
            raise ConnectionError
        self.done += 1
        return Generation(seeds=[1])

    async def cancel(self, _: str) -> bool:
        if not self.alive:
            raise ConnectionError
        return False


def chosen(*workers: Worker, model: str = "a") -> int:
    """Which worker a plan for `model` goes to."""

    async def ask() -> str:
        try:
            return await routing.choose({str(i): worker for i, worker in enumerate(workers)}, model)
        finally:
            for task in routing._aside.values():
                task.cancel()
            await asyncio.sleep(0)

    return int(asyncio.run(ask()))


def test_a_model_stays_where_it_is_and_a_new_one_goes_where_least_is() -> None:
    assert chosen(Worker("b"), Worker("a")) == 1
    assert chosen(Worker("b"), Worker("a", "c")) == 1
    assert chosen(Worker("a"), Worker(), model="b") == 1
    assert chosen(Worker("a"), Worker("b"), Worker("c", "d"), model="e") in (0, 1)


def test_of_workers_with_the_model_the_least_loaded_is_taken() -> None:
    assert chosen(Worker("a", waiting=2), Worker("a", waiting=1), Worker("b")) == 2
    assert chosen(Worker("a", waiting=2), Worker("a", waiting=1), Worker("b", free=5)) == 1


def test_a_busy_workers_model_is_loaded_elsewhere_where_there_is_room_and_only_for_a_long_queue_where_not() -> None:
    assert chosen(Worker("a", waiting=1), Worker("b")) == 1
    assert chosen(Worker("a", waiting=1), Worker("b", free=5)) == 0
    assert chosen(Worker("a", waiting=5), Worker("b", free=5)) == 1


def test_a_dead_worker_is_passed_over_until_it_answers() -> None:
    dead = Worker("a", alive=False)

    async def live() -> list[str]:
        workers = {"0": dead, "1": Worker("b")}
        first = await routing.choose(workers, "a")
        aside = list(routing._aside)
        dead.alive = True
        while routing._aside:
            await asyncio.sleep(0.02)
        return [first, *aside, await routing.choose(workers, "a")]

    assert asyncio.run(live()) == ["1", "0", "0"]


def test_what_a_dying_worker_had_in_hand_is_done_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(Worker):
        async def run(self, _: object) -> Generation:
            self.alive = False
            raise ConnectionError

    workers = {"StableDiffusion": Dying("m"), "StableDiffusion2": Worker()}
    monkeypatch.setattr(backend, "workers_of", lambda _: dict(workers))

    async def generate() -> Generation:
        try:
            return await backend.generate(plan(), None)
        finally:
            for task in routing._aside.values():
                task.cancel()
            await asyncio.sleep(0)

    assert asyncio.run(generate()).seeds == [1]
    assert workers["StableDiffusion2"].done == 1


@pytest.fixture(scope="module")
def server(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    entries = [{"id": name, "family": "sd15", "source": str(miniatures["sd15"])} for name in "abc"]
    overrides = {"models": {"catalogue": entries, "default": "a", "device": "cpu", "cpu_threads": 1}, "stable_diffusion": {"workers": 2}}
    with serving(tmp_path_factory.mktemp("workers"), overrides) as running:
        yield running


def drawn_by(server: Server, model: str, steps: int = 1) -> str:
    params = {"prompt": "x", "model_id": model, "num_inference_steps": steps, "width": 256, "height": 256, "seed": 1}
    answer = server.post("/post_config", params=params)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Easel-Worker"]


def statuses(server: Server) -> dict[str, dict]:
    return {status["service"]: status for status in server.get("/buffer_status").json()["runners"]}


def warm(server: Server, worker: str) -> set[str]:
    return {m["model_id"] for m in statuses(server)[worker]["models"] if m["state"] == "warm"}


@pytest.mark.http
def test_two_workers_share_the_work_and_one_goes_on_while_the_other_is_dead(server: Server) -> None:
    # Two models in turns: each stays at its own worker.
    first, second = [(drawn_by(server, "a"), drawn_by(server, "b")) for _ in range(2)]
    assert first == second
    assert set(first) == {"StableDiffusion", "StableDiffusion2"}
    assert [warm(server, worker) for worker in first] == [{"a"}, {"b"}]
    assert {m["model_id"]: m["state"] for m in server.get("/capabilities").json()["models"]} == {"a": "warm", "b": "warm", "c": "cold"}
    # While a's worker is busy, the other one takes a too.
    busy, other = first
    found: list[str] = []
    long = threading.Thread(target=lambda: found.append(drawn_by(server, "a", steps=150)))
    long.start()
    wait_for(lambda: statuses(server)[busy]["queue"]["running"] == 1, 60)
    assert drawn_by(server, "a") == other
    # Killed at its work: the other one does that as well, and what comes next.
    for process in psutil.Process(server.process.pid).children(recursive=True):
        command = process.cmdline()
        if "--service-name" in command and command[command.index("--service-name") + 1] == busy:
            process.kill()
    assert drawn_by(server, "b") == other
    long.join(120)
    assert found == [other]
    # Back again, it takes its part; and unloading reaches both.
    wait_for(lambda: "queue" in statuses(server)[busy], 90, server)
    wait_for(lambda: unload(server) >= 0 and drawn_by(server, "c") == busy, 60)
    assert drawn_by(server, "a") == other
    assert unload(server) == 2
    assert [warm(server, worker) for worker in first] == [set(), set()]


def unload(server: Server) -> int:
    answer = requests.post(server.url + "/admin/unload", headers={"X-API-Key": "admin-key"}, timeout=30)
    return answer.json()["unloaded"]
