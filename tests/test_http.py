"""The contract over real HTTP: the seed's example calls, answer formats, access, and the typed client."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import bentoml
import pytest
import requests
from PIL import Image, ImageChops

from core.settings import ROOT
from tests.conftest import ADMIN, USER, Server, wait_for

pytestmark = pytest.mark.http
FAST = {"num_inference_steps": 4, "seed": 7}


def picture(response: requests.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content))


def problem(response: requests.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def jpeg(size: tuple[int, int] = (300, 200), colour: str = "orange") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG")
    return out.getvalue()


def test_the_seeds_text_to_image_call_runs_as_written(server: Server) -> None:
    headers = {"X-API-Key": "your-api-key"}
    response = requests.post(
        server.url + "/post_config",
        headers=headers,
        params={
            "prompt": "A serene mountain landscape, oil painting style",
            "model_id": "stabilityai/stable-diffusion-2-1",
            "num_inference_steps": 30,
            "guidance_scale": 7.5,
            "width": 768,
            "height": 768,
            "count_returned": 4,
            "seed": 42,
        },
        timeout=280,
    )
    assert picture(response).size == (1536, 1536)
    assert response.headers["x-easel-seeds"] == "42,43,44,45"
    assert response.headers["x-easel-steps"] == "30"


def test_the_seeds_image_to_image_call_runs(server: Server) -> None:
    files = {"image": ("input.jpg", io.BytesIO(jpeg()), "multipart/form-data")}
    params = {"prompt": "Make it sunset", "model_id": "stabilityai/stable-diffusion-2-1", "num_inference_steps": 20}
    response = server.post("/post_config", params=params, files=files)
    width, height = picture(response).size
    assert abs(width / height - 1.5) < 0.05
    assert response.headers["x-easel-steps"] == "15"
    assert "resized from 300x200" in response.headers["x-easel-notes"]


@pytest.mark.parametrize("model", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"])
def test_each_family_draws_from_text_and_from_a_picture(server: Server, model: str) -> None:
    params = {"prompt": "a cat", "model_id": model, "width": 256, "height": 256, **FAST}
    assert picture(server.post("/post_config", params=params)).size == (256, 256)
    assert picture(server.post("/post_config", params=params, files={"image": jpeg()})).size == (256, 256)


def test_the_answer_follows_accept(server: Server) -> None:
    params = {"prompt": "red heart", "count_returned": 3, **FAST}

    def answer(accept: str) -> requests.Response:
        return server.post("/post_config", params=params, headers={"Accept": accept})

    sheet = picture(answer("image/*"))
    assert sheet.size == (128, 128)
    body = answer("application/json").json()
    assert body["seeds"] == [7, 8, 9]
    singles = [base64.b64decode(b) for b in body["images"]]
    archive = zipfile.ZipFile(io.BytesIO(answer("application/zip").content))
    assert [archive.read(n) for n in archive.namelist()] == singles
    mixed = answer("multipart/mixed")
    assert mixed.headers["content-type"].startswith("multipart/mixed; boundary=")
    assert all(s in mixed.content for s in singles)
    assert picture(answer("image/webp")).format == "WEBP"
    problem(answer("text/html"), 406)


def test_format_and_quality_are_kept(server: Server) -> None:
    for format in ("png", "jpeg", "webp"):
        response = server.post("/post_config", params={"prompt": "star", "format": format, **FAST})
        assert picture(response).format == format.upper()
        assert response.headers["content-type"] == f"image/{format}"
    sizes = [len(server.post("/post_config", params={"prompt": "star", "format": "jpeg", "quality": q, **FAST}).content) for q in (10, 95)]
    assert sizes[0] < sizes[1]


def test_pictures_carry_a1111_parameters_and_a_json_record(server: Server) -> None:
    params = {"prompt": "red apple, shiny", "negative_prompt": "blue", "scheduler": "DPM++ 2M Karras", **FAST}
    info = picture(server.post("/post_config", params=params)).info
    first, negative, last = info["parameters"].split("\n")
    assert (first, negative) == ("red apple, shiny", "Negative prompt: blue")
    assert last.startswith("Steps: 4, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 7, Size: 64x64, Model hash: ")
    sha256 = hashlib.sha256((ROOT / "starter/stable-diffusion/unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert f"Model hash: {sha256[:10]}, Model: starter/stable-diffusion, Version: easel " in last
    record = json.loads(info["easel"])
    assert record["seed"] == 7
    assert record["model_sha256"] == sha256
    assert record["libraries"]["diffusers"]
    for format in ("jpeg", "webp"):
        exif = picture(server.post("/post_config", params={**params, "format": format})).getexif().get_ifd(0x8769)
        comment = exif[0x9286]
        assert comment.startswith(b"UNICODE\0")
        assert comment[8:].decode("utf-16-be") == info["parameters"]


def test_without_a_key_only_health_answers(server: Server) -> None:
    for path in ("/", "/docs", "/docs.json", "/openapi.json", "/schema.json", "/metrics", "/capabilities", "/buffer_status", "/nothing", "//livez", "/livez/"):
        response = requests.get(server.url + path, timeout=10)
        problem(response, 401)
        assert "Bearer" in response.headers["www-authenticate"]
    for path in ("/post_config?prompt=x", "/txt2img", "/img2img", "/internal/generate", "/admin/unload"):
        problem(requests.post(server.url + path, timeout=10), 401)
    for path in ("/livez", "/readyz"):
        assert requests.get(server.url + path, timeout=10).status_code == 200
    problem(server.get("/capabilities", key="wrong"), 401)
    problem(server.get("/capabilities", key="ключ".encode().decode("latin-1")), 401)


def test_a_key_works_in_either_header_and_roles_hold(server: Server) -> None:
    assert requests.get(server.url + "/capabilities", headers={"Authorization": f"Bearer {USER}"}, timeout=10).ok
    assert server.get("/capabilities", key=ADMIN).ok
    problem(server.post("/admin/unload", key=USER), 403)
    assert server.post("/admin/unload", key=ADMIN).ok


def test_a_misspelt_unload_unloads_nothing(server: Server) -> None:
    server.post("/post_config", params={"prompt": "x", **FAST})
    assert "model_id" in problem(server.post("/admin/unload", key=ADMIN, params={"modelid": "starter/stable-diffusion"}), 422)["detail"]
    problem(server.post("/admin/unload", key=ADMIN, params={"model_id": "starter"}), 422)
    states = {m["model_id"]: m["state"] for m in server.get("/buffer_status").json()["models"]}
    assert states["starter/stable-diffusion"] == "warm"


def test_concurrent_requests_of_any_size_and_scheduler_do_not_mix(server: Server) -> None:
    wanted = [("red apple", 64, "Euler a"), ("cat", 96, "DPM++ 2M"), ("pizza", 128, "Heun"), ("blue heart", 32, "DDIM")]
    params = [{"prompt": p, "width": w, "scheduler": s, **FAST} for p, w, s in wanted]
    alone = [server.post("/post_config", params=p).content for p in params]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: server.post("/post_config", params=p).content, params * 2))
    for made, expected in zip(together, alone * 2, strict=True):  # of two alike, which may have shared a batch: to one level
        difference = ImageChops.difference(*(Image.open(io.BytesIO(file)) for file in (made, expected)))
        assert max(high for _, high in difference.getextrema()) <= 1


def test_internal_routes_are_not_served(server: Server) -> None:
    for path in ("/internal/generate", "/internal/status", "/internal/cancel"):
        problem(server.post(path, key=ADMIN, json={}), 404)


def test_unknown_paths_and_methods_are_problems(server: Server) -> None:
    problem(server.get("/nothing"), 404)
    assert server.get("/post_config").headers["allow"] == "POST"
    problem(server.get("/post_config"), 405)
    for path, methods in {"/jobs/x": "DELETE, GET", "/admin/experiments": "GET, POST", "/sdapi/v1/options": "GET, POST", "/admin/loras/jobs": "GET"}.items():
        wrong = requests.options(server.url + path, headers={"X-API-Key": ADMIN}, timeout=60)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, methods)


def test_a_number_is_no_date(server: Server) -> None:
    refused = problem(server.get("/admin/usage", key=ADMIN, params={"until": "0.5"}), 422)
    assert refused["errors"][0]["field"] == "until"
    assert "ISO 8601" in refused["errors"][0]["message"]
    assert server.get("/admin/usage", key=ADMIN, params={"until": "2026-11-26T12:00:00Z"}).status_code == 200


def test_the_document_has_the_contract_and_its_security(server: Server) -> None:
    for path in ("/openapi.json", "/docs.json"):
        document = server.get(path).json()
        operation = document["paths"]["/post_config"]["post"]
        assert {p["name"] for p in operation["parameters"]} >= {"prompt", "scheduler", "seed", "clip_skip"}
        assert {next(iter(s)) for s in operation["security"]} == {"APIKeyHeader", "HTTPBearer"}
        assert set(document["components"]["securitySchemes"]) == {"APIKeyHeader", "HTTPBearer"}
        assert {"/txt2img", "/img2img", "/capabilities"} <= set(document["paths"])


def test_bentomls_client_calls_the_typed_apis(server: Server, tmp_path) -> None:
    (tmp_path / "in.jpg").write_bytes(jpeg())
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        drawn = client.txt2img(prompt="red apple", num_inference_steps=4, seed=3, count_returned=2)
        redrawn = client.img2img(prompt="red apple", image=tmp_path / "in.jpg", num_inference_steps=4, seed=3)
    assert drawn["seeds"] == [3, 4]
    assert Image.open(io.BytesIO(base64.b64decode(drawn["images"][0]))).size == (64, 64)
    assert redrawn["ran"]["strength"] == 0.75


def test_capabilities_tell_limits_and_states(server: Server) -> None:
    server.post("/post_config", params={"prompt": "x", **FAST})
    body = server.get("/capabilities").json()
    models = {m["model_id"]: m for m in body["models"]}
    assert models["starter/stable-diffusion"]["state"] == "warm"
    assert models["black-forest-labs/FLUX.1-dev"]["negative_prompt"] is False
    assert "DPM++ 2M Karras" in models["starter/stable-diffusion"]["schedulers"]
    assert {m["model_id"] for m in server.get("/get_available_stable_diffs").json()["models"]} == set(models)


def test_buffer_status_shows_memory_and_the_queue(server: Server) -> None:
    server.post("/post_config", params={"prompt": "x", **FAST})
    status = server.get("/buffer_status").json()
    starter = next(m for m in status["models"] if m["model_id"] == "starter/stable-diffusion")
    assert starter["state"] == "warm"
    assert 40e6 < starter["resident_bytes"] < 60e6
    assert 0 < starter["unload_in_s"] <= 600
    assert status["queue"]["limit"] == 64
    assert server.post("/admin/unload", key=ADMIN, params={"model_id": "starter/stable-diffusion"}).json() == {"unloaded": 1}
    status = server.get("/buffer_status").json()
    assert next(m for m in status["models"] if m["model_id"] == "starter/stable-diffusion")["state"] == "cold"


def test_weights_that_cannot_be_had_leave_the_service_able(server: Server) -> None:
    body = problem(server.post("/post_config", params={"prompt": "x", "model_id": "missing/model"}), 503)
    assert "/nowhere/at/all" in body["detail"]
    body = problem(server.post("/post_config", params={"prompt": "x", "model_id": "unreachable/model"}), 503)
    assert "hub" in body["detail"]
    status = server.get("/buffer_status").json()
    assert next(m for m in status["models"] if m["model_id"] == "missing/model")["state"] == "failed"
    assert picture(server.post("/post_config", params={"prompt": "x", **FAST}))


def test_livez_answers_at_once_while_a_picture_is_made(server: Server) -> None:
    slow = {"prompt": "x", "num_inference_steps": 100, "count_returned": 2}
    drawing = threading.Thread(target=server.post, args=("/post_config",), kwargs={"params": slow})
    drawing.start()
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 1, 10)
    times = []
    while drawing.is_alive() and len(times) < 30:
        started = time.perf_counter()
        assert requests.get(server.url + "/livez", timeout=5).ok
        times.append(time.perf_counter() - started)
        time.sleep(0.02)
    drawing.join()
    assert len(times) >= 10
    assert sorted(times)[len(times) // 2] < 0.1


def test_a_client_that_leaves_frees_the_device_at_the_next_step(server: Server) -> None:
    endless = {"prompt": "x", "num_inference_steps": 150, "count_returned": 16, "width": 256, "height": 256}
    with pytest.raises(requests.ReadTimeout):
        server.post("/post_config", params=endless, timeout=2)
    started = time.monotonic()
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 0, 20)
    assert time.monotonic() - started < 30


def test_a_deadline_stops_the_work(server: Server) -> None:
    endless = {"prompt": "x", "num_inference_steps": 150, "count_returned": 16, "width": 256, "height": 256, "deadline_s": 1}
    started = time.monotonic()
    assert "deadline" in problem(server.post("/post_config", params=endless), 504)["type"]
    assert time.monotonic() - started < 60


def test_a_picture_in_the_making_outlasts_any_number_of_other_calls(server: Server) -> None:
    """BentoML would close the entry's connections after a hundred, and the picture would be begun anew."""
    drawing = http.client.HTTPConnection(server.url.removeprefix("http://"))
    drawing.request("POST", "/post_config?prompt=apple&num_inference_steps=150&count_returned=4&seed=1", headers={"X-API-Key": USER})
    wait_for(lambda: (server.get("/buffer_status").json()["queue"]["progress"] or {"steps": 0})["steps"] == 150, 60, server)

    def steps_done(_: int) -> int:
        return server.get("/buffer_status").json()["queue"]["progress"]["steps_done"]

    first = steps_done(0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(steps_done, range(105)))
    assert steps_done(0) > first
    drawing.close()
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 0, 60, server)
    assert "the runner did not answer" not in server.log.read_text(errors="replace")
