"""The LoRA routes over real HTTP: the seed's calls, admin access, jobs, uploads, and the typed client."""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bentoml
import numpy
import psutil
import pytest
import requests
from PIL import Image
from safetensors.numpy import save

from tests.civitai import KEY, SIGNATURE, FakeCivitai, weights
from tests.conftest import ADMIN, USER, Server, serving, wait_for
from tests.test_http import problem

pytestmark = pytest.mark.http
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass
class Place:
    """A server with its fake Civitai and its files."""

    server: Server
    fake: FakeCivitai
    base: Path

    @property
    def registry(self) -> dict[str, Any]:
        return json.loads((self.base / "lora_list.json").read_text())

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.base / "loras"))

    def admin(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"X-API-Key": ADMIN, **more.pop("headers", {})}
        return requests.request(method, self.server.url + path, headers=headers, timeout=60, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    base = tmp_path_factory.mktemp("loras")
    with FakeCivitai() as fake:
        for i in range(1, 30):
            fake.add(i, f"Style {i:02d}")
        for i in (40, 41):
            fake.add(i, "Twin")
        with serving(base, {"loras": fake.settings() | {"max_bytes": 32 * 1024 * 1024}}, env={"CIVIT_KEY": KEY}) as server:
            place = Place(server, fake, base)
            yield place
            fake.contents[290] = weights(290, 3000)
            fake.faults.file = "slow"
            place.admin("POST", "/add_new_lora?name=29&wait=false")
            wait_for(lambda: any(f.endswith(".part") for f in place.files), 20)
            log = server.log.read_text(errors="replace")
        assert not [f for f in place.files if f.startswith(".")]  # stopped in the middle of a download
    assert KEY not in log
    assert SIGNATURE not in log


@pytest.fixture(autouse=True)
def no_faults(place: Place) -> Iterator[None]:
    yield
    place.fake.faults.__init__()


def test_the_seeds_calls_run_as_written(place: Place) -> None:
    added = place.admin("POST", "/add_new_lora?name=Style+01")
    assert added.status_code == 200
    assert added.json()["already_there"] is False
    again = place.admin("GET", "/add_new_lora?name=style 01")
    assert again.status_code == 200
    assert again.json()["already_there"] is True
    assert again.headers["deprecation"] == "@1795478400"
    assert "deprecation" not in added.headers
    listed = place.server.get("/get_available_loras").json()
    entry = listed["loras"]["Style 01"]
    assert listed["warning"] is None
    assert entry["trigger words"] == ["Style 01 style", "extra"]
    assert (entry["model_id"], entry["base_model"], entry["usage_rights"], entry["allow_no_mention"]) == (1, SDXL, "AllowCommercialUse", False)
    assert (entry["commercial_use"], entry["credit"], entry["available"]) == (True, "ann", True)
    assert place.files.count("civitai-10.safetensors") == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/add_new_lora?name=2"), ("GET", "/add_new_lora?name=2"), ("POST", "/add_lora"), ("POST", "/remove_lora"), ("POST", "/admin/loras"), ("POST", "/admin/loras/upload"),
        ("DELETE", "/admin/loras/x"), ("PATCH", "/admin/loras/x"), ("POST", "/admin/loras/x/verify"), ("GET", "/admin/loras/jobs"), ("DELETE", "/admin/loras/jobs/x"),
    ],
)
def test_changing_needs_an_admin_key(place: Place, method: str, path: str) -> None:
    seen = len(place.fake.seen)
    body = json.dumps({"source": 2, "name": "x"})
    for key, status in ((USER, 403), ("wrong", 401), (None, 401)):
        response = requests.request(method, place.server.url + path, data=body, headers={"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {}), timeout=90)
        problem(response, status)
    assert len(place.fake.seen) == seen


@pytest.mark.parametrize("path", ["/add_new_lora/?name=2", "//add_new_lora?name=2", "/ADD_NEW_LORA?name=2", "/./add_new_lora?name=2", "/admin%2Floras", "/%61dd_new_lora?name=2"])
def test_no_other_spelling_gets_round_the_admin_key(place: Place, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(place.server.url.split(":")[-1]), timeout=90)
    connection.request("POST", path, body='{"source": 2}', headers={"X-API-Key": USER, "Content-Type": "application/json"})
    assert connection.getresponse().status in (403, 404, 405, 307)
    assert "Style 02" not in place.registry


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ({"file": "html"}, 502, "web page"),
        ({"file": "wrong"}, 502, "SHA-256"),
        ({"file": "hang"}, 504, "stalls"),
        ({"file": "huge"}, 413, "loras.max_bytes"),
        ({"download_status": 401, "download_body": {"error": "Unauthorized"}}, 502, "CIVIT_KEY"),
        ({"download_status": 403, "download_body": {"error": "Early Access", "deadline": "2027"}}, 502, "Early Access"),
        ({"download_status": 404}, 404, "404"),
        ({"download_status": 429, "download_headers": {"Retry-After": "77"}}, 503, "429"),
        ({"redirect": "http://169.254.169.254/"}, 502, "allowed_hosts"),
        ({"api_status": 503}, 503, "503"),
    ],
    ids=str,
)
def test_a_fault_is_a_problem_and_the_next_request_works(place: Place, fault: dict[str, Any], status: int, says: str) -> None:
    for name, value in fault.items():
        setattr(place.fake.faults, name, value)
    registry, files = place.registry, place.files
    body = problem(place.admin("POST", "/add_new_lora?name=3"), status)
    assert says in body["detail"]
    if "download_headers" in fault:
        assert body["retry_after"] == 78
    assert (place.registry, place.files) == (registry, files)
    place.fake.faults.__init__()
    assert place.admin("POST", "/admin/loras", json={"source": 3}).status_code == 200
    assert place.admin("DELETE", "/admin/loras/Style 03").json() == {"name": "Style 03", "file_deleted": True}
    assert (place.registry, place.files) == (registry, files)


def test_a_full_disk_is_a_507(place: Place) -> None:
    processes = psutil.Process(place.server.process.pid).children(recursive=True)
    limits = [p.rlimit(psutil.RLIMIT_FSIZE) for p in processes]
    for process, (_, hard) in zip(processes, limits, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (200_000, hard))
    try:
        problem(place.admin("POST", "/add_new_lora?name=4"), 507)
        problem(upload(place, weights(77), name="full"), 507)
    finally:
        for process, limit in zip(processes, limits, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, limit)
    assert "civitai-40.safetensors" not in place.files
    assert not [f for f in place.files if f.startswith(".")]
    assert place.admin("POST", "/add_new_lora?name=4").status_code == 200


def test_several_models_of_one_name_are_listed(place: Place) -> None:
    body = problem(place.admin("POST", "/add_new_lora?name=twin"), 409)
    assert [c["model_id"] for c in body["candidates"]] == [40, 41]


@pytest.mark.parametrize("query", ["", "name=", "name=1&nmae=2", "name=1&name=2", "name=1&wait=perhaps", f"name={'x' * 600}", "name=http://169.254.169.254/x"])
def test_a_query_that_makes_no_sense_is_a_422(place: Place, query: str) -> None:
    problem(place.admin("POST", f"/add_new_lora?{query}"), 422)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"{}", 422), (b'{"source": {"repo_id": "x"}}', 422), (b'{"source": {"x": 1}}', 422), (b'{"source": [1]}', 422), (b'{"source": 1, "nam": "x"}', 422), (b'{"source": 1, "name": "a:b"}', 422), (b'{"source": 1e400}', 422), (b'{"source": "\\ud800"}', 422), (b'{"\\ud800": 1}', 422)],
)
def test_a_body_that_makes_no_sense_is_refused(place: Place, body: bytes, status: int) -> None:
    found = problem(place.admin("POST", "/admin/loras", data=body, headers={"Content-Type": "application/json"}), status)
    assert status == 400 or found["errors"][0]["field"]


def job_of(place: Place, response: requests.Response) -> dict[str, Any]:
    assert response.status_code == 202
    assert response.headers["location"] == f"/admin/loras/jobs/{response.json()['id']}"
    return place.admin("GET", response.headers["location"]).json()


def test_a_long_download_runs_as_a_job_with_progress_and_can_be_cancelled(place: Place) -> None:
    place.fake.contents[50] = weights(50, 1500)
    place.fake.models[5]["modelVersions"][0]["files"][0]["hashes"] = {}
    place.fake.faults.file = "slow"
    files = place.files
    begun = place.admin("POST", "/add_new_lora?name=5", headers={"Prefer": "respond-async"})
    assert begun.headers["preference-applied"] == "respond-async"
    id = job_of(place, begun)["id"]
    wait_for(lambda: place.admin("GET", f"/admin/loras/jobs/{id}").json()["progress"]["eta_s"] is not None, 20)
    state = place.admin("GET", f"/admin/loras/jobs/{id}").json()
    assert state["status"] == "running"
    assert 0 < state["progress"]["bytes"] < state["progress"]["total_bytes"]
    assert 0 < state["progress"]["value"] < 1
    assert state["progress"]["rate"] > 0
    assert id in [j["id"] for j in place.admin("GET", "/admin/loras/jobs").json()]
    assert place.admin("DELETE", f"/admin/loras/jobs/{id}").json()["status"] == "canceled"
    assert place.admin("DELETE", f"/admin/loras/jobs/{id}").json()["status"] == "canceled"
    assert place.files == files
    assert "Style 05" not in place.registry
    problem(place.admin("GET", "/admin/loras/jobs/none"), 404)


def test_a_job_tells_its_result_or_its_error(place: Place) -> None:
    id = job_of(place, place.admin("POST", "/admin/loras?wait=false", json={"source": {"version_id": 60}, "name": "six"}))["id"]
    wait_for(lambda: place.admin("GET", f"/admin/loras/jobs/{id}").json()["completed_at"], 20)
    state = place.admin("GET", f"/admin/loras/jobs/{id}").json()
    assert (state["status"], state["result"]["name"], state["progress"]["value"]) == ("succeeded", "six", 1)
    id = job_of(place, place.admin("POST", "/add_new_lora?name=999&wait=false"))["id"]
    wait_for(lambda: place.admin("GET", f"/admin/loras/jobs/{id}").json()["status"] == "failed", 20)
    assert place.admin("GET", f"/admin/loras/jobs/{id}").json()["error"]["status"] == 404


def test_one_added_by_many_at_once_is_downloaded_once(place: Place) -> None:
    place.fake.faults.file = "slow"
    before = len(place.fake.downloads())
    answers: list[requests.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(place.admin("POST", "/add_new_lora?name=7"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200] * 5
    assert sorted(a.json()["already_there"] for a in answers) == [False] + [True] * 4
    assert len(place.fake.downloads()) == before + 1


def test_a_client_that_gives_up_loses_nothing(place: Place) -> None:
    place.fake.faults.file = "slow"
    with pytest.raises(requests.ReadTimeout):
        requests.post(place.server.url + "/add_new_lora?name=8", headers={"X-API-Key": ADMIN}, timeout=0.5)
    wait_for(lambda: "Style 08" in place.server.get("/get_available_loras").json()["loras"], 20)


def test_a_broken_registry_is_told_to_users_and_admins_and_goes_on_serving(place: Place) -> None:
    path = place.base / "lora_list.json"
    good = path.read_text()
    before = place.server.get("/get_available_loras").json()["loras"]
    path.write_text(good[:-3])
    found = place.server.get("/get_available_loras").json()
    assert found["loras"] == before
    assert "line " in found["warning"]
    assert "column " in found["warning"]
    assert "line " in problem(place.admin("POST", "/add_new_lora?name=9"), 409)["detail"]
    assert "lora_list.json is broken" in place.server.log.read_text()
    edited = json.loads(good)
    edited["by hand"] = {"base_model": SDXL, "lora_path": "starter/x.safetensors", "trigger words": ["hand"]}
    path.write_text(json.dumps(edited))
    found = place.server.get("/get_available_loras").json()
    assert found["warning"] is None
    assert found["loras"]["by hand"]["available"] is False
    path.write_text(good)
    assert place.admin("POST", "/add_new_lora?name=9").status_code == 200


def upload(place: Place, content: bytes, **fields: Any) -> requests.Response:
    name = fields.pop("file_name", "../../evil.safetensors")
    return place.admin("POST", "/admin/loras/upload", files={"file": (name, content)}, data={"name": "up", "base_model": "SDXL 1.0"} | fields)


def test_a_file_is_uploaded_edited_verified_and_removed(place: Place) -> None:
    content = weights(100)
    added = upload(place, content, trigger_words="one, two", usage_rights="AllowCommercialUse", creator="me")
    assert added.status_code == 200, added.text
    entry = added.json()["lora"]
    assert (entry["trigger words"], entry["family"], entry["size"], entry["base_model"]) == (["one", "two"], "sdxl", len(content), SDXL)
    assert entry["file_name"].startswith("upload-")
    assert (place.base / "loras" / entry["file_name"]).read_bytes() == content
    assert (place.base / entry["lora_path"]).is_file()
    assert upload(place, content).json()["already_there"] is True
    problem(upload(place, weights(101)), 409)

    changed = place.admin("PATCH", "/admin/loras/up", json={"trigger_words": ["three"], "usage_rights": ["Rent"], "allow_no_mention": True})
    assert changed.json()["lora"]["trigger words"] == ["three"]
    listed = place.server.get("/get_available_loras").json()["loras"]["up"]
    assert (listed["commercial_use"], listed["credit"], listed["creator"]) == (False, None, "me")
    for body in ({}, {"usage_rights": "All"}, {"trigger_words": "x"}, {"name": "other"}, {"trigger_words": [""]}):
        problem(place.admin("PATCH", "/admin/loras/up", json=body), 422)

    assert place.admin("POST", "/admin/loras/up/verify").json()["ok"] is True
    (place.base / "loras" / entry["file_name"]).write_bytes(weights(102))
    verified = place.admin("POST", "/admin/loras/up/verify").json()
    assert verified["ok"] is False
    assert verified["sha256"] != verified["expected_sha256"]

    assert place.admin("DELETE", "/admin/loras/up").json()["file_deleted"] is True
    assert entry["file_name"] not in place.files
    for method, path in (("DELETE", "/admin/loras/up"), ("PATCH", "/admin/loras/up"), ("POST", "/admin/loras/up/verify")):
        problem(place.admin(method, path, json={"creator": "x"}), 404)


def test_removing_keeps_weights_that_others_use_or_that_are_not_ours(place: Place) -> None:
    content = weights(110)
    assert upload(place, content, name="first").status_code == 200
    assert upload(place, content, name="second").status_code == 200
    assert place.admin("DELETE", "/admin/loras/first").json()["file_deleted"] is False
    assert place.admin("DELETE", "/admin/loras/second").json()["file_deleted"] is True
    (place.base / "local.safetensors").write_bytes(content)
    registry = place.registry
    registry["local"] = {"base_model": SDXL, "lora_path": "local.safetensors"}
    (place.base / "lora_list.json").write_text(json.dumps(registry))
    assert place.admin("POST", "/add_new_lora?name=local").json()["already_there"] is True
    assert place.admin("POST", "/admin/loras/local/verify").json()["ok"] is True
    assert place.admin("DELETE", "/admin/loras/local").json()["file_deleted"] is False
    assert (place.base / "local.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "fields", "status"),
    [
        (b"PK\x03\x04" + bytes(9000), {}, 422),
        (b"<html>", {}, 422),
        (b"", {}, 422),
        (weights(1, key="unet.weight"), {}, 422),
        (weights(1)[:-9], {}, 422),
        (weights(1), {"name": "../x"}, 422),
        (weights(1), {"name": "a:b"}, 422),
        (weights(1), {"base_model": "SD 3.5 Large"}, 422),
        (weights(1), {"usage_rights": "Yes"}, 422),
        (weights(1), {"allow_no_mention": "perhaps"}, 422),
        (weights(1), {"nonsense": "1"}, 422),
        (weights(1), {"trigger_words": "x" * 70_000}, 422),
        (weights(1), {f"x{i}": "1" for i in range(40)}, 400),
        (bytes(34 * 1024 * 1024), {}, 413),
    ],
)
def test_an_upload_that_cannot_be_is_refused_and_leaves_nothing(place: Place, content: bytes, fields: dict[str, str], status: int) -> None:
    registry, files = place.registry, place.files
    problem(upload(place, content, **fields), status)
    assert (place.registry, place.files) == (registry, files)


def test_forms_that_are_none(place: Place) -> None:
    files = place.files
    problem(place.admin("POST", "/admin/loras/upload", data=b"x", headers={"Content-Type": "application/octet-stream"}), 415)
    problem(place.admin("POST", "/admin/loras/upload", data=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    problem(place.admin("POST", "/admin/loras/upload", data=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)
    problem(place.admin("POST", "/admin/loras/upload", data={"name": "x", "base_model": "Pony"}, files={"other": weights(1)}), 422)
    problem(place.admin("POST", "/admin/loras/upload", files=[("file", weights(1)), ("file", weights(1)), ("name", (None, "x")), ("base_model", (None, "Pony"))]), 422)
    problem(place.admin("POST", "/admin/loras/upload", files=[("name", (None, "x")), ("name", (None, "y"))]), 422)
    problem(place.admin("POST", "/admin/loras/upload", data=b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nabc', headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)
    assert place.files == files


def test_an_upload_that_breaks_off_leaves_nothing(place: Place) -> None:
    files = place.files
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", int(place.server.url.split(":")[-1]))) as line:
        line.sendall(b"POST /admin/loras/upload HTTP/1.1\r\nHost: x\r\nX-API-Key: " + ADMIN.encode() + b"\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 3000000\r\n\r\n" + head + bytes(500_000))
        wait_for(lambda: place.files != files, 10)
    wait_for(lambda: place.files == files, 10)


def test_an_upload_larger_than_other_bodies_is_not_held_in_memory(place: Place) -> None:
    content = weights(7, 29_000)  # 28 MiB, where other bodies may have 24
    processes = psutil.Process(place.server.process.pid).children(recursive=True)
    before, peak, done = sum(p.memory_info().rss for p in processes), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, sum(p.memory_info().rss for p in processes))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        response = upload(place, content, name="large")
    finally:
        done.set()
        watcher.join()
    assert response.status_code == 200, response.text
    assert peak - before < 16_000_000
    assert place.admin("DELETE", "/admin/loras/large").json()["file_deleted"] is True


def test_the_typed_client_adds_lists_and_removes(place: Place) -> None:
    with bentoml.SyncHTTPClient(place.server.url, token=ADMIN) as client:
        added = client.add_lora(source="Style 11", trigger_words=["eleven"])
        assert added["name"] == "Style 11"
        assert client.list_loras()["loras"]["Style 11"]["trigger words"] == ["eleven"]
        assert client.add_lora(source={"model_id": 12}, name="twelve")["name"] == "twelve"
        assert client.remove_lora(name="Style 11")["file_deleted"] is True
    with bentoml.SyncHTTPClient(place.server.url, token=USER) as client:
        assert "twelve" in client.list_loras()["loras"]
        with pytest.raises(Exception, match=r"403|admin"):
            client.add_lora(source="Style 13")


def test_embeddings_go_the_same_way_and_act_by_their_name(place: Place) -> None:
    def drawn(**values: Any) -> requests.Response:
        return place.server.post("/post_config", params={"prompt": "red apple", "seed": 1, "num_inference_steps": 2, **values})

    before = drawn()
    content = save({"emb_params": numpy.random.default_rng(0).standard_normal((2, 192)).astype("float32") / 2})
    fields = {"name": "glow", "base_model": "starter/stable-diffusion"}
    assert "not of a LoRA" in problem(upload(place, content, **fields, kind="lora"), 422)["detail"]
    assert "not of an embedding" in problem(upload(place, weights(1), **fields, kind="embedding"), 422)["detail"]
    assert "flux" in problem(upload(place, content, name="glow", base_model="Flux.1 D"), 422)["detail"]
    assert upload(place, content, **fields).json()["lora"]["kind"] == "embedding"
    assert upload(place, content, **fields).json()["already_there"] is True
    assert "glow" not in place.server.get("/get_available_loras").json()["loras"]
    entry = place.server.get("/get_available_embeddings").json()["embeddings"]["glow"]
    assert (entry["available"], entry["commercial_use"], entry["base_model"]) == (True, False, "starter/stable-diffusion")
    model = next(m for m in place.server.get("/capabilities").json()["models"] if m["model_id"] == "starter/stable-diffusion")
    assert "glow" in model["embeddings"]
    assert "glow" not in model["loras"]
    assert place.admin("POST", "/admin/loras/glow/verify").json()["ok"] is True
    assert place.admin("PATCH", "/admin/loras/glow", json={"usage_rights": "AllowCommercialUse", "creator": "Mina"}).json()["lora"]["creator"] == "Mina"
    used = drawn(negative_prompt="glow", commercial=True)
    assert (used.headers["x-easel-embeddings"], used.headers["x-easel-credit"]) == ("glow;vectors=2", "Mina")
    assert used.content != before.content
    assert "TI hashes: " in Image.open(io.BytesIO(used.content)).info["parameters"]
    rows = place.admin("GET", "/admin/usage?group_by=lora").json()["usage"]
    assert next(row["pictures"] for row in rows if row["lora"] == "glow") == 1
    assert place.admin("DELETE", "/admin/loras/glow").json()["file_deleted"] is True
    assert drawn().content == before.content
    plain = drawn(negative_prompt="glow")
    assert "x-easel-embeddings" not in plain.headers
    assert plain.content != used.content


def test_embeddings_come_from_civitai(place: Place) -> None:
    content = save({"clip_l": numpy.ones((2, 768), "float32"), "clip_g": numpy.ones((2, 1280), "float32")})
    place.fake.add(70, "Easy (Negative)", content=content, type="TextualInversion", version={"trainedWords": ["easy_negative"]})
    assert "kind=embedding" in problem(place.admin("POST", "/add_new_lora?name=Easy+(Negative)"), 404)["detail"]
    added = place.admin("POST", "/add_new_lora?name=Easy+(Negative)&kind=embedding").json()
    assert (added["name"], added["lora"]["kind"], added["lora"]["family"]) == ("easy_negative", "embedding", "sdxl")
    assert place.admin("POST", "/add_new_lora?name=70").json()["already_there"] is True
    assert "is a LORA" in problem(place.admin("POST", "/admin/loras", json={"source": 1, "kind": "embedding", "name": "x"}), 422)["detail"]
    problem(place.admin("POST", "/add_new_lora?name=70&kind=checkpoint"), 422)
    refused = problem(place.server.post("/post_config", params={"prompt": "x", "negative_prompt": "easy_negative"}), 422)
    assert "made for sdxl models" in refused["detail"]
    assert place.admin("DELETE", "/admin/loras/easy_negative").json()["file_deleted"] is True


def test_the_documents_show_the_lora_routes(place: Place) -> None:
    paths = place.server.get("/openapi.json").json()["paths"]
    assert {"/get_available_loras", "/add_new_lora", "/admin/loras", "/admin/loras/upload", "/admin/loras/{name}", "/admin/loras/{name}/verify", "/admin/loras/jobs", "/admin/loras/jobs/{id}", "/add_lora"} <= set(paths)
    assert paths["/add_new_lora"]["get"]["deprecated"] is True
    schema = place.server.get("/schema.json").json()
    assert {"add_lora", "remove_lora", "list_loras"} <= {route["name"] for route in schema["routes"]}
