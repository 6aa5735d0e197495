"""POST /upscale and hires-fix over real HTTP: answers, headers, metadata, refusals, the typed client, and the usage log."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import bentoml
import pytest
import requests
from PIL import Image

from tests.conftest import ADMIN, USER, Server
from tests.test_http import jpeg, picture, problem

pytestmark = pytest.mark.http


def upscale(server: Server, size: tuple[int, int] = (60, 40), accept: str = "*/*", **params: object) -> requests.Response:
    return server.post("/upscale", params=params, files={"image": jpeg(size)}, headers={"Accept": accept})


def test_a_picture_is_answered_four_times_as_large_with_what_ran(server: Server) -> None:
    response = upscale(server)
    made = picture(response)
    assert (made.size, made.format) == ((240, 160), "PNG")
    assert response.headers["x-easel-model"] == "starter/upscaler"
    assert response.headers["x-easel-upscale"] == "60x40;scale=4;tiles=1"
    assert response.headers["x-easel-licence"] == "Apache-2.0"
    assert made.info["parameters"].startswith("Postprocess upscale by: 4, Postprocess upscaler: starter/upscaler, Postprocess upscale to: 240x160")
    record = json.loads(made.info["easel"])
    assert record["upscale"] == {"scale": 4, "first": [60, 40], "tile": 256, "tiles": 1, "noise_level": None}


def test_the_answer_follows_accept_format_and_size(server: Server) -> None:
    assert picture(upscale(server, accept="image/webp", scale=2)).size == (120, 80)
    small, large = (upscale(server, format="jpeg", quality=q, width=180) for q in (20, 95))
    assert (picture(small).format, picture(small).size) == ("JPEG", (180, 120))
    assert len(small.content) < len(large.content)
    body = upscale(server, accept="application/json", model_id="mini/x4", prompt="a cat", num_inference_steps=2, seed=3).json()
    assert Image.open(io.BytesIO(base64.b64decode(body["images"][0]))).size == (240, 160)
    assert (body["seeds"], body["ran"]["num_inference_steps"], body["ran"]["upscale"]["noise_level"]) == ([3], 2, 20)


def test_bad_input_is_told_by_field(server: Server) -> None:
    assert problem(server.post("/upscale"), 422)["errors"][0]["field"] == "image"
    assert problem(upscale(server, scal=2), 422)["errors"][0]["message"] == "unknown parameter, did you mean 'scale'?"
    assert problem(upscale(server, scale=5, prompt="x"), 422)["detail"].count(":") >= 2
    assert problem(upscale(server, model_id="starter/stable-diffusion"), 422)["errors"][0]["allowed"] == ["starter/upscaler", "mini/x4"]
    problem(upscale(server, accept="text/html"), 406)
    problem(server.post("/upscale", files={"image": b"no picture"}), 415)
    problem(server.post("/upscale", data={"image": "http://127.0.0.1/x.png"}), 422)
    assert problem(upscale(server, (2000, 1400)), 422)["errors"][0]["field"] == "image"
    problem(server.post("/post_config", params={"prompt": "x", "model_id": "starter/upscaler"}), 422)


def test_capabilities_and_the_buffer_tell_of_upscalers(server: Server) -> None:
    told = server.get("/capabilities").json()
    upscaler = next(u for u in told["upscalers"] if u["model_id"] == "starter/upscaler")
    assert (upscaler["modes"], upscaler["scale"]["max"], upscaler["pixels"]["max"]) == (["upscale"], 4, 4096**2)
    assert not {m["model_id"] for m in told["models"]} & {u["model_id"] for u in told["upscalers"]}
    assert "starter/upscaler" not in {m["model_id"] for m in server.get("/get_available_stable_diffs").json()["models"]}
    upscale(server)
    warm = next(m for m in server.get("/buffer_status").json()["models"] if m["model_id"] == "starter/upscaler")
    assert (warm["state"], warm["resident_bytes"] > 0, warm["unload_in_s"] > 0) == ("warm", True, True)


def test_upscaled_pictures_are_in_the_usage_log(server: Server) -> None:
    def logged() -> int:
        rows = server.get("/admin/usage", ADMIN, params={"group_by": "model"}).json()["usage"]
        return sum(row["pictures"] for row in rows if row["model"] == "starter/upscaler")

    before = logged()
    upscale(server)
    assert logged() == before + 1


def test_the_python_client_upscales(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.jpg").write_bytes(jpeg((30, 20)))
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        made = client.upscale(image=tmp_path / "small.jpg", scale=3)
        assert made.size == (90, 60)
        drawn = client.txt2img(prompt="star", num_inference_steps=2, hr_scale=2, hr_steps=1)
    assert drawn.ran.width == 128 if hasattr(drawn, "ran") else drawn["ran"]["width"] == 128


def test_hires_over_http_tells_both_passes(server: Server) -> None:
    params = {"prompt": "red apple", "num_inference_steps": 3, "seed": 1, "hr_scale": 2, "hr_upscaler": "starter/upscaler", "hr_steps": 2, "hr_strength": 0.5}
    response = server.post("/post_config", params=params)
    made = picture(response)
    assert made.size == (128, 128)
    assert response.headers["x-easel-hires"] == "64x64;scale=2;upscaler=starter/upscaler;steps=2;strength=0.5"
    assert (response.headers["x-easel-size"], response.headers["x-easel-steps"]) == ("128x128", "5")
    assert "Size: 64x64" in made.info["parameters"]
    assert "Denoising strength: 0.5, Hires upscale: 2, Hires steps: 2, Hires upscaler: starter/upscaler" in made.info["parameters"]
    refused = problem(server.post("/post_config", params={**params, "hr_scale": 4, "width": 256, "height": 256}), 422)
    assert refused["errors"][0]["field"] == "hr_scale"
