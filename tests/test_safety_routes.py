"""No picture and no text passes the safety checker by, whatever its way in or out, and no user key switches it off.

The checker is diffusers' own in miniature, made to flag every picture; texts are those of the starter UniDiffuser.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageSequence

from core import multimodal, upscaling
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models, UniDiffuser
from core.multimodal import CaptionRequest, JointRequest, TextsRequest, TextVariationRequest
from core.plans import Pixels
from core.settings import Safety, Settings
from core.upscaling import UpscaleRequest
from runners.device import Device
from runners.safety import WITHHELD
from tests import miniatures as made
from tests.conftest import ADMIN, Server, serving, unidiffuser
from tests.faces import pixels, png
from tests.test_http import problem
from tests.test_safety import black, checker  # noqa: F401, a fixture

DRAWN = {"prompt": "red apple", "seed": 1, "num_inference_steps": 2}
MINI = {**DRAWN, "model_id": "mini", "width": 128, "height": 128}
SENT = png(Image.new("RGB", (64, 64), "teal"))
CANNY = "starter/controlnet-canny"


@pytest.fixture(scope="module")
def server(miniatures: dict[str, Path], checker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    folder = tmp_path_factory.mktemp("strict")
    torch.manual_seed(0)
    made.save_ip_adapter(UNet2DConditionModel.from_pretrained(miniatures["sd15"] / "unet"), folder / "ip")
    catalogue = [{"id": "starter/stable-diffusion", "family": "starter"}, {"id": "mini", "family": "sd15", "source": str(miniatures["sd15"])}, {"id": "starter/upscaler", "family": "upscaler"}]
    adapter = {"id": "ip", "family": "sd15", "source": str(folder / "ip"), "subfolder": "models", "weight_name": "ip-adapter.safetensors", "image_encoder": "models/image_encoder"}
    overrides = {
        "models": {"catalogue": catalogue, "ip_adapters": [adapter], "cpu_threads": 1},
        "unidiffuser": unidiffuser(miniatures),
        "animation": {"motion_adapters": [{"id": "mini/motion", "source": str(miniatures["motion"])}]},
        "safety": {"mode": "on", "detector": "stable_diffusion", "source": str(checker)},
    }
    with serving(folder, overrides) as running:
        yield running


def of_json(answer: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]


@pytest.mark.http
def test_what_is_drawn_is_looked_at_on_every_route(server: Server) -> None:
    for path, asked in (
        ("/txt2img", {**DRAWN, "hr_scale": 1.5, "hr_steps": 2}),
        ("/txt2img", {**MINI, "dynamic_prompts": True, "count_returned": 2}),
        ("/generate", {"prompt": "x", "num_inference_steps": 2}),
        ("/joint", {"num_inference_steps": 2}),
        ("/image", {"num_inference_steps": 2}),
    ):
        answer = server.post(path, json=asked)
        assert all(map(black, of_json(answer.json()))), path
        assert len(answer.json()["ran"]["flagged"]) == asked.get("count_returned", 1)
    answer = server.post("/v1/images/generations", json={"prompt": "red apple", "num_inference_steps": 2, "response_format": "b64_json"}).json()
    assert black(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB"))
    asked = {**MINI, "num_frames": 4, "seed": 5}
    animation = server.post("/animate", params={**asked, "format": "webp"})
    assert animation.headers["x-easel-flagged"] == "5"
    assert "4 of 4 pictures flagged" in animation.headers["x-easel-notes"]
    frames = list(ImageSequence.Iterator(Image.open(io.BytesIO(animation.content))))
    assert all(black(frame.convert("RGB")) for frame in frames)


@pytest.mark.http
@pytest.mark.parametrize(
    ("path", "part", "asked"),
    [
        ("/post_config", "image", DRAWN),
        ("/img2img", "image", DRAWN),
        ("/txt2img", "control_image", {**DRAWN, "controlnet": CANNY}),
        ("/txt2img", "ip_adapter_image", {**MINI, "ip_adapter": "ip"}),
        ("/outpaint", "image", {**DRAWN, "outpaint_left": 16}),
        ("/upscale", "image", {}),
        ("/img2prompt", "image", {}),
        ("/img2embed", "image", {}),
        ("/caption", "image", {}),
        ("/embed", "image", {}),
        ("/image_variation", "image", {}),
        ("/v1/images/edits", "image", {"prompt": "x"}),
    ],
)
def test_what_is_sent_is_looked_at_on_every_route(server: Server, path: str, part: str, asked: dict) -> None:
    mask = Image.new("RGBA", (64, 64))  # OpenAI's: transparent is repainted
    refused = server.post(path, data=asked, files=[(part, SENT), *([("mask", ("mask.png", png(mask), "image/png"))] if path.startswith("/v1") else [])])
    assert refused.status_code in (400, 422), refused.text
    assert "flag" in refused.text
    if not path.startswith("/v1"):
        body = problem(refused, 422)
        assert body["type"].endswith(":image-flagged")
        assert [e["field"] for e in body["errors"]] == [part]


@pytest.mark.http
@pytest.mark.parametrize("path", ["/post_config", "/txt2img", "/animate", "/prompt2img", "/generate", "/joint", "/image", "/text", "/text_variation", "/v1/images/generations"])
@pytest.mark.parametrize("off", [{"safety": "off"}, {"mode": "off"}, {"safety_checker": "false"}, {"requires_safety_checker": "false"}])
def test_no_route_knows_a_way_to_switch_it_off(server: Server, path: str, off: dict) -> None:
    given = {} if path in ("/joint", "/image", "/text") else {"prompt": "red apple"}
    for sent in ({"json": {**given, **off}}, {"params": {**given, **off}}):
        refused = server.post(path, **sent)
        assert refused.status_code in (400, 422), refused.text
        assert next(iter(off)) in refused.text


@pytest.mark.http
def test_experiments_and_headers_do_not_switch_it_off_either(server: Server) -> None:
    variant = {"name": "a", "settings": {"safety": "off"}}
    body = {"id": "x", "variants": [variant, {**variant, "name": "b"}]}
    problem(server.post("/admin/experiments", json=body), 403)
    assert "safety" in problem(server.post("/admin/experiments", key=ADMIN, json=body), 422)["detail"]
    answer = server.post("/txt2img", json=DRAWN, headers={"X-Easel-Safety": "off", "X-Easel-Flagged": "none"})
    assert all(map(black, of_json(answer.json())))
    assert answer.json()["ran"]["flagged"] == [1]


def test_what_an_upscaler_makes_is_looked_at() -> None:
    models = Models(default="starter/stable-diffusion", catalogue=[Model(id="starter/stable-diffusion", family="starter"), Model(id="starter/upscaler", family="upscaler")], device="cpu", cpu_threads=1)
    settings = Settings(models=models, safety=Safety(mode="on"), unidiffuser=UniDiffuser(allow_unlisted=True))
    device = Device(settings, Catalogue(settings))
    looked: list[tuple[int, int]] = []

    def detector(pictures: list[Image.Image]) -> list[bool]:
        """Flags what is large, so that the picture sent passes."""
        looked.extend(picture.size for picture in pictures)
        return [picture.width > 64 for picture in pictures]

    device.safety._detector = detector
    plan = upscaling.plan(device.catalogue, UpscaleRequest(), pixels(Image.new("RGB", (32, 32), "teal")), "k")
    answer = device.submit(plan, device.fetch(device.catalogue.find("starter/upscaler"))).result(60)
    device.queue.close()
    assert looked == [(32, 32), (128, 128)]
    assert not np.frombuffer(answer.pictures[0].data, np.uint8).any()


@pytest.fixture(scope="module")
def writers() -> Iterator[dict[str, Device]]:
    """The starter UniDiffuser, without a blocklist and with one."""
    models = UniDiffuser(default="starter/unidiffuser", catalogue=[Model(id="starter/unidiffuser", family="unidiffuser", size=64)], device="cpu", cpu_threads=1)
    found = {}
    for name, terms in (("free", []), ("listed", ["apple", "heart*", "face", "button", "the"])):
        settings = Settings(models=Models(allow_unlisted=True), unidiffuser=models, safety=Safety(blocklist=terms))
        found[name] = Device(settings, Catalogue(settings, settings.unidiffuser))
    yield found
    for device in found.values():
        device.queue.close()


def write(device: Device, task: str, request: object, images: list[Pixels]) -> Generation:
    plan = multimodal.plan(device.catalogue, task, request, images, "k")
    return device.submit(plan, device.fetch(device.catalogue.find(None))).result(120)


def test_what_unidiffuser_writes_is_read(writers: dict[str, Device]) -> None:
    """Each text with a term is withheld, and no other one; pictures stay."""
    apple = Image.open("starter/samples.png").convert("RGB").crop((0, 0, 64, 64))
    withheld = 0
    for task, request, images in (
        ("caption", CaptionRequest(seed=1, num_inference_steps=8), [pixels(apple)]),
        ("text_variation", TextVariationRequest(prompt="a red fruit", seed=1, num_inference_steps=8), []),
        ("joint", JointRequest(count_returned=2, seed=1, num_inference_steps=8), []),
        ("text", TextsRequest(count_returned=2, seed=1, num_inference_steps=8), []),
        ("image_variation", JointRequest(seed=1, num_inference_steps=8), [pixels(apple)]),
    ):
        free, listed = (write(device, task, request, images) for device in (writers["free"], writers["listed"]))
        stops = [writers["listed"].safety._words.stops(text) for text in free.texts]
        assert listed.texts == [WITHHELD if stop else text for text, stop in zip(free.texts, stops, strict=True)]
        assert listed.pictures == free.pictures
        told = [note for note in listed.ran.notes if "withheld" in note]
        assert told == ([f"{sum(stops)} of {len(stops)} texts had words that are not allowed here, and were withheld"] if any(stops) else [])
        withheld += sum(stops)
    assert withheld >= 1
