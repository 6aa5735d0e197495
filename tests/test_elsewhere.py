"""Entry and runner served by themselves, as on Kubernetes: what the entry calls, what it shows, and who else may."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests

from core.settings import ROOT
from tests.conftest import ADMIN, USER, Server, free_port, serving, wait_for
from tests.test_http import jpeg, picture, problem

KEY = "runner-key"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """An entry alone, and a Stable Diffusion runner alone. The entry knows of a second worker and a UniDiffuser, which are not there."""
    with ExitStack() as stack:
        runner = stack.enter_context(serving(tmp_path_factory.mktemp("runner"), {}, "service:StableDiffusion", env={"RUNNER_KEY": KEY}, ready=False))
        nowhere = [f"http://127.0.0.1:{free_port()}"]
        overrides = {"stable_diffusion": {"urls": [runner.url, *nowhere]}, "unidiffuser": {"urls": nowhere}}
        entry = stack.enter_context(serving(tmp_path_factory.mktemp("entry"), overrides, env={"RUNNER_KEY": KEY}))
        yield entry, runner


def drawn(server: Server, **more: object) -> requests.Response:
    return server.post("/post_config", params={"prompt": "red apple", "num_inference_steps": 4, "seed": 3, **more.pop("params", {})}, **more)


@pytest.mark.http
def test_a_picture_comes_through_both(servers: tuple[Server, Server]) -> None:
    entry, runner = servers
    through = drawn(entry)
    assert picture(through).size == (64, 64)
    assert picture(through).tobytes() == picture(drawn(runner)).tobytes()
    # A picture that was sent, four that come back, and one that is wrong.
    assert picture(drawn(entry, files={"image": jpeg()})).size == picture(drawn(runner, files={"image": jpeg()})).size
    assert picture(drawn(entry, params={"count_returned": 4})).size == (128, 128)
    problem(drawn(entry, params={"lora": "no-such"}), 422)
    # The entry runs no model itself.
    running = [" ".join(p.cmdline()) for p in psutil.Process(entry.process.pid).children(recursive=True)]
    assert [line.partition("--service-name ")[2].split()[0] for line in running if "--service-name" in line] == ["ImageGeneration"]


@pytest.mark.http
def test_workers_that_are_not_there_are_passed_over(servers: tuple[Server, Server]) -> None:
    entry, _ = servers
    states = requests.get(entry.url + "/readyz", timeout=20).json()["runners"]
    assert states == {"StableDiffusion": "ready", "StableDiffusion2": "down", "UniDiffuser": "down"}
    up = [line for line in entry.get("/metrics").text.splitlines() if line.startswith("easel_runner_up")]
    assert up == ['easel_runner_up{runner="StableDiffusion"} 1.0', 'easel_runner_up{runner="UniDiffuser"} 0.0']
    body = problem(entry.post("/img2prompt", files={"image": jpeg()}), 503)
    assert body["type"].endswith(":runner-gone")


@pytest.mark.http
def test_who_leaves_the_entry_frees_the_runner(servers: tuple[Server, Server]) -> None:
    entry, runner = servers

    def running() -> int:
        return int(runner.get("/buffer_status").json()["queue"]["running"])

    def leave() -> None:
        with pytest.raises(requests.ReadTimeout):
            drawn(entry, params={"num_inference_steps": 150}, timeout=5)

    with ThreadPoolExecutor() as pool:
        left = pool.submit(leave)
        wait_for(lambda: running() == 1, 5)
        left.result()
    wait_for(lambda: running() == 0, 20)


class Exploit:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.http
def test_only_the_entrys_key_opens_what_it_calls_and_no_pickle_does(servers: tuple[Server, Server], tmp_path: Path) -> None:
    entry, runner = servers

    def call(server: Server, key: str, media_type: str = "application/json", body: bytes = b"{}") -> requests.Response:
        return requests.post(server.url + "/internal/status", data=body, headers={"Authorization": f"Bearer {key}", "Content-Type": media_type}, timeout=20)

    assert call(runner, KEY).json()["service"] == "StableDiffusion"
    for key in (USER, ADMIN):
        problem(call(runner, key), 404)
    problem(call(runner, "wrong"), 401)
    run = tmp_path / "run"
    for media_type in ("application/vnd.bentoml+pickle", "Application/VND.bentoml+pickle; x=1", "application/octet-stream", "multipart/form-data; boundary=b", ""):
        problem(call(runner, KEY, media_type, pickle.dumps(Exploit(str(run)))), 415)
    assert not run.exists()
    problem(requests.get(runner.url + "/buffer_status", headers={"X-API-Key": KEY}, timeout=20), 401)
    assert KEY not in runner.log.read_text() + entry.log.read_text()


def test_an_entry_without_its_key_does_not_start(tmp_path: Path) -> None:
    env = {"API_KEY": "k", "PATH": "/usr/bin:/bin", "EASEL_UNIDIFFUSER__URLS": '["http://elsewhere:3000"]'}
    done = subprocess.run([sys.executable, "-c", "import service"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RUNNER_KEY" in done.stderr
