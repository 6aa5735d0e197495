"""`Prefer: respond-async` on the routes of other contracts: a job, whose result is what the route would have answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.conftest import USER, Server, catalogue, serving, unidiffuser
from tests.test_images import saved
from tests.test_jobs import over

LATER = {"Prefer": "respond-async"}
FAST = {"prompt": "red apple", "num_inference_steps": 2, "seed": 7}
A1111 = {"prompt": "red apple", "steps": 2, "seed": 7, "width": 64, "height": 64}
RED = saved(Image.new("RGB", (64, 64), "red"), "PNG")
HALF = Image.new("RGBA", (64, 64), "red")
HALF.paste((0, 0, 0, 0), (0, 0, 32, 64))
WHITE = base64.b64encode(saved(Image.new("RGB", (64, 64), "white"), "PNG")).decode()
ENCODED = base64.b64encode(RED).decode()
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "generations": ("/v1/images/generations", {"json": FAST | {"n": 2, "output_format": "jpeg", "quality": "low"}}),
    "edits": ("/v1/images/edits", {"data": FAST, "files": {"image": saved(HALF, "PNG")}}),
    "txt2img": ("/sdapi/v1/txt2img", {"json": A1111 | {"batch_size": 2}}),
    "img2img": ("/sdapi/v1/img2img", {"json": A1111 | {"init_images": [ENCODED], "mask": WHITE, "resize_mode": 1}}),
    "img2img with its picture": ("/sdapi/v1/img2img", {"json": A1111 | {"init_images": [ENCODED], "include_init_images": True}}),
    "extras": ("/sdapi/v1/extra-single-image", {"json": {"image": ENCODED, "upscaler_1": "starter/upscaler"}}),
    "interrogate": ("/sdapi/v1/interrogate", {"json": {"image": ENCODED}}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, miniatures: dict[str, Path]) -> Iterator[Server]:
    overrides = {"models": {"catalogue": catalogue(miniatures)}, "unidiffuser": unidiffuser(miniatures)}
    with serving(tmp_path_factory.mktemp("async"), overrides) as running:
        yield running


def result(server: Server, answer: requests.Response) -> requests.Response:
    assert answer.status_code == 202, answer.text
    assert (answer.headers["preference-applied"], answer.headers["location"]) == ("respond-async", answer.json()["urls"]["self"])
    done = over(server, answer.json())
    assert done["status"] == "succeeded", done
    return server.get(done["urls"]["result"])


@pytest.mark.http
@pytest.mark.parametrize("name", CALLS)
def test_a_jobs_result_is_what_the_route_would_have_answered(server: Server, name: str) -> None:
    path, body = CALLS[name]
    waited, later = server.post(path, **body), result(server, server.post(path, headers=LATER, **body))
    assert waited.status_code == later.status_code == 200, waited.text
    if name == "interrogate":  # its seed is drawn anew
        assert set(later.json()) == {"caption"}
        return
    (had, got) = ({k: v for k, v in answer.json().items() if k not in ("created", "info")} for answer in (waited, later))
    assert got == had
    assert later.headers.get("x-easel-seeds") == waited.headers.get("x-easel-seeds")


@pytest.mark.http
def test_the_pictures_of_such_a_job_can_be_had_alone(server: Server) -> None:
    for path, body in (CALLS["generations"], CALLS["txt2img"], CALLS["extras"]):
        job = over(server, server.post(path, headers=LATER, **body).json())
        assert job["status"] == "succeeded", job
        for output in job["outputs"]:
            file = server.get(output["url"])
            assert file.headers["content-type"] == output["media_type"]
            assert Image.open(io.BytesIO(file.content)).format in ("JPEG", "PNG")


@pytest.mark.http
def test_an_address_of_openais_is_where_its_client_called(server: Server) -> None:
    answer = result(server, server.post("/v1/images/generations", headers=LATER, json=FAST | {"response_format": "url"}))
    url = answer.json()["data"][0]["url"]
    assert url.startswith(server.url)
    assert requests.get(url, timeout=10).status_code == 200


@pytest.mark.http
def test_events_are_sent_though_a_job_was_preferred(server: Server) -> None:
    answer = server.post("/v1/images/generations", headers=LATER, json=FAST | {"stream": True})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert "preference-applied" not in answer.headers
    assert "image_generation.completed" in answer.text


@pytest.mark.http
def test_a_replay_is_a_job_too_and_its_request_is_answered_at_once(server: Server) -> None:
    picture = server.post("/post_config", params=FAST).content
    again = result(server, server.post("/replay", params={"run": "true"}, files={"image": picture}, headers=LATER))
    assert again.content == picture
    at_once = server.post("/replay", files={"image": picture}, headers=LATER)
    assert (at_once.status_code, at_once.json()["source"]) == (200, "easel")
    info = PngInfo()
    info.add_text("parameters", "red apple\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 7, Size: 64x64")
    later = result(server, server.post("/replay", params={"run": "true"}, files={"image": saved(Image.new("RGB", (64, 64)), "PNG", pnginfo=info)}, headers=LATER))
    assert "noise in another way" in later.headers["x-easel-notes"]


@pytest.mark.http
def test_what_is_wrong_is_refused_at_once_in_the_contracts_shape(server: Server) -> None:
    refused = server.post("/v1/images/generations", headers=LATER, json=FAST | {"size": "100000x64"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "size")
    refused = server.post("/sdapi/v1/txt2img", headers=LATER, json=A1111 | {"steps": 100000})
    assert refused.status_code == 422
    assert "steps" in refused.text


@pytest.mark.http
def test_such_requests_have_idempotency_keys_and_are_no_tasks_of_post_jobs(server: Server) -> None:
    path, body = CALLS["edits"]
    first, again = (server.post(path, headers=LATER | {"Idempotency-Key": "edit-1"}, **body) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    for wrong in ("", "x" * 256):  # refused where no job is wanted, too
        assert server.post(path, headers={"Idempotency-Key": wrong}, **body).status_code == 400
        refused = server.post("/caption", headers={"Idempotency-Key": wrong}, files={"image": RED})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert server.get("/jobs?limit=1", key=USER).json()["jobs"][0]["task"] == "openai_edit"
    assert server.post("/jobs", json={"task": "openai_edit", **FAST}).status_code == 422
