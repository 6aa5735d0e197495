"""What real servers log: one line for each request with its id, in the entry and in the runner, and no prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import USER, Server, serving, wait_for
from tests.test_http import jpeg, picture, problem
from tests.test_jobs import over

pytestmark = pytest.mark.http
SECRET = "xanadu"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("logs"), {"server": {"log_format": "json"}}) as running:
        yield running


def lines(server: Server, **fields: object) -> list[dict]:
    """The log's JSON lines with these values."""
    found = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if fields.items() <= line.items()]


def test_a_requests_lines_have_its_id_in_the_entry_and_in_the_runner(server: Server) -> None:
    answer = server.post("/post_config", params={"prompt": "red apple", "num_inference_steps": 3, "count_returned": 2}, headers={"X-Request-ID": "from-the-proxy-1"})
    assert picture(answer)
    assert answer.headers["x-request-id"] == "from-the-proxy-1"
    wait_for(lambda: bool(lines(server, message="answered", request_id="from-the-proxy-1")), 20)
    (entry,) = lines(server, message="answered", request_id="from-the-proxy-1")
    assert {name: entry[name] for name in ("level", "service", "method", "route", "status", "model", "task")} == {
        "level": "INFO", "service": "ImageGeneration", "method": "POST", "route": "/post_config", "status": 200, "model": "starter/stable-diffusion", "task": "generate",
    }  # fmt: skip
    assert entry["duration_ms"] > 0
    assert re.fullmatch("[0-9a-f]{12}", entry["key"])
    (runner,) = lines(server, message="done", request_id="from-the-proxy-1")
    assert runner["service"] == "StableDiffusion"
    assert (runner["plan"], runner["pictures"]) == (entry["plan"], 2)
    assert 0 < runner["denoise_ms"] < entry["duration_ms"]
    # The device's own thread knows for whom it loaded the model.
    assert [line["service"] for line in lines(server, logger="easel.residency", request_id="from-the-proxy-1")] == ["StableDiffusion"]


def test_a_jobs_lines_have_its_id_and_its_requests_in_the_entry_and_in_the_runner(server: Server) -> None:
    job = server.post("/jobs", params={"prompt": "red apple", "num_inference_steps": 3}, headers={"X-Request-ID": "left-a-job"}).json()
    assert over(server, job)["status"] == "succeeded"
    wait_for(lambda: len(lines(server, job_id=job["id"], message="answered")) >= 2, 20)
    left, *asked = lines(server, job_id=job["id"], message="answered")
    assert (left["route"], left["request_id"]) == ("/jobs", "left-a-job")
    assert {line["route"] for line in asked} == {"/jobs/{id}"}
    (done,) = lines(server, job_id=job["id"], message="done")
    assert (done["service"], done["request_id"]) == ("StableDiffusion", "left-a-job")
    assert not [line for line in lines(server, message="answered") if line["route"] == "/post_config" and "job_id" in line]


def test_what_fails_is_told_by_its_kind(server: Server) -> None:
    answer = server.post("/post_config", params={"prompt": "x", "num_inference_steps": 150, "count_returned": 16, "deadline_s": 0.1})
    problem(answer, 504)
    id = answer.headers["x-request-id"]
    wait_for(lambda: bool(lines(server, message="failed", request_id=id) and lines(server, message="answered", request_id=id)), 20)
    assert lines(server, message="failed", request_id=id)[0]["problem"] == "deadline-passed"
    assert lines(server, message="answered", request_id=id)[0]["status"] == 504


def test_an_id_that_is_unfit_for_a_log_is_not_taken(server: Server) -> None:
    for unfit in ("a b", "x" * 65, '"},{"', ""):
        answer = requests.get(server.url + "/capabilities", headers={"X-API-Key": USER, "X-Request-ID": unfit}, timeout=20)
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_no_prompt_and_no_query_is_logged_whatever_happens(server: Server) -> None:
    prompt = f"{SECRET} " * 120  # longer than any model reads
    fast = {"num_inference_steps": 1}
    assert server.post("/post_config", params={"prompt": prompt, "negative_prompt": prompt, **fast}).ok
    assert server.post("/txt2img", json={"prompt": prompt, **fast}).ok
    assert server.post("/prompt2img", params={"prompt": prompt, **fast}).ok
    assert server.post("/text_variation", json={"prompt": prompt, **fast}).ok
    assert server.post("/v1/images/generations", json={"prompt": prompt, **fast}).ok
    assert server.post("/post_config", params={"prompt": prompt, "num_inference_steps": 4}, files={"image": jpeg()}).ok
    problem(server.post("/post_config", params={"prompt": prompt, "width": 7}), 422)
    problem(server.post("/post_config", params={"prompt": prompt, "scheduler": SECRET}), 422)
    problem(server.post("/post_config", params={"prompt": prompt, "deadline_s": 0.01}), 504)
    problem(requests.post(server.url + "/post_config", params={"prompt": prompt}, timeout=20), 401)
    problem(server.get("/llm_interface", params={"text": prompt}), 503)
    problem(server.get("/nothing", params={"prompt": prompt}), 404)
    with pytest.raises(requests.ReadTimeout):
        server.post("/post_config", params={"prompt": prompt, "num_inference_steps": 150}, timeout=0.5)
    wait_for(lambda: bool(lines(server, message="answered", status=499)), 20)
    assert len(lines(server, message="answered")) >= 13
    assert SECRET not in server.log.read_text()


def test_every_line_is_json_and_probes_have_none(server: Server) -> None:
    for path in ("/livez", "/readyz"):
        assert requests.get(server.url + path, timeout=10).ok
    text = server.log.read_text()
    ours = [line for line in text.splitlines() if " [INFO] " in line or " [WARNING] " in line]
    assert not ours
    assert {"ImageGeneration", "StableDiffusion", "UniDiffuser", "easel"} == {line["service"] for line in lines(server)}
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines(server))
    assert "/readyz" not in text
    assert "/internal/" not in text


def test_as_text_and_with_prompts_where_configured(tmp_path: Path) -> None:
    with serving(tmp_path, {"server": {"log_prompts": True}}, target="service:StableDiffusion") as alone:
        assert alone.post("/post_config", params={"prompt": f"{SECRET}\nred apple", "num_inference_steps": 1}, headers={"X-Request-ID": "r1"}).ok
        wait_for(lambda: "answered" in alone.log.read_text(), 5)
        forged = "2026-01-01T00:00:00+0000[INFO][StableDiffusion]forged"
        problem(requests.get(f"{alone.url}/%0a{forged}%1b[31m%e2%80%a8", timeout=20), 401)  # without a key
        wait_for(lambda: forged in alone.log.read_text(), 5)
        assert not [line for line in re.split("[\n\r\u2028]", alone.log.read_text()) if line.startswith(forged)]
        assert "\x1b" not in alone.log.read_text()
        told = [line for line in alone.log.read_text().splitlines() if "request_id=r1" in line]
        assert len([line for line in told if "[INFO] [StableDiffusion] done (" in line]) == 1
        (line,) = [line for line in told if "[INFO] [StableDiffusion] answered (" in line]
        assert "route=/post_config status=200" in line
        assert f'prompt="{SECRET}\\nred apple"' in line
