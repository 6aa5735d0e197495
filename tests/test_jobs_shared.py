"""Two entries that share their jobs in a real PostgreSQL: submit at one, read at the other, and what one that dies leaves."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from core.job_store import Store
from core.settings import Jobs
from tests.conftest import Server, free_port, serving, wait_for
from tests.test_jobs import DRAW, SETTINGS, add, over, picture, running, submit


def _program(name: str) -> str | None:
    """PostgreSQL's programs, which Debian keeps beside the path."""
    return shutil.which(name) or next((str(p) for p in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database of its own."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("needs PostgreSQL: make system")
    pytest.importorskip("psycopg")
    folder, port = Path("/tmp") / f"easel-pg-{free_port()}", free_port()
    folder.mkdir(mode=0o700)
    root = os.getuid() == 0  # PostgreSQL does not run as root
    user = "postgres" if root else getpass.getuser()
    if root:
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        prefix = ["runuser", "-u", user, "--"] if root else []
        subprocess.run([*prefix, *command], check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=90)

    try:
        run(initdb, "-D", f"{folder}/data", "-A", "trust", "-U", "easel", "--no-sync")
        run(pg_ctl, "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -h 127.0.0.1 -k {folder} -F", "start")
        try:
            yield f"postgresql+psycopg://easel@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_two_processes_claim_no_job_twice(postgres: str) -> None:
    stores = [Store(Jobs(store=postgres)) for _ in range(2)]
    added = {add(stores[0], f"k{i % 3}").id for i in range(12)}
    claimed = [job.id for _ in range(3) for store in stores for job in store.claim(["StableDiffusion"], 2)]
    assert len(claimed) == 12
    assert set(claimed) == added
    for store in stores:
        for job in claimed:
            store.release(job)
    for job in claimed:
        ended = stores[1].cancel(job)
        assert ended is not None
        assert ended.status == "canceled"
    for store in stores:
        store.close()


@pytest.mark.timeout(600)  # two servers start
@pytest.mark.http
def test_a_job_of_an_entry_that_is_killed_finishes_at_the_other(postgres: str, tmp_path: Path) -> None:
    overrides = SETTINGS | {"jobs": {"store": postgres, "lease_s": 2, "at_once": 1}}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    service = "service:StableDiffusion"
    with serving(one, overrides, service, ready=False) as first, serving(two, overrides, service, ready=False) as second:
        for server in (first, second):
            wait_for(lambda server=server: answers(server), 240, server)
        busy, waiting = submit(first, num_inference_steps=150, count_returned=4), submit(first)
        running(first, busy)
        # Read at the other, and done by the other: it is idle.
        assert over(second, waiting)["status"] == "succeeded"
        assert picture(first.get(waiting["urls"]["result"])).size == (64, 64)
        assert second.get(busy["urls"]["self"]).json()["status"] == "running"
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait(90)
        done = over(second, busy)
        assert (done["status"], len(done["outputs"])) == ("succeeded", 4)
        assert second.get("/jobs?status=queued").json()["jobs"] == []
        assert second.get(done["outputs"][3]["url"]).headers["x-easel-seeds"] == str(DRAW["seed"] + 3)


def answers(server: Server) -> bool:
    try:
        return requests.get(server.url + "/readyz", timeout=5).ok
    except requests.RequestException:
        return False
