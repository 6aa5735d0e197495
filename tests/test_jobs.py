"""Jobs: generations that nobody waits for, over HTTP with a real server, and what the store promises."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image, ImageChops

from core import job_store
from core.catalogue import Catalogue
from core.generation import Generation
from core.job_store import Store
from core.jobs import Job
from core.model_settings import Queue
from core.plans import Pixels
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import ROOT, Jobs, Settings
from core.versions import LaterVersion
from tests.conftest import ADMIN, USER, Server, serving, unidiffuser, wait_for
from tests.test_http import jpeg, problem
from tests.test_shutdown import runner_of

OTHER = "another-key"
DRAW = {"prompt": "red apple", "num_inference_steps": 4, "seed": 7}
SLOW = {"prompt": "star", "num_inference_steps": 150, "count_returned": 4}
SETTINGS: dict = {"models": {"catalogue": [{"id": "starter/stable-diffusion", "family": "starter"}], "warm_up": ["starter/stable-diffusion"], "cpu_threads": 1}, "jobs": {"lease_s": 3}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("jobs"), SETTINGS, "service:StableDiffusion", env={"API_KEY": f"{USER},{OTHER}"}) as running:
        yield running


def submit(server: Server, key: str = USER, **more: object) -> dict:
    answer = server.post("/jobs", key=key, params={**DRAW, **more})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["urls"]["self"]
    return answer.json()


def over(server: Server, job: dict, key: str = USER) -> dict:
    """The job, once it is over."""
    found: list[dict] = []

    def ended() -> bool:
        found[:] = [server.get(job["urls"]["self"], key=key).json()]
        return found[0]["status"] in ("succeeded", "failed", "canceled")

    wait_for(ended, 200, server)
    return found[0]


def running(server: Server, job: dict) -> None:
    wait_for(lambda: server.get(job["urls"]["self"]).json()["status"] == "running", 60, server)


def picture(answer: requests.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


@pytest.mark.http
def test_a_job_gives_what_its_route_would_have_answered(server: Server) -> None:
    job = submit(server, count_returned=2)
    assert re.fullmatch(r"job_[0-9A-HJKMNP-TV-Z]{26}", job["id"])
    assert (job["task"], job["status"], job["outputs"], job["error"]) == ("generate", "queued", [], None)
    assert job["queue_position"] >= 1
    done = over(server, job)
    assert (done["status"], done["progress"]["value"], done["queue_position"]) == ("succeeded", 1, None)
    assert done["created_at"] <= done["started_at"] <= done["completed_at"] < done["expires_at"]
    assert done["metrics"]["queue_ms"] >= 0
    assert done["metrics"]["execution_ms"] >= 0
    assert [(o["index"], o["media_type"], o["seed"]) for o in done["outputs"]] == [(0, "image/png", 7), (1, "image/png", 8)]
    waited = server.post("/post_config", params={**DRAW, "count_returned": 2})
    result = server.get(done["urls"]["result"])
    assert result.headers["x-easel-seeds"] == "7,8"
    assert max(high for _, high in ImageChops.difference(picture(result), picture(waited)).getextrema()) <= 1
    as_json = requests.get(server.url + done["urls"]["result"], headers={"X-API-Key": USER, "Accept": "application/json"}, timeout=90).json()
    assert (len(as_json["images"]), as_json["seeds"]) == (2, [7, 8])
    second = server.get(done["outputs"][1]["url"])
    assert (picture(second).size, second.headers["x-easel-seeds"]) == ((64, 64), "8")
    assert "Seed: 8" in Image.open(io.BytesIO(second.content)).info["parameters"]
    assert server.get(done["outputs"][1]["url"].replace("outputs/1", "outputs/2")).status_code == 404


@pytest.mark.http
def test_files_and_every_way_of_sending_are_taken(server: Server) -> None:
    painted = server.post("/jobs", data={"task": "inpaint", **DRAW, "outpaint_left": 16}, files={"image": jpeg((64, 64))}).json()
    asked = server.post("/jobs", json={"task": "txt2img", **DRAW}).json()
    assert over(server, painted)["status"] == "succeeded"
    assert set(server.get(over(server, asked)["urls"]["result"]).json()) == {"images", "media_type", "seeds", "ran"}
    shown = requests.get(server.url + painted["urls"]["result"], headers={"X-API-Key": USER, "Accept": "image/png"}, timeout=90)
    assert picture(shown).size[0] > picture(shown).size[1]


@pytest.mark.http
def test_what_cannot_be_done_is_refused_at_once(server: Server) -> None:
    for values, field in (
        ({"task": "nonsense"}, "task"),
        ({"num_inference_steps": 1000}, "num_inference_steps"),
        ({"promt": "x"}, "promt"),
        ({"task": "img2img"}, "image"),
        ({"model_id": "no/such"}, "model_id"),
    ):
        body = problem(server.post("/jobs", params={**DRAW, **values}), 422)
        assert body["errors"][0]["field"] == field
    problem(server.post("/jobs", params={"task": "upscale"}, files={"mask": jpeg()}), 422)
    problem(server.post("/jobs", params=DRAW, headers={"Accept": "text/plain"}), 406)
    problem(requests.post(server.url + "/jobs", params=DRAW, timeout=60), 401)
    problem(server.get("/jobs/job_0"), 404)
    problem(server.get("/jobs?limit=0"), 422)


@pytest.mark.http
def test_a_generations_own_route_answers_with_a_job_where_that_is_preferred(server: Server) -> None:
    for path, kind in (("/post_config", "image/png"), ("/txt2img", "application/json")):
        answer = server.post(path, params=DRAW, headers={"Prefer": "respond-async, wait=5"})
        assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
        assert answer.headers["location"] == answer.json()["urls"]["self"]
        done = over(server, answer.json())
        assert server.get(done["urls"]["result"]).headers["content-type"] == kind
    problem(server.post("/post_config", params={"promt": "x"}, headers={"Prefer": "respond-async"}), 422)


@pytest.mark.http
def test_a_request_sent_twice_with_one_idempotency_key_is_one_job(server: Server) -> None:
    def sent(path: str = "/jobs", key: str = USER, **more: object) -> requests.Response:
        return server.post(path, key=key, params={**DRAW, "seed": -1, **more}, headers={"Idempotency-Key": "k-1", "Prefer": "respond-async"})

    first, again, others = sent(), sent(), sent(key=OTHER)
    assert [a.status_code for a in (first, again, others)] == [202, 202, 202]
    assert (first.json()["id"], "idempotency-replayed" in first.headers) == (again.json()["id"], False)
    assert again.headers["idempotency-replayed"] == "true"
    assert others.json()["id"] != first.json()["id"]
    assert sent("/post_config").json()["id"] == first.json()["id"]
    assert problem(sent(num_inference_steps=5), 422)["errors"][0]["field"] == "Idempotency-Key"
    problem(server.post("/jobs", params=DRAW, headers={"Idempotency-Key": "x" * 256}), 422)
    with ThreadPoolExecutor(8) as pool:  # at once: one of them is the job, the others are told so or to come again
        answers = list(pool.map(lambda _: server.post("/jobs", params=DRAW, headers={"Idempotency-Key": "k-2"}), range(8)))
    assert {a.status_code for a in answers} <= {202, 409}
    assert len({a.json()["id"] for a in answers if a.status_code == 202}) == 1
    for answer in (first, *answers):
        if answer.status_code == 202:
            over(server, answer.json())
    over(server, others.json(), key=OTHER)


@pytest.mark.http
def test_a_job_is_its_keys_alone_and_lists_are_in_pages(server: Server) -> None:
    own, others = [submit(server) for _ in range(3)], submit(server, key=OTHER)
    for path in ("", "/result", "/events", "/outputs/0"):
        problem(server.get(own[0]["urls"]["self"] + path, key=OTHER), 404)
    problem(requests.delete(server.url + own[0]["urls"]["self"], headers={"X-API-Key": OTHER}, timeout=60), 404)
    page = server.get("/jobs?limit=2").json()
    assert [job["id"] for job in page["jobs"]] == [own[2]["id"], own[1]["id"]]
    assert server.get(f"/jobs?limit=1&after={page['next']}").json()["jobs"][0]["id"] == own[0]["id"]
    seen = [job["id"] for job in server.get("/jobs", key=OTHER).json()["jobs"]]
    assert seen[0] == others["id"]
    assert not {job["id"] for job in own} & set(seen)
    assert {own[0]["id"], others["id"]} <= {job["id"] for job in server.get("/jobs?limit=100", key=ADMIN).json()["jobs"]}
    for job in own:
        over(server, job)
    assert server.get("/jobs?status=queued").json()["jobs"] == []


@pytest.mark.http
def test_a_running_job_is_cancelled_and_its_events_tell(server: Server) -> None:
    job = submit(server, **SLOW)
    running(server, job)
    stream = requests.get(server.url + job["urls"]["events"], headers={"X-API-Key": USER}, stream=True, timeout=60)
    assert stream.headers["content-type"].startswith("text/event-stream")
    seen: list[tuple[str, dict, str | None]] = []
    for name, data, id in events(stream):
        seen.append((name, data, id))
        if len([1 for name, *_ in seen if name == "progress"]) == 2 and any(name == "preview" for name, *_ in seen):
            first = requests.delete(server.url + job["urls"]["cancel"], headers={"X-API-Key": USER}, timeout=60)
            assert first.status_code == 200
            assert first.json()["status"] in ("canceling", "canceled")
    assert seen[0][0] == "status"
    assert seen[-1][:2] == ("status", server.get(job["urls"]["self"]).json())
    assert seen[-1][1]["status"] == "canceled"
    steps = [data["progress"]["step"] for name, data, _ in seen if name == "progress" and data["status"] == "running"]
    assert steps == sorted(steps)
    assert 0 < steps[-1] < 600
    preview = next(data for name, data, _ in seen if name == "preview")
    shown = Image.open(io.BytesIO(base64.b64decode(preview["b64_json"])))
    assert (shown.format, preview["media_type"]) == ("JPEG", "image/jpeg")
    assert shown.convert("L").getextrema()[1] > shown.convert("L").getextrema()[0]
    again = requests.delete(server.url + job["urls"]["cancel"], headers={"X-API-Key": USER}, timeout=60)
    assert (again.status_code, again.json()["status"]) == (200, "canceled")
    problem(server.get(job["urls"]["result"]), 409)
    # Who comes back with the last id is told the end, and no more.
    for known in (str(seen[-1][2]), "9" * 5000, "\xb2", "-1"):  # those that are none count for nothing
        resumed = requests.get(server.url + job["urls"]["events"], headers={"X-API-Key": USER, "Last-Event-ID": known.encode("latin-1")}, stream=True, timeout=60)
        assert [(name, data["status"]) for name, data, _ in events(resumed) if name != "preview"] == [("status", "canceled")]


@pytest.mark.http
def test_events_of_a_job_that_succeeds_end_with_its_output(server: Server) -> None:
    job = submit(server, num_inference_steps=40)
    stream = requests.get(server.url + job["urls"]["events"], headers={"X-API-Key": USER}, stream=True, timeout=60)
    seen = list(events(stream))
    assert [name for name, *_ in seen][-2:] == ["output", "status"]
    assert seen[-1][1]["status"] == "succeeded"
    assert seen[-2][1]["outputs"][0]["url"].startswith(job["urls"]["self"])


def events(stream: requests.Response) -> Iterator[tuple[str, dict, str | None]]:
    """Server-sent events as (name, data, id)."""
    name, data, id = "message", "", None
    for line in stream.iter_lines(decode_unicode=True):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data = value
        elif field == "id":
            id = value
        elif not line and data:
            yield name, json.loads(data), id
            name, data, id = "message", "", None


@pytest.mark.http
def test_jobs_outlive_the_server(tmp_path: Path) -> None:
    """Killed at its work: what it had in hand is done by the next one, what waits too, and what is done is still there."""
    overrides = SETTINGS | {"jobs": {"lease_s": 1, "at_once": 1}}
    with serving(tmp_path, overrides, "service:StableDiffusion") as server:
        done = over(server, submit(server))
        busy, waiting = submit(server, num_inference_steps=100), submit(server)
        running(server, busy)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(90)
    with serving(tmp_path, overrides, "service:StableDiffusion") as server:
        assert picture(server.get(done["urls"]["result"])).size == (64, 64)
        assert [over(server, job)["status"] for job in (busy, waiting)] == ["succeeded", "succeeded"]


@pytest.mark.http
def test_a_key_at_its_limit_is_told_when_it_submits_and_jobs_count(tmp_path: Path) -> None:
    hashed = hashlib.sha256(USER.encode()).hexdigest()[:12]
    overrides = SETTINGS | {"quotas": {"keys": {hashed: {"concurrent": 1, "pictures_per_day": 5}}}, "queue": {"limit": 2, "per_key": 1}}
    with serving(tmp_path, overrides, "service:StableDiffusion") as server:
        busy = submit(server, **SLOW)
        for path in ("/jobs", "/post_config"):
            assert problem(server.post(path, params=DRAW), 429)["type"].endswith("concurrency-limit")
        requests.delete(server.url + busy["urls"]["cancel"], headers={"X-API-Key": USER}, timeout=60)
        assert over(server, busy)["status"] == "canceled"
        assert over(server, submit(server, count_returned=4))["status"] == "succeeded"
        assert problem(server.post("/jobs", params={**DRAW, "count_returned": 2}), 429)["detail"].count("1 are left, and 2")
        # Of another key, one may wait; how many run meanwhile is for the process to say.
        answers = (server.post("/jobs", key=ADMIN, params=SLOW) for _ in range(Jobs().at_once + 3))
        full = next(answer for answer in answers if answer.status_code != 202)
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) > 0


def stored(tmp_path: Path, **more: object) -> Store:
    return Store(Jobs(store=f"sqlite:///{tmp_path}/jobs.sqlite3", **more))


def add(store: Store, client: str = "me", queue: Queue = Queue()) -> Job:  # noqa: B008
    plan = Catalogue(Settings()).plan(GenerationRequest(prompt="x"), None, client)
    job = store.add("generate", "StableDiffusion", plan, "{}", "*/*", queue)
    assert job is not None
    return job


def test_each_job_is_claimed_once_and_keys_take_turns(tmp_path: Path) -> None:
    one, two = stored(tmp_path), stored(tmp_path)
    first, second, other = add(one, "a"), add(one, "a"), add(two, "b")
    assert two.claim(["UniDiffuser"], 5) == []
    assert [job.id for job in one.claim(["StableDiffusion"], 1)] == [first.id]
    assert [job.id for job in two.claim(["StableDiffusion"], 1)] == [other.id]
    assert [job.id for job in two.claim(["StableDiffusion"], 5)] == [second.id]
    assert one.claim(["StableDiffusion"], 5) == []
    assert one.take("a", 3)[1:] == (3, 5)
    assert one.mine(second.id) is None
    assert one.finish(second.id, "succeeded") is None  # only who has the lease may say so
    assert two.work(second.id)[0].prompt == "x"


def test_the_jobs_of_a_dead_process_are_claimed_again_and_not_for_ever(tmp_path: Path) -> None:
    dead, alive = stored(tmp_path, lease_s=0.01, attempts=2), stored(tmp_path, lease_s=60, attempts=2)
    job, cancelled = add(dead), add(dead)
    for _ in range(2):
        assert dead.claim(["StableDiffusion"], 1)[0].id == job.id
        dead.tell(job.id, started_at=1.0, step=3)
        time.sleep(0.02)
        ended = alive.sweep()
    assert [(j.id, j.status) for j in ended] == [(job.id, "failed")]
    assert "died 2 times" in str(ended[0].error)
    dead.claim(["StableDiffusion"], 1)
    found = alive.cancel(cancelled.id)
    assert found is not None
    assert found.status == "canceling"
    time.sleep(0.02)
    assert [(j.id, j.status) for j in alive.sweep()] == [(cancelled.id, "canceled")]


def test_a_result_is_kept_whole_and_forgotten_in_time(tmp_path: Path) -> None:
    store = stored(tmp_path, retention_s=0.05)
    job = add(store)
    store.claim(["StableDiffusion"], 1)
    made = Generation(pictures=[Pixels(width=2, height=1, data=bytes([0, 255, 128, 7, 8, 254]))], seeds=[5], ran=None)
    store.tell(job.id, step=1, steps=3)  # the last that was heard before it was done
    finished = store.finish(job.id, "succeeded", made, [["image/png", 5]])
    assert finished is not None
    assert finished.state().progress.model_dump() == {"value": 1.0, "step": 3, "steps": 3}
    assert store.result(job.id) == ("{}", "*/*", made)
    time.sleep(0.06)
    store.sweep()
    gone = store.find(job.id)
    assert gone is not None
    assert gone.status == "expired"
    assert store.result(job.id) is None


def version_of(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT version FROM jobs_schema").fetchone()[0])


def test_a_store_of_an_earlier_version_is_brought_to_this_one_once_with_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jobs.sqlite3"
    store = stored(tmp_path)
    job = add(store)
    store.close()
    assert version_of(path) == 1
    with sqlite3.connect(path) as connection:  # the first ones had no version
        connection.execute("DROP TABLE jobs_schema")
    monkeypatch.setattr(job_store.SCHEMA, "added", ["ALTER TABLE jobs ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'"])
    with ThreadPoolExecutor(4) as pool:  # processes that start at once
        stores = list(pool.map(lambda _: stored(tmp_path), range(4)))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT id, colour FROM jobs").fetchall() == [(job.id, "red")]
    assert version_of(path) == 2
    assert [s.id for s in stores[0].claim(["StableDiffusion"], 5)] == [job.id]
    for each in stores:
        each.close()


def test_a_store_of_a_later_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = stored(tmp_path)
    add(store)
    store.close()
    path = tmp_path / "jobs.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE jobs_schema SET version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LaterVersion, match="is 99, and this Easel knows 1: use the Easel that wrote it"):
        stored(tmp_path)
    started = subprocess.run(
        [sys.executable, "-c", "import service"], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "EASEL_JOBS__STORE": f"sqlite:///{path}", "API_KEY": "k", "ADMIN_API_KEY": "a"},
    )  # fmt: skip
    assert started.returncode == 1
    assert "Easel cannot start. The version of the store of jobs is 99" in started.stderr
    assert path.read_bytes() == before


def test_a_corrupt_store_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, content = tmp_path / "jobs.sqlite3", b"this is no database" * 500
    path.write_bytes(content)
    job_store.SCHEMA.check(f"sqlite:///{path}")  # at start, nothing stands in the way
    assert path.read_bytes() == content
    store = stored(tmp_path)
    assert add(store).status == "queued"
    store.close()
    assert [p.read_bytes() for p in tmp_path.glob("jobs.sqlite3.corrupt-*")] == [content]
    assert "is corrupt" in caplog.text


def test_only_so_many_wait(tmp_path: Path) -> None:
    store, queue = stored(tmp_path), Queue(limit=2, per_key=1)
    add(store, "a", queue)
    with pytest.raises(Problem, match="key's share"):
        add(store, "a", queue)
    add(store, "b", queue)
    with pytest.raises(Problem, match="queue is full"):
        add(store, "c", queue)


@pytest.mark.http
def test_a_job_whose_runner_is_killed_is_done_once_it_is_back(tmp_path: Path, miniatures: dict[str, Path]) -> None:
    with serving(tmp_path, SETTINGS | {"unidiffuser": unidiffuser(miniatures)}) as server:
        busy, waiting = submit(server, num_inference_steps=100), submit(server)
        running(server, busy)
        runner_of(server).kill()
        assert [over(server, job)["status"] for job in (busy, waiting)] == ["succeeded", "succeeded"]
