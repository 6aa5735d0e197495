"""The command line against a real server: what it draws, saves, prints, and says when something is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner, Result
from PIL import Image

from cli import bench, saving
from cli.main import main
from core.settings import ROOT
from tests.conftest import ADMIN, USER, Server, free_port, wait_for
from tests.test_http import jpeg

pytestmark = [pytest.mark.http, pytest.mark.timeout(600)]
FAST = ["--steps", "4", "--seed", "7"]


def easel(server: Server, *words: object, key: str = USER, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(word) for word in words], env={"EASEL_URL": server.url, "EASEL_API_KEY": key}, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_pictures_are_saved_as_the_server_sent_them_and_never_written_over(server: Server, tmp_path: Path) -> None:
    first = easel(server, "generate", "Red Apple!", "-n", 2, *FAST, "-o", tmp_path / "out").stdout.split()
    assert [Path(path).name for path in first] == ["red-apple-7.png", "red-apple-8.png"]
    again = easel(server, "generate", "Red Apple!", *FAST, "-o", tmp_path / "out").stdout.split()
    assert Path(again[0]).name == "red-apple-7-2.png"
    picture = Image.open(first[1])
    assert picture.size == (64, 64)
    assert "Seed: 8" in picture.info["parameters"]
    assert json.loads(picture.info["easel"])["prompt"] == "Red Apple!"
    made = json.loads(easel(server, "generate", "star", *FAST, "-p", "clip_skip=0", "-o", tmp_path / "star.webp", "--json").stdout)
    assert (made["status"], made["outputs"][0]["seed"], made["files"]) == ("succeeded", 7, [str(tmp_path / "star.webp")])
    assert Image.open(tmp_path / "star.webp").format == "WEBP"


def test_pictures_go_in_and_captions_come_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(jpeg((64, 64)))
    (tmp_path / "control.jpg").write_bytes(jpeg((64, 64)))
    easel(server, "generate", "cat", *FAST, "--image", tmp_path / "in.jpg", "--strength", 0.5, "-o", tmp_path / "cat.png")
    assert "Denoising strength: 0.5" in Image.open(tmp_path / "cat.png").info["parameters"]
    refused = easel(server, "generate", "cat", "--file", f"control_image={tmp_path}/control.jpg", "-p", "controlnet=none-such", "-o", tmp_path, code=1)
    assert "controlnet" in refused.stderr
    said = json.loads(easel(server, "caption", tmp_path / "in.jpg", tmp_path / "cat.png", "-n", 2, "--json").stdout)
    assert [(Path(one["file"]).name, len(one["captions"])) for one in said] == [("in.jpg", 2), ("cat.png", 2)]
    assert len(easel(server, "caption", tmp_path / "in.jpg").stdout.splitlines()) == 1


def test_what_is_refused_is_one_line_that_says_what_is_allowed(server: Server, tmp_path: Path) -> None:
    refused = easel(server, "generate", "x", "--steps", 1000, "-o", tmp_path, code=1)
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1)
    assert refused.stderr == "easel: num_inference_steps: is too large. num_inference_steps allows: 1 to 150.\n"
    assert "key" in easel(server, "status", key="wrong", code=1).stderr
    assert "There is no job" in easel(server, "jobs", "show", "job_0", code=1).stderr
    assert "admin" in easel(server, "loras", "remove", "x", code=1).stderr
    assert easel(server, "generate", "x", "-p", "steps", code=2).stderr.rstrip().endswith("'steps' is not NAME=VALUE")
    gone = CliRunner().invoke(main, ["--url", f"http://127.0.0.1:{free_port()}", "status"])
    assert (gone.exit_code, gone.stderr.count("\n")) == (1, 1)
    assert "does not answer" in gone.stderr


def test_jobs_are_listed_shown_cancelled_and_fetched(server: Server, tmp_path: Path) -> None:
    job = server.post("/jobs", params={"prompt": "star", "num_inference_steps": 4, "count_returned": 2}).json()["id"]
    paths = easel(server, "jobs", "result", job, "-o", tmp_path).stdout.split()
    assert [Path(path).name for path in paths] == [f"{job}-0.png", f"{job}-1.png"]
    assert all(Image.open(path).size == (64, 64) for path in paths)
    assert job in easel(server, "jobs", "list", "--status", "succeeded").stdout
    assert json.loads(easel(server, "jobs", "show", job, "--json").stdout)["id"] == job
    slow = server.post("/jobs", params={"prompt": "star", "num_inference_steps": 150, "count_returned": 8}).json()["id"]
    assert json.loads(easel(server, "jobs", "cancel", slow, "--json").stdout)["status"] in ("canceling", "canceled")
    assert f"{slow} canceled" in easel(server, "jobs", "result", slow, "-o", tmp_path, code=1).stderr


def test_loras_are_added_listed_and_removed(server: Server) -> None:
    file = next((ROOT / "starter/loras").glob("*.safetensors"))
    added = easel(server, "loras", "add", file, "--name", "from_cli", "--base-model", "starter/stable-diffusion", "--trigger-word", "pixel art", "--trigger-word", "8-bit", key=ADMIN)
    assert "from_cli" in added.stdout
    assert json.loads(easel(server, "loras", "list", "--json").stdout)["loras"]["from_cli"]["trigger words"] == ["pixel art", "8-bit"]
    assert "pixel art, 8-bit" in easel(server, "loras", "list").stdout
    assert "from_cli is removed" in easel(server, "loras", "remove", "from_cli", key=ADMIN).stdout
    assert "from_cli" not in easel(server, "loras", "list").stdout


def test_status_tells_of_every_runner(server: Server) -> None:
    shown = easel(server, "status").stdout
    assert "StableDiffusion: ready, cpu" in shown
    assert "UniDiffuser: ready, cpu" in shown
    assert [runner["service"] for runner in json.loads(easel(server, "status", "--json").stdout)["runners"]] == ["StableDiffusion", "UniDiffuser"]


def test_bench_measures(server: Server) -> None:
    measured = json.loads(easel(server, "bench", "-n", 4, "-c", 2, "--steps", 2, "-p", "count_returned=2", "--json").stdout)
    assert (measured["pictures"], measured["refused"]) == (8, {})
    assert 0 < measured["p50_s"] <= measured["p95_s"] <= measured["seconds"]
    assert measured["pictures_per_s"] == pytest.approx(8 / measured["seconds"], rel=0.01)
    assert "num_inference_steps" in easel(server, "bench", "-n", 1, "--steps", 0, code=1).stderr


def read_out(screen: int) -> None:
    with contextlib.suppress(OSError):  # of a terminal that nobody has open any more
        while os.read(screen, 4096):
            pass


def test_progress_is_shown_on_a_terminal_and_an_interrupt_cancels_the_work(server: Server, tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    environment = {**os.environ, "EASEL_URL": server.url, "EASEL_API_KEY": USER, "TERM": "xterm"}
    command = [sys.executable, "-m", "cli", "generate", "interrupted", "--steps", "150", "-n", "8", "-o", str(tmp_path)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell has its background jobs ignore
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True, preexec_fn=heed)
    os.close(terminal)
    seen = ""
    while "/150" not in seen and "/1200" not in seen:
        seen += os.read(screen, 4096).decode(errors="replace")
    assert "running" in seen
    job = requests.get(server.url + "/jobs?status=running", headers={"X-API-Key": USER}, timeout=10).json()["jobs"][0]
    process.send_signal(signal.SIGINT)
    reading = threading.Thread(target=read_out, args=(screen,))  # a full terminal would hold it up
    reading.start()
    out, _ = process.communicate(timeout=60)
    reading.join(10)
    os.close(screen)
    assert (process.returncode, out, list(tmp_path.iterdir())) == (130, "", [])
    wait_for(lambda: server.get(job["urls"]["self"]).json()["status"] == "canceled", 60, server)


def test_names_of_files_are_plain_and_percentiles_are_those_of_the_latencies(tmp_path: Path) -> None:
    assert [saving.slug(text) for text in ("Ein Café, nachts", "../../etc/passwd", "!!!", "x" * 100)] == ["ein-café-nachts", "etc-passwd", "picture", "x" * 40]
    assert [saving.save(tmp_path, "a", ".png", b"x").name for _ in range(3)] == ["a.png", "a-2.png", "a-3.png"]
    latencies = [float(n) for n in range(1, 101)]
    assert [bench._percentile(latencies, part) for part in (0.5, 0.95)] == [50, 95]
    assert [bench._percentile([3.0], part) for part in (0.5, 0.95)] == [3, 3]
