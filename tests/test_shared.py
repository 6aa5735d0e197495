"""Two entries that share a real PostgreSQL: jobs of one read at the other and finished by it, whoever dies; one usage log, one count of quotas."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import requests
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from core.job_store import Store
from core.settings import Jobs
from core.usage import SCHEMA, Ledger, Line
from core.versions import LaterVersion
from tests.conftest import ADMIN, USER, Server, free_port, serving, wait_for
from tests.test_jobs import DRAW, SETTINGS, add, over, picture, running, submit
from tests.test_quotas import hashed
from tests.test_usage import drawn
from tests.test_usage import plan as asked


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


def test_what_is_written_at_one_is_reported_at_the_other_and_cannot_be_changed(postgres: str, caplog: pytest.LogCaptureFixture) -> None:
    ledgers = [Ledger(postgres) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:  # they make the tables at the same time
        list(pool.map(lambda ledger: [ledger.append(asked("k1"), drawn(2, ("a", "b"), steps=10)) for _ in range(4)], ledgers))
    ledgers[0].append(asked("k2", commercial=True), drawn(1))
    assert caplog.text == ""
    assert ledgers[1].report(None, None, []) == [Line({}, 13, 25, 265)]
    assert [(line.group, line.pictures) for line in ledgers[1].report(None, None, ["key", "commercial"])] == [({"key": "k1", "commercial": "false"}, 24), ({"key": "k2", "commercial": "true"}, 1)]
    assert {line.group["lora"]: line.pictures for line in ledgers[2].report(None, None, ["lora"])} == {"a": 24, "b": 24, None: 1}
    today, yesterday = datetime.now(UTC), datetime.now(UTC) - timedelta(1)
    assert {line.group["day"] for line in ledgers[0].report(yesterday, None, ["day"])} <= {str(today.date()), str(yesterday.date())}
    assert ledgers[0].report(today + timedelta(minutes=1), None, ["day"]) == []
    assert ledgers[2].pictures_since(yesterday, "k1") == 24
    with create_engine(postgres).connect() as connection:
        for statement in ("DELETE FROM usage_loras", "UPDATE usage SET pictures = 0", "TRUNCATE usage CASCADE", "UPDATE usage_loras SET lora = 'x'"):
            with pytest.raises(DBAPIError, match="append-only"):
                connection.execute(text(statement))
            connection.rollback()
    for ledger in ledgers:
        ledger.close()


def test_a_store_is_begun_by_many_at_once(postgres: str) -> None:
    for number in range(5):
        with create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text(f"CREATE DATABASE begun_{number}"))
        begun = make_url(postgres).set(database=f"begun_{number}")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda store: SCHEMA.open(store).dispose(), [begun] * 8))


def test_a_usage_log_that_is_away_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    Ledger(f"postgresql+psycopg://easel:hidden@127.0.0.1:{free_port()}/none").append(asked(), drawn())
    assert "not in the usage log postgresql+psycopg://easel:***@" in caplog.text
    assert "hidden" not in caplog.text


def test_a_later_versions_usage_log_is_refused(postgres: str) -> None:
    ledger = Ledger(postgres)
    ledger.append(asked("later"), drawn())
    with create_engine(postgres).begin() as connection:
        connection.execute(text("UPDATE usage_schema SET version = 99"))
    try:
        with pytest.raises(LaterVersion, match="is 99, and this Easel knows 2"):
            SCHEMA.check(postgres)
        with pytest.raises(LaterVersion):
            Ledger(postgres).report(None, None, [])
    finally:
        with create_engine(postgres).begin() as connection:
            connection.execute(text("UPDATE usage_schema SET version = 2"))


def test_of_requests_at_several_entries_as_many_pass_as_may(postgres: str) -> None:
    stores = [Store(Jobs(store=postgres)) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        counts = sorted(taken[1] for taken in pool.map(lambda i: stores[i % 4].take("crowd", 2), range(20)))
    assert counts == list(range(1, 21))
    for store in stores:
        store.close()


@pytest.mark.timeout(600)  # two servers start
@pytest.mark.http
def test_jobs_usage_and_quotas_are_those_of_both_entries(postgres: str, tmp_path: Path) -> None:
    """Jobs, also those of the one that is killed, finish at the other."""
    quotas = {hashed("day"): {"pictures_per_day": 3}, hashed("crowd"): {"concurrent": 1}}
    overrides = SETTINGS | {"jobs": {"store": postgres, "lease_s": 2, "at_once": 1}, "usage": {"store": postgres}, "quotas": {"keys": quotas}}
    keys = {"API_KEY": f"{USER},day,crowd"}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    service = "service:StableDiffusion"
    with serving(one, overrides, service, ready=False, env=keys) as first, serving(two, overrides, service, ready=False, env=keys) as second:
        for server in (first, second):
            wait_for(lambda server=server: answers(server), 240, server)
        check_quotas(first, second)
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


@pytest.mark.timeout(900)  # four servers start
@pytest.mark.http
def test_a_job_whose_runner_is_killed_finishes_at_another_served_apart(postgres: str, tmp_path: Path) -> None:
    """As on Kubernetes: two entries and two runners of one kind, each a server of its own; the runners know of no shared store."""
    key = {"RUNNER_KEY": "runner-key"}
    with ExitStack() as stack:

        def served(name: str, overrides: dict, target: str) -> Server:
            (tmp_path / name).mkdir()
            return stack.enter_context(serving(tmp_path / name, overrides, target, ready=False, env=key))

        runners = [served(f"runner{i}", SETTINGS | {"jobs": {"store": f"sqlite:///{tmp_path}/runner{i}/jobs.sqlite3"}}, "service:StableDiffusion") for i in (1, 2)]
        urls = {"stable_diffusion": {"urls": [runner.url for runner in runners]}, "unidiffuser": {"urls": [f"http://127.0.0.1:{free_port()}"]}}
        overrides = urls | {"jobs": {"store": postgres, "lease_s": 3}, "usage": {"store": postgres}}
        first, second = (served(f"entry{i}", overrides, "service:ImageGeneration") for i in (1, 2))
        for server in (*runners, first, second):
            wait_for(lambda server=server: answers(server), 240, server)

        job = submit(first, num_inference_steps=150, count_returned=4)
        wait_for(lambda: second.get(job["urls"]["self"]).json()["progress"]["value"] > 0, 60, second)  # in the middle, read at the other
        [killed] = [runner for runner in runners if runner.get("/buffer_status").json()["queue"]["running"]]
        [other] = [runner for runner in runners if runner is not killed]
        processes = [psutil.Process(killed.process.pid), *psutil.Process(killed.process.pid).children(recursive=True)]
        for process in processes:  # as a pod ends; the worker would outlive its parent until it has drawn
            process.kill()
        killed.process.wait(90)
        assert second.get(job["urls"]["self"]).json()["status"] == "running"
        wait_for(lambda: other.get("/buffer_status").json()["queue"]["running"] == 1, 60, other)
        done = over(second, job)
        assert (done["status"], [output["seed"] for output in done["outputs"]]) == ("succeeded", [DRAW["seed"] + i for i in range(4)])
        drawn_there = other.post("/post_config", params={**DRAW, "num_inference_steps": 150, "count_returned": 4})
        for entry in (first, second):
            assert picture(entry.get(job["urls"]["result"])).tobytes() == picture(drawn_there).tobytes()
            states = requests.get(entry.url + "/readyz", timeout=20).json()["runners"]
            assert sorted(states[name] for name in ("StableDiffusion", "StableDiffusion2")) == ["down", "ready"]
        assert over(first, submit(second))["status"] == "succeeded"


def check_quotas(first: Server, second: Server) -> None:
    def drawn_at(server: Server, key: str, count: int) -> requests.Response:
        return server.post("/post_config", key=key, params={**DRAW, "count_returned": count})

    assert drawn_at(first, "day", 2).status_code == 200
    refused = drawn_at(second, "day", 2)
    assert (refused.status_code, refused.json()["detail"][-38:]) == (429, "day (UTC) made; 1 are left, and 2 were asked for."[-38:])
    assert drawn_at(second, "day", 1).status_code == 200
    assert drawn_at(first, "day", 1).status_code == 429
    by_key = {line["key"]: line["pictures"] for line in first.get("/admin/usage?group_by=key", key=ADMIN).json()["usage"]}
    assert by_key == {line["key"]: line["pictures"] for line in second.get("/admin/usage?group_by=key", key=ADMIN).json()["usage"]}
    assert by_key[hashed("day")] == 3
    slow = threading.Thread(target=first.post, args=("/post_config", "crowd"), kwargs={"params": {"prompt": "star", "num_inference_steps": 100}})
    slow.start()
    wait_for(lambda: first.get("/buffer_status", key=ADMIN).json()["queue"]["running"] == 1, 30)
    assert drawn_at(second, "crowd", 1).json()["type"] == "urn:easel:problem:concurrency-limit"
    slow.join()
    assert drawn_at(second, "crowd", 1).status_code == 200


def answers(server: Server) -> bool:
    try:
        return requests.get(server.url + "/readyz", timeout=5).ok
    except requests.RequestException:
        return False
