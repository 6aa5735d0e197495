"""What Easel does when its surroundings fail: a hang, disks that are full or read-only, clocks that jump. docs/reliability.md
lists the faults that other files' tests show."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr

from api import backend
from api.job_work import Work
from api.webhooks import Webhooks
from core.catalogue import Catalogue
from core.draining import Draining
from core.generation import Generation
from core.job_store import Store
from core.model_settings import Queue
from core.plans import Pixels, Plan
from core.requests import GenerationRequest
from core.settings import ROOT, Jobs, Settings, WebhookSettings
from core.status import PlanProgress
from runners.queue import DeviceQueue
from runners.work import Job as DeviceJob
from tests.civitai import FakeCivitai
from tests.conftest import Server, serving, wait_for
from tests.test_http import FAST, picture, problem
from tests.test_lora_downloads import installer, refused
from tests.test_shutdown import ONE_MODEL, runner_of

http = pytest.mark.http


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    overrides = {**ONE_MODEL, "queue": {"hang_timeout_s": 12}}
    with serving(tmp_path_factory.mktemp("faults"), overrides, "tests.hanging:ImageGeneration") as running:
        yield running


# A hang.


@http
def test_a_hang_is_told_and_the_runner_is_started_anew(server: Server) -> None:
    hung, began = runner_of(server), time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(server.post, "/post_config", params={"prompt": "hang"})
        wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 1, 20, server)
        behind = pool.submit(server.post, "/post_config", params={"prompt": "x"})
        body = problem(hanging.result(), 500)
        assert (body["type"], "12 s (queue.hang_timeout_s)" in body["detail"]) == ("urn:easel:problem:hung", True)
        assert problem(behind.result(), 503)["type"].endswith("runner-gone")
    assert time.monotonic() - began < 60
    hung.wait(20)
    wait_for(lambda: all(r["ready"] for r in server.get("/buffer_status").json()["runners"]), 120, server)
    assert runner_of(server).pid != hung.pid
    assert picture(server.post("/post_config", params={"prompt": "x", **FAST}))
    assert "in hanging" in server.log.read_text() or "<lambda>" in server.log.read_text()  # the stack tells where it hung


HUNG = """
import asyncio, ctypes, sys, time
from runners import watchdog
from runners.queue import DeviceQueue
from runners.work import Job
queue = DeviceQueue(lambda: None, 4, 4)
queue.submit(Job("hangs", "k", lambda _: {how}, 60)).add_done_callback(lambda f: print(f.exception().details.type, flush=True))
queue.submit(Job("waits", "k", lambda _: None, 60)).add_done_callback(lambda f: print(f.exception().details.type, flush=True))
asyncio.run(watchdog.watch(queue, 0.5))
"""


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [("time.sleep(60)", 70, ["urn:easel:problem:hung", "urn:easel:problem:runner-gone"]), ("(time.sleep(0.2), ctypes.PyDLL(None).sleep(60))", 1, [])],
    ids=["a thread", "the interpreter"],
)
def test_a_process_that_hangs_ends_even_where_nothing_else_in_it_can_run(how: str, status: int, told: list[str]) -> None:
    """`PyDLL` keeps the interpreter's lock, as an extension that hangs may."""
    done = subprocess.run([sys.executable, "-c", HUNG.format(how=how)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (status, told)
    assert "<lambda>" in done.stderr


def test_work_that_comes_to_steps_does_not_stall_nor_does_what_waits() -> None:
    queue, go = DeviceQueue(lambda: None, 4, 4), threading.Event()
    assert queue.stalled_s == 0
    job = DeviceJob("steps", "k", lambda job: go.wait(60), 60, submitted=time.monotonic() - 30)
    future = queue.submit(job)
    while not job.started:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 0.1 <= queue.stalled_s < 5  # counted from its start, not from its coming
    job.check()
    assert queue.stalled_s < 1
    go.set()
    future.result(60)
    queue.close()


# Disks.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_takes_no_lora_and_keeps_nothing_of_it(disk: Path) -> None:
    with FakeCivitai() as fake:
        fake.add(1, "Ghibli")
        made = installer(fake, disk)
        assert "has room for 262144" in refused(made, 507, "disk-full")  # before it begins
        fake.faults.file = "chunked"  # where the host does not say how much comes
        assert "no room" in refused(made, 507, "disk-full")


def test_a_folder_that_is_read_only_is_told(disk: Path) -> None:
    with FakeCivitai() as fake:
        fake.add(1, "Ghibli")
        made = installer(fake, disk)
        made.registry.folder.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "cannot be written in" in refused(made, 503, "cannot-write")


class Painter:
    """A runner that draws one large picture, of noise, which no store can make smaller."""

    async def run(self, _: Plan) -> Generation:
        return Generation(pictures=[Pixels(width=400, height=300, data=os.urandom(360_000))], seeds=[1])

    async def status(self) -> None:
        pass

    async def progress(self, *_: object) -> PlanProgress:
        return PlanProgress()


def test_a_result_that_the_disk_has_no_room_for_is_kept_until_it_has(disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "workers", lambda: {"StableDiffusion": Painter()})
    store = Store(Jobs(store=f"sqlite:///{disk}/jobs.sqlite3"))
    plan = Catalogue(Settings()).plan(GenerationRequest(prompt="x"), None, "me")
    job = store.add("generate", "StableDiffusion", plan, '{"prompt": "x"}', "*/*", Queue())
    assert job is not None

    async def work() -> str:
        working = Work(store, Draining(1, 0), Webhooks(WebhookSettings(), SecretStr("")))
        async with asyncio.timeout(30):
            while "does not take a change" not in caplog.text:
                await asyncio.sleep(0.05)
            assert store.find(job.id).status in ("queued", "running")
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
            while not (found := store.find(job.id)).over:
                await asyncio.sleep(0.05)
        await working.close()
        return found.status

    assert asyncio.run(work()) == "succeeded"
    assert len(Store(store.settings).result(job.id)[2].pictures[0].data) == 360_000


def test_a_job_whose_end_could_not_be_put_down_is_claimed_again(tmp_path: Path) -> None:
    store = Store(Jobs(store=f"sqlite:///{tmp_path}/jobs.sqlite3", lease_s=0.05))
    plan = Catalogue(Settings()).plan(GenerationRequest(prompt="x"), None, "me")
    ids = [store.add("generate", "StableDiffusion", plan, "{}", "*/*", Queue()).id for _ in range(2)]
    assert [job.id for job in store.claim(["StableDiffusion"], 2)] == ids
    time.sleep(0.06)
    store.beat(ids[:1])  # the process lives, and works on the first alone
    store.sweep()
    assert [store.mine(id) is not None for id in ids] == [True, False]
    assert [job.id for job in store.claim(["StableDiffusion"], 2)] == ids[1:]
    store.close()


# Clocks.


@pytest.mark.parametrize("jump_s", [86400.0, -86400.0], ids=["forward", "back"])
def test_a_clock_that_jumps_ends_no_work_and_takes_no_job_away(jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, go, store = DeviceQueue(lambda: None, 4, 4), threading.Event(), Store(Jobs(store=f"sqlite:///{tmp_path}/jobs.sqlite3"))

    def work(job: DeviceJob[str]) -> str:
        assert go.wait(60)
        job.check()
        return "drawn"

    plan = Catalogue(Settings()).plan(GenerationRequest(prompt="x"), None, "me")
    taken, waiting = (store.add("generate", "StableDiffusion", plan, "{}", "*/*", Queue()) for _ in range(2))
    assert [job.id for job in store.claim(["StableDiffusion"], 1)] == [taken.id]
    future = queue.submit(DeviceJob("work", "k", work, deadline_s=60))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert queue.stalled_s < 60
    go.set()
    assert future.result(60) == "drawn"
    store.beat([taken.id])  # as api.job_work does before each sweep
    assert store.sweep() == []
    assert store.mine(taken.id) is not None
    assert [job.id for job in store.claim(["StableDiffusion"], 2)] == [waiting.id]
    assert store.finish(taken.id, "succeeded", Generation(seeds=[1])) is not None
    queue.close()
    store.close()
