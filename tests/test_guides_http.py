"""The pictures that guide a drawing, sent by BentoML's client to a real server: as files of its typed calls."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import bentoml
import pytest
import torch
from bentoml.exceptions import BentoMLException
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw

from tests import miniatures as made
from tests.conftest import USER, Server, serving

pytestmark = pytest.mark.http
STARTER = {"prompt": "red apple", "seed": 1, "num_inference_steps": 2}
MINI = {"prompt": "a cat", "model_id": "mini", "seed": 1, "num_inference_steps": 2, "width": 128, "height": 128}
CANNY = {"controlnet": "starter/controlnet-canny", "controlnet_conditioning_scale": 1.5}


@pytest.fixture(scope="module")
def server(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guides-http")
    torch.manual_seed(0)
    made.save_ip_adapter(UNet2DConditionModel.from_pretrained(miniatures["sd15"] / "unet"), folder / "ip")
    catalogue = [{"id": "starter/stable-diffusion", "family": "starter"}, {"id": "mini", "family": "sd15", "source": str(miniatures["sd15"])}]
    adapter = {"id": "ip", "family": "sd15", "source": str(folder / "ip"), "subfolder": "models", "weight_name": "ip-adapter.safetensors", "image_encoder": "models/image_encoder"}
    with serving(folder, {"models": {"catalogue": catalogue, "ip_adapters": [adapter], "cpu_threads": 1}}) as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A red disc, a square's outline, and a mask of the right half."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for name, colour, shape in (("disc", "red", "ellipse"), ("square", "navy", "rectangle"), ("mask", "white", "half")):
        image = Image.new("RGB", (64, 64), "black" if name == "mask" else "white")
        getattr(ImageDraw.Draw(image), shape.replace("half", "rectangle"))((32, 0, 63, 63) if shape == "half" else (16, 16, 48, 48), fill=colour)
        paths[name] = folder / f"{name}.png"
        image.save(paths[name])
    return paths


def test_the_typed_calls_take_a_control_image(server: Server, files: dict[str, Path]) -> None:
    parts = [("control_image", files["square"].read_bytes())]
    image, mask = ("image", files["disc"].read_bytes()), ("mask", files["mask"].read_bytes())
    given = {"image": files["disc"]}
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        for path, kept, sent in (
            ("/txt2img", {}, parts),
            ("/img2img", given, [image, *parts]),
            ("/inpaint", {**given, "mask": files["mask"]}, [image, mask, *parts]),
            ("/outpaint", {**given, "outpaint_left": 16}, [image, *parts]),
        ):
            call = getattr(client, path[1:])
            typed = call(**STARTER, **CANNY, **kept, control_image=[files["square"]])
            plain = call(**STARTER, **kept)
            fields = {name: value for name, value in kept.items() if not isinstance(value, Path)}
            assert typed["images"] == server.post(path, data={**STARTER, **CANNY, **fields}, files=sent).json()["images"]
            assert typed["images"] != plain["images"]
            assert [(c["id"], c["scale"]) for c in typed["ran"]["controls"]] == [("starter/controlnet-canny", 1.5)]
        twice = client.txt2img(**STARTER, controlnet=[CANNY["controlnet"]] * 2, control_image=[files["square"], files["disc"]], preprocessor=["canny", "invert"])
        assert [c["preprocessor"] for c in twice["ran"]["controls"]] == ["canny", "invert"]
        with pytest.raises(BentoMLException, match="control_image: is missing"):
            client.txt2img(**STARTER, **CANNY)


def test_the_typed_calls_take_ip_adapter_images(server: Server, files: dict[str, Path]) -> None:
    parts = [("ip_adapter_image", files[name].read_bytes()) for name in ("disc", "square")]
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        typed = client.txt2img(**MINI, ip_adapter="ip", ip_adapter_scale=0.8, ip_adapter_image=[files["disc"], files["square"]])
        assert typed["images"] == server.post("/txt2img", data={**MINI, "ip_adapter": "ip", "ip_adapter_scale": 0.8}, files=parts).json()["images"]
        assert typed["ran"]["ip_adapter"]["images"] == 2
        for call, more in ((client.img2img, {}), (client.inpaint, {"mask": files["mask"]})):
            guided = call(**MINI, **more, image=files["disc"], ip_adapter="ip", ip_adapter_image=[files["square"]])
            assert guided["images"] != call(**MINI, **more, image=files["disc"])["images"]
        with pytest.raises(BentoMLException, match="ip_adapter_image: is missing"):
            client.txt2img(**MINI, ip_adapter="ip")


def test_an_address_is_no_picture(server: Server) -> None:
    """It is not fetched: refused, as every text where a file belongs."""
    for part in ("control_image", "ip_adapter_image"):
        for sent in ({"json": {**STARTER, part: "http://127.0.0.1:1/x.png"}}, {"data": {**STARTER, part: "http://127.0.0.1:1/x.png"}}):
            refused = server.post("/txt2img", **sent)
            assert refused.status_code == 422
            assert refused.json()["errors"][0] == {"field": part, "message": "must be a file, not text", "allowed": "a multipart file part", "given": "http://127.0.0.1:1/x.png"}


def test_pictures_that_are_none_are_named(server: Server, files: dict[str, Path]) -> None:
    for part, more in (("control_image", CANNY), ("ip_adapter_image", {"ip_adapter": "ip"})):
        refused = server.post("/txt2img", data={**STARTER, **more}, files=[(part, b"no picture")])
        assert refused.status_code == 415
        assert part in refused.json()["detail"]
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    many = server.post("/txt2img", data={**STARTER, **CANNY}, files=[("control_image", small.getvalue())] * 5)
    assert many.status_code == 422
    assert "at most 4 times" in many.json()["errors"][0]["allowed"]
