"""UniDiffuser over real HTTP: the seed's example calls, answer formats, several pictures, bad input, and the runner alone."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import bentoml
import numpy as np
import pytest
import requests
from PIL import Image

from tests.conftest import ADMIN, Server, serving, unidiffuser, wait_for
from tests.test_bad_input import PICTURES, REFUSED
from tests.test_http import FAST, jpeg, picture, problem

pytestmark = pytest.mark.http
TYPED = ("/generate", "/caption", "/embed", "/joint", "/image", "/text", "/image_variation", "/text_variation")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, miniatures: dict[str, Path]) -> Iterator[Server]:
    """The runner alone, for this machine without keys, unloading after two seconds."""
    overrides = {"unidiffuser": unidiffuser(miniatures, idle_timeout_s=2), "auth": {"mode": "off"}}
    with serving(tmp_path_factory.mktemp("unidiffuser"), overrides, "service:UniDiffuser", env={"API_KEY": "", "ADMIN_API_KEY": ""}) as running:
        yield running


def test_the_seeds_captioning_call_runs_as_written(alone: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    exec(
        """
files = {'image': ('photo.jpg', open('photo.jpg', 'rb'), 'image/jpeg')}
response = requests.post(
    "http://localhost:8000/img2prompt",
    files=files
)
caption = response.text
print(f"Caption: {caption}")
""".replace("http://localhost:8000", alone.url),
        {"requests": requests},
    )
    said = capsys.readouterr().out
    assert said.startswith("Caption: ")
    assert "urn:easel:problem" not in said
    assert len(said) > 20


def test_the_seeds_embedding_call_runs_as_written(alone: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    exec(
        """
files = {'image': ('photo.jpg', open('photo.jpg', 'rb'), 'image/jpeg')}
response = requests.post(
    "http://localhost:8000/img2embed",
    files=files
)
embeddings = response.json()
print(f"CLIP shape: {len(embeddings['CLIP_embeddings'])}")
print(f"VAE shape: {len(embeddings['vae_emb'])}")
""".replace("http://localhost:8000", alone.url),
        {"requests": requests},
    )
    assert capsys.readouterr().out == "CLIP shape: 24\nVAE shape: 256\n"


def test_alone_it_serves_its_own_routes_and_says_who_serves_the_others(alone: Server) -> None:
    assert picture(requests.post(alone.url + "/prompt2img", params={"prompt": "red apple", **FAST}, timeout=60)).size == (64, 64)
    body = problem(requests.post(alone.url + "/post_config", params={"prompt": "x"}, timeout=30), 404)
    assert "service:StableDiffusion" in body["detail"]
    assert requests.get(alone.url + "/buffer_status", timeout=30).json()["service"] == "UniDiffuser"
    assert requests.get(alone.url + "/capabilities", timeout=30).json()["device"] is None


def test_it_unloads_when_idle(alone: Server) -> None:
    def state() -> str:
        return requests.get(alone.url + "/buffer_status", timeout=30).json()["models"][0]["state"]

    assert requests.post(alone.url + "/img2embed", files={"image": jpeg()}, timeout=60).ok
    assert state() == "warm"
    wait_for(lambda: state() == "cold", 15, alone)
    assert requests.post(alone.url + "/img2embed", files={"image": jpeg()}, timeout=60).ok


def test_a_picture_from_a_prompt_answers_as_post_config_does(server: Server) -> None:
    params = {"prompt": "a red heart", "count_returned": 3, "guidance_scale": 5, "data_type": "float32", **FAST}
    response = server.post("/prompt2img", params=params)
    assert picture(response).size == (128, 128)
    assert response.headers["x-easel-seeds"] == "7,8,9"
    assert response.headers["x-easel-model"] == "mini/unidiffuser"
    body = server.post("/prompt2img", params=params, headers={"Accept": "application/json"}).json()
    single = picture(server.post("/prompt2img", json={**params, "count_returned": 1, "seed": 8}))
    both = [np.asarray(i, float) for i in (single, Image.open(io.BytesIO(base64.b64decode(body["images"][1]))))]
    assert np.abs(both[0] - both[1]).max() <= 1
    first, last = single.info["parameters"].split("\n")
    assert first == "a red heart"
    assert last.startswith("Steps: 4, Sampler: DPM++ 2M, CFG scale: 5, Seed: 8, Size: 64x64, Model hash: ")
    assert "Model: mini/unidiffuser" in last
    problem(server.post("/prompt2img", params=params, headers={"Accept": "text/html"}), 406)


def test_captions_of_several_pictures_as_text_and_json(server: Server) -> None:
    pictures = [("image", jpeg(colour=c)) for c in ("orange", "blue")]
    params = {"count_returned": 2, **FAST}
    text = server.post("/img2prompt", files=pictures, params=params)
    assert text.headers["content-type"].startswith("text/plain")
    body = server.post("/img2prompt", files=pictures, params=params, headers={"Accept": "application/json"}).json()
    assert text.text.split("\n") == [c for each in body["captions"] for c in each]
    assert (body["seeds"], [len(c) for c in body["captions"]]) == ([7, 8], [2, 2])
    alone = server.post("/img2prompt", files=pictures[1:], params=FAST)
    assert alone.text == body["captions"][1][0]
    problem(server.post("/img2prompt", files=pictures, headers={"Accept": "image/png"}), 406)


def test_embeddings_as_numbers_base64_and_numpy_are_the_same(server: Server) -> None:
    pictures = [("image", jpeg(colour=c)) for c in ("orange", "blue")]
    one = server.post("/img2embed", files=pictures[:1]).json()
    assert (one["count"], one["CLIP_shape"], one["vae_shape"]) == (1, [24], [4, 8, 8])
    two = server.post("/img2embed", files=pictures).json()
    assert np.allclose(two["CLIP_embeddings"][0], one["CLIP_embeddings"], atol=1e-5)
    coded = server.post("/img2embed", files=pictures, params={"encoding": "base64"}).json()
    response = server.post("/img2embed", files=pictures, headers={"Accept": "application/x-npy"})
    assert response.headers["content-type"] == "application/x-npy"
    rows = np.load(io.BytesIO(response.content))
    assert (rows["CLIP_embeddings"].shape, rows["vae_emb"].shape) == ((2, 24), (2, 4, 8, 8))
    for name in ("CLIP_embeddings", "vae_emb"):
        for i in range(2):
            numbers = np.array(two[name][i])
            assert np.allclose(np.frombuffer(base64.b64decode(coded[name][i]), "<f2"), numbers, rtol=1e-3, atol=1e-3)
            assert np.allclose(rows[name][i].ravel(), numbers, rtol=1e-3, atol=1e-3)
    unit = server.post("/img2embed", files=pictures[:1], params={"normalize": "true"}).json()
    assert np.isclose(np.linalg.norm(unit["CLIP_embeddings"]), 1)
    assert unit["vae_emb"] == one["vae_emb"]


def test_bentomls_client_calls_the_typed_apis(server: Server, tmp_path: Path) -> None:
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path, colour in zip(paths, ("orange", "blue"), strict=True):
        path.write_bytes(jpeg(colour=colour))
    with bentoml.SyncHTTPClient(server.url, token="your-api-key", timeout=120) as client:
        assert client.generate(prompt="red apple", count_returned=2, **FAST)["seeds"] == [7, 8]
        assert len(client.caption(image=paths, **FAST)["captions"]) == 2
        assert client.embed(image=paths[:1])["count"] == 1
        joint = client.joint(count_returned=2, **FAST)
        assert (len(joint["images"]), len(joint["texts"])) == (2, 2)
        assert len(client.image(**FAST)["images"]) == 1
        assert len(client.text(count_returned=2, **FAST)["texts"]) == 2
        varied = client.image_variation(image=paths[0], **FAST)
        assert (len(varied["images"]), len(varied["texts"])) == (1, 1)
        assert len(client.text_variation(prompt="a cat", **FAST)["texts"]) == 1


@pytest.mark.parametrize("route", ["/img2prompt", "/img2embed", "/caption", "/embed", "/image_variation"])
def test_pictures_are_taken_or_refused_as_everywhere(server: Server, route: str) -> None:
    values = {"num_inference_steps": 2} if "embed" not in route else {}
    for data in PICTURES.values():
        assert server.post(route, params=values, files={"image": ("p", data)}).status_code == 200
    for data, status in REFUSED.values():
        problem(server.post(route, files={"image": ("p.png", data, "image/png")}), status)
    assert "image" in problem(server.post(route), 422)["detail"]
    for value in ("http://127.0.0.1:1/x.png", "file:///etc/passwd", ""):
        assert "image" in problem(server.post(route, files={"image": (None, value)}), 422)["detail"]
        assert "image" in problem(server.post(route, json={"image": value}), 422)["detail"]
    problem(server.post(route, data=b"{", headers={"Content-Type": "application/json"}), 400)
    problem(server.post(route, data=b"no boundary", headers={"Content-Type": "multipart/form-data"}), 400)
    problem(server.post(route, data=b"x", headers={"Content-Type": "application/vnd.bentoml+pickle"}), 415)
    problem(server.post(route, files={"imgae": jpeg()}), 422)
    most = 1 if route == "/image_variation" else 16
    assert "image" in problem(server.post(route, files=[("image", jpeg((8, 8)))] * (most + 1)), 422)["detail"]


def test_parameters_are_checked_and_unknown_ones_named(server: Server) -> None:
    def fields(path: str, **params: object) -> list[str]:
        return [e["field"] for e in problem(server.post(path, params=params, files={"image": jpeg()} if "img2" in path else None), 422)["errors"]]

    assert fields("/prompt2img") == ["prompt"]
    assert fields("/prompt2img", prompt="x", negative_prompt="y") == ["negative_prompt"]
    assert fields("/prompt2img", prompt="x", width=128) == ["width"]
    assert fields("/prompt2img", prompt="x", data_type="int8") == ["data_type"]
    assert fields("/img2prompt", guidance_scale="nan") == ["guidance_scale"]
    assert fields("/img2prompt", prompt="x") == ["prompt"]
    assert fields("/img2prompt", model_id="starter/stable-diffusion") == ["model_id"]
    assert fields("/img2embed", encoding="float64") == ["encoding"]
    assert fields("/image", guidance_scale=3) == ["guidance_scale"]
    assert fields("/text_variation", prompt="a\x1bb") == ["prompt"]
    assert "mend its `size`" in problem(server.post("/text", params={"model_id": "mini/of-another-size"}), 503)["detail"]


def test_without_a_key_nothing_is_answered(server: Server) -> None:
    for path in ("/prompt2img?prompt=x", "/img2prompt", "/img2embed", *TYPED, "/internal/run"):
        problem(requests.post(server.url + path, timeout=10), 401)


def test_the_document_has_the_routes(server: Server) -> None:
    document = server.get("/openapi.json").json()
    assert {"/prompt2img", "/img2prompt", "/img2embed", *TYPED} <= set(document["paths"])
    assert {p["name"] for p in document["paths"]["/img2embed"]["post"]["parameters"]} >= {"encoding", "normalize"}


def test_both_runners_report_and_unload(server: Server) -> None:
    server.post("/img2embed", files={"image": jpeg()})
    status = server.get("/buffer_status").json()
    assert [r["service"] for r in status["runners"]] == ["StableDiffusion", "UniDiffuser"]
    mini = next(m for m in status["runners"][1]["models"] if m["model_id"] == "mini/unidiffuser")
    assert (mini["state"], mini["family"]) == ("warm", "unidiffuser")
    assert mini["resident_bytes"] > 1e6
    offer = server.get("/capabilities").json()["unidiffuser"]
    assert offer["default"] == "mini/unidiffuser"
    assert next(m for m in offer["models"] if m["model_id"] == "mini/unidiffuser")["modes"][0] == "generate"
    assert server.post("/admin/unload", key=ADMIN, params={"model_id": "mini/unidiffuser"}).json() == {"unloaded": 1}
    assert requests.get(server.url + "/readyz", timeout=10).json()["runners"] == {"StableDiffusion": "ready", "UniDiffuser": "ready"}


def test_a_client_that_leaves_frees_the_device_and_a_deadline_ends_the_work(server: Server) -> None:
    def running() -> int:
        return server.get("/buffer_status").json()["runners"][1]["queue"]["running"]

    endless = {"num_inference_steps": 150, "count_returned": 16}
    with pytest.raises(requests.ReadTimeout):
        server.post("/joint", params=endless, timeout=1.5)
    wait_for(lambda: running() == 0, 20)
    assert "deadline" in problem(server.post("/joint", params={**endless, "deadline_s": 0.5}), 504)["type"]


def test_captions_are_made_while_pictures_are(server: Server) -> None:
    def running() -> int:
        return server.get("/buffer_status").json()["queue"]["running"]

    def leave() -> None:
        with pytest.raises(requests.ReadTimeout):
            server.post("/post_config", params={"prompt": "x", "num_inference_steps": 150, "count_returned": 16, "width": 256, "height": 256}, timeout=15)

    drawing = threading.Thread(target=leave)
    drawing.start()
    wait_for(lambda: running() == 1, 20)
    assert server.post("/img2prompt", files={"image": jpeg()}, params=FAST, timeout=12).status_code == 200
    assert running() == 1
    drawing.join()
    wait_for(lambda: running() == 0, 20)
