"""Miniature models, a starter pipeline and a real server, each made once for the whole run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, threads that wait for each other at full speed slow all down
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import requests
import yaml

from core.settings import ROOT
from runners.work import Job

if TYPE_CHECKING:
    from runners.device import Device

USER, ADMIN = "your-api-key", "admin-key"
PATIENCE = 3
SEED_MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "black-forest-labs/FLUX.1-dev": "flux",
}


@dataclass
class Server:
    """A `bentoml serve` process on a loopback port."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, key: str = USER, **kwargs: object) -> requests.Response:
        headers = {"X-API-Key": key, **kwargs.pop("headers", {})}
        return requests.post(self.url + path, headers=headers, timeout=kwargs.pop("timeout", 120), **kwargs)

    def get(self, path: str, key: str = USER, **kwargs: object) -> requests.Response:
        return requests.get(self.url + path, headers={"X-API-Key": key}, timeout=kwargs.pop("timeout", 60), **kwargs)

    def is_ready(self) -> bool:
        try:
            return requests.get(self.url + "/readyz", timeout=5).status_code == 200
        except requests.RequestException:
            return False


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's miniature on disk."""
    from tests import miniatures

    return miniatures.save_all(tmp_path_factory.mktemp("miniatures"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, overrides: dict, target: str = "service:ImageGeneration", env: dict[str, str] | None = None, ready: bool = True) -> Iterator[Server]:
    """Serve with configuration.yaml changed by `overrides` (section by section)."""
    configuration = yaml.safe_load((ROOT / "configuration.yaml").read_text())
    for section, values in overrides.items():
        configuration[section] |= values
    port = free_port()
    configuration["server"] |= {"port": port}
    path = folder / "configuration.yaml"
    path.write_text(yaml.safe_dump(configuration))
    environment = {**os.environ, "API_KEY": USER, "ADMIN_API_KEY": ADMIN, "EASEL_CONFIGURATION": str(path), "HF_HUB_OFFLINE": "1", **(env or {})}
    log = folder / "server.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "bentoml", "serve", target, "--timeout-graceful-shutdown", "10"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        if ready:
            wait_for(server.is_ready, 240, server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float, server: Server | None = None) -> None:
    """Until the condition holds: `seconds` on a machine of one's own, and more on a busy one."""
    end = time.monotonic() + PATIENCE * seconds
    while time.monotonic() < end:
        if condition():
            return
        if server is not None and server.process.poll() is not None:
            break
        time.sleep(0.1)
    log = server.log.read_text(errors="replace")[-3000:] if server else ""
    raise AssertionError(f"not within {PATIENCE * seconds} s\n{log}")


def held(device: Device) -> threading.Event:
    """Keep the device busy until the event is set."""
    started, go = threading.Event(), threading.Event()

    def wait(_: Job[None]) -> None:
        started.set()
        go.wait(30)

    device.queue.submit(Job("held", "held", wait, 60))
    assert started.wait(10)
    return go


def catalogue(miniatures: dict[str, Path]) -> list[dict]:
    """The starter, and the seed's model ids mapped to miniatures."""
    entries: list[dict] = [{"id": "starter/stable-diffusion", "family": "starter", "licence": "Apache-2.0", "commercial_use": True}]
    entries += [{"id": id, "family": family, "source": str(miniatures[family])} for id, family in SEED_MODELS.items()]
    entries.append({"id": "starter/upscaler", "family": "upscaler", "licence": "Apache-2.0", "commercial_use": True})
    entries.append({"id": "mini/x4", "family": "sd_x4_upscaler", "source": str(miniatures["sd_x4_upscaler"]), "size": 32})
    entries.append({"id": "missing/model", "family": "sd15", "source": "/nowhere/at/all"})
    entries.append({"id": "unreachable/model", "family": "sd15"})
    return entries


def unidiffuser(miniatures: dict[str, Path], **more: object) -> dict:
    """The UniDiffuser runner's settings, with a miniature as its default."""
    entries = [
        {"id": "mini/unidiffuser", "family": "unidiffuser", "source": str(miniatures["unidiffuser"]), "size": 64, "licence": "Apache-2.0"},
        {"id": "mini/of-another-size", "family": "unidiffuser", "source": str(miniatures["unidiffuser"]), "size": 512},
    ]
    return {"default": "mini/unidiffuser", "catalogue": entries, "cpu_threads": 1, **more}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, miniatures: dict[str, Path]) -> Iterator[Server]:
    """The entry service with its runners, for all tests that do not need a server of their own."""
    overrides = {
        "models": {"catalogue": catalogue(miniatures)},
        "unidiffuser": unidiffuser(miniatures),
        "animation": {"motion_adapters": [{"id": "mini/motion", "source": str(miniatures["motion"])}]},
    }
    with serving(tmp_path_factory.mktemp("server"), overrides) as running:
        yield running
