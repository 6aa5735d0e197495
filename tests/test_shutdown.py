"""Stopping and failing: a picture in the making is delivered, and a dead runner is a clear 503."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests

from core import keys
from core.settings import Secrets
from tests.conftest import Server, serving, unidiffuser, wait_for
from tests.test_http import FAST, jpeg, picture, problem

pytestmark = pytest.mark.http
SLOW = {"prompt": "x", "num_inference_steps": 100, "count_returned": 2}
ONE_MODEL = {"server": {"grace_s": 110}, "models": {"catalogue": [{"id": "starter/stable-diffusion", "family": "starter"}], "warm_up": ["starter/stable-diffusion"], "cpu_threads": 1}}


def runner_of(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(c for c in children if "StableDiffusion" in c.cmdline())


def in_background(server: Server) -> tuple[threading.Thread, list[requests.Response]]:
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/post_config", params=SLOW)))
    thread.start()
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 1, 20, server)
    return thread, answers


def draining(server: Server) -> bool:
    answer = requests.get(server.url + "/readyz", timeout=5)
    return answer.status_code == 503 and answer.json()["type"].endswith("draining")


def test_sigterm_delivers_the_picture_and_refuses_more(tmp_path: Path) -> None:
    with serving(tmp_path, ONE_MODEL) as server:
        thread, answers = in_background(server)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: draining(server), 10, server)  # the entry: its runners may have the signal before
        problem(server.post("/post_config", params={"prompt": "x"}), 503)
        thread.join(110)
        assert picture(answers[0]).size == (128, 64)
        assert server.process.wait(90) == 0


def test_what_the_grace_time_is_too_short_for_is_told_and_ended(tmp_path: Path) -> None:
    answers: list[requests.Response] = []
    with serving(tmp_path, {**ONE_MODEL, "server": {"grace_s": 3}, "jobs": {"attempts": 1}}) as server:
        job = server.post("/jobs", params={"prompt": "x", "num_inference_steps": 150, "count_returned": 4}).json()["urls"]["self"]
        wait_for(lambda: server.get(job).json()["status"] == "running", 30, server)
        asked = [threading.Thread(target=lambda: answers.append(server.post("/post_config", params={**SLOW, "count_returned": 4}))) for _ in range(12)]
        for thread in asked:
            thread.start()
        wait_for(lambda: server.get("/buffer_status").json()["queue"]["waiting"] >= 4, 30, server)
        workers = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not psutil.wait_procs(workers, timeout=5)[1]
        for thread in asked:
            thread.join(10)
        assert len(answers) == 12
        for answer in answers:
            assert problem(answer, 503)["type"].endswith("draining")
        assert "Traceback" not in server.log.read_text()
    with serving(tmp_path, {**ONE_MODEL, "server": {"grace_s": 3}, "jobs": {"attempts": 1}}) as server:  # the job was given back
        wait_for(lambda: server.get(job).json()["status"] == "succeeded", 90, server)


def test_a_killed_server_leaves_no_process_behind(tmp_path: Path) -> None:
    with serving(tmp_path, ONE_MODEL) as server:
        workers = psutil.Process(server.process.pid).children(recursive=True)
        thread, answers = in_background(server)
        server.process.kill()
        thread.join(110)
        assert picture(answers[0]).size == (128, 64)
        _, alive = psutil.wait_procs(workers, timeout=90)
        for worker in alive:
            worker.kill()
        assert not alive


def test_a_killed_runner_is_a_503_and_comes_back_and_the_other_works_on(tmp_path: Path, miniatures: dict[str, Path]) -> None:
    with serving(tmp_path, {**ONE_MODEL, "unidiffuser": unidiffuser(miniatures)}) as server:
        thread, answers = in_background(server)
        killed = runner_of(server)
        killed.kill()
        started = time.monotonic()
        thread.join(90)
        assert time.monotonic() - started < 45
        assert int(answers[0].headers["retry-after"]) > 0
        problem(answers[0], 503)
        assert server.post("/img2prompt", files={"image": jpeg()}, params={"num_inference_steps": 2}).status_code == 200

        def ready_throughout() -> bool:
            assert requests.get(server.url + "/readyz", timeout=60).status_code == 200
            return all(r["ready"] for r in server.get("/buffer_status").json()["runners"])

        wait_for(ready_throughout, 90, server)
        assert picture(server.post("/post_config", params={"prompt": "x", **FAST}))
        assert runner_of(server).pid != killed.pid


def test_the_runner_alone_serves_the_same_contract(tmp_path: Path) -> None:
    with serving(tmp_path, ONE_MODEL, "service:StableDiffusion") as server:
        assert picture(server.post("/post_config", params={"prompt": "red apple", **FAST}))
        problem(requests.post(server.url + "/post_config", timeout=5), 401)
        problem(server.post("/internal/status", json={}), 404)
        assert server.get("/buffer_status").json()["service"] == "StableDiffusion"


def test_without_keys_it_does_not_start(tmp_path: Path) -> None:
    with serving(tmp_path, ONE_MODEL, env={"API_KEY": "", "ADMIN_API_KEY": ""}, ready=False) as server:
        assert server.process.wait(60) != 0
        log = server.log.read_text()
        assert "No API key is configured" in log
        assert "Traceback" not in log


def test_a_wrong_setting_is_told_in_a_few_lines(tmp_path: Path) -> None:
    with serving(tmp_path, {"queue": {"limit": "many"}}, ready=False) as server:
        assert server.process.wait(60) != 0
        log = server.log.read_text()
        assert "queue.limit" in log
        assert "Traceback" not in log


def test_auth_off_serves_loopback_but_no_page_of_another_site(tmp_path: Path) -> None:
    with serving(tmp_path, {**ONE_MODEL, "auth": {"mode": "off"}}, env={"API_KEY": "", "ADMIN_API_KEY": ""}) as server:
        assert requests.get(server.url + "/capabilities", timeout=60).ok
        foreign = requests.get(server.url + "/add_new_lora?name=x", headers={"Sec-Fetch-Site": "cross-site"}, timeout=60)
        assert foreign.status_code == 403
        assert foreign.json()["type"].endswith("cross-site")


def test_keys_are_made_once_and_only_readable_by_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(keys, "secrets", lambda: Secrets(_env_file=tmp_path / ".env"))
    made = keys.ensure(tmp_path / ".env")
    assert set(made) == {"API_KEY", "ADMIN_API_KEY"}
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    # One that was there, for all to read.
    (tmp_path / ".env").write_text("API_KEY=mine")
    (tmp_path / ".env").chmod(0o644)
    assert set(keys.ensure(tmp_path / ".env")) == {"ADMIN_API_KEY"}
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert keys.ensure(tmp_path / ".env") == {}


def entries_of(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "ImageGeneration" in c.cmdline()]


def test_an_entry_that_is_killed_under_load_comes_back_and_loses_no_job(tmp_path: Path) -> None:
    with serving(tmp_path, {**ONE_MODEL, "jobs": {"lease_s": 10}}) as server:
        seen: list[int] = []  # of each request the status; 0 where the connection broke
        over = threading.Event()

        def ask(seed: int) -> None:
            while not over.is_set():
                try:
                    seen.append(server.post("/post_config", params={"prompt": "x", **FAST, "seed": seed}).status_code)
                except requests.ConnectionError:
                    seen.append(0)
                over.wait(0.2)

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for client in clients:
            client.start()
        jobs = [server.post("/jobs", params={"prompt": "x", "num_inference_steps": 30, "seed": seed}).json()["id"] for seed in range(5)]
        wait_for(lambda: seen.count(200) >= 3, 60, server)
        (killed,) = entries_of(server)
        killed.kill()
        before = len(seen)
        wait_for(lambda: [p for p in entries_of(server) if p != killed] != [] and server.is_ready(), 60, server)
        wait_for(lambda: {server.get(f"/jobs/{job}").json()["status"] for job in jobs} == {"succeeded"}, 60, server)
        wait_for(lambda: 200 in seen[before + 3 :], 60, server)
        over.set()
        for client in clients:
            client.join(120)
        assert set(seen) <= {200, 503, 0}
        wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 0, 20, server)
