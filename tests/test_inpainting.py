"""Inpainting and outpainting: what the mask keeps is kept to the last bit, and the rest is painted anew."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import bentoml
import numpy as np
import pytest
import requests
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from api import reading
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Inputs, Pixels
from core.problems import Problem
from core.settings import Settings
from runners import inpainting
from runners.device import Device
from tests import miniatures as make
from tests.conftest import USER, Server, held
from tests.test_http import FAST, picture, problem

FILLS = ("fill", "original", "latent noise", "latent nothing")
SMALL = ("starter", "sd15", "sd2", "sdxl", "flux", "nine")


def pixels(image: Image.Image) -> Pixels:
    return Pixels(width=image.width, height=image.height, data=image.convert("RGB").tobytes())


def array(drawn: Pixels) -> np.ndarray:
    return np.frombuffer(drawn.data, np.uint8).reshape(drawn.height, drawn.width, 3)


def noise(width: int, height: int) -> Pixels:
    return Pixels(width=width, height=height, data=np.random.default_rng(3).integers(0, 256, width * height * 3, dtype=np.uint8).tobytes())


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> Pixels:
    white = Image.new("L", (width, height), 0)
    white.paste(255, box)
    return pixels(white)


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    nine = tmp_path_factory.mktemp("nine")
    torch.manual_seed(0)
    StableDiffusionInpaintPipeline(**make._sd(make.sd15().scheduler, in_channels=9).components, requires_safety_checker=False).save_pretrained(nine)
    entries = [Model(id="starter", family="starter", source="starter/stable-diffusion")]
    entries += [Model(id=f, family=f, source=str(miniatures[f])) for f in SMALL[1:-1]]
    entries += [Model(id="nine", family="sd15", source=str(nine), inpainting=True), Model(id="unsaid", family="sd15", source=str(nine))]
    settings = Settings(models=Models(default="starter", catalogue=entries, cpu_threads=1))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, image: Pixels | None, masked: Pixels | None = None, **values: object):
    request = reading.parse({"prompt": "a cat", "model_id": "starter", "seed": 1, "num_inference_steps": 4, **values})
    return device.catalogue.plan(request, Inputs(image=image, mask=masked), str(values.get("seed", "test")))


def draw(device: Device, image: Pixels, masked: Pixels | None = None, **values: object) -> Generation:
    plan = planned(device, image, masked, **values)
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(120)


@pytest.mark.parametrize("model", SMALL)
def test_what_the_mask_keeps_is_kept_to_the_last_bit_and_the_rest_is_painted(device: Device, model: str) -> None:
    """At the model's own size, and at one that it has to round."""
    smallest = device.catalogue.find(model).traits.min_size
    for width, height in ((smallest, smallest), (smallest + 5, smallest + 9)):
        image, box = noise(width, height), (width // 2, 3, width - 1, height)
        drawn = draw(device, image, mask(width, height, box), model_id=model, scheduler="Euler")
        assert (drawn.pictures[0].width, drawn.pictures[0].height) == (width, height)
        before, after = array(image), array(drawn.pictures[0])
        kept = np.ones((height, width), bool)
        kept[box[1] : box[3], box[0] : box[2]] = False
        assert (before[kept] == after[kept]).all()
        assert (before[~kept] != after[~kept]).any(1).mean() > 0.9
        assert drawn.ran.steps_run == 3


def test_every_masked_content_paints_something_of_its_own(device: Device) -> None:
    image, right = noise(64, 64), mask(64, 64, (32, 0, 64, 64))
    drawn = [draw(device, image, right, inpainting_fill=fill).pictures[0] for fill in FILLS]
    assert len({p.data for p in drawn}) == 4
    assert drawn == [draw(device, image, right, inpainting_fill=str(i)).pictures[0] for i in range(4)]


@pytest.mark.parametrize("scheduler", ["Euler a", "DPM++ 2M Karras", "Heun", "DPM2 a", "LCM", "UniPC", "PLMS", "DDIM", "LMS", "SA-Solver"])
def test_every_kind_of_scheduler_paints(device: Device, scheduler: str) -> None:
    image = noise(128, 128)
    drawn = draw(device, image, mask(128, 128, (0, 0, 64, 128)), model_id="sd15", scheduler=scheduler)
    assert drawn.problem is None
    assert (array(drawn.pictures[0])[:, 64:] == array(image)[:, 64:]).all()


def test_a_picture_grows_and_keeps_what_it_was(device: Device) -> None:
    image = noise(64, 48)
    drawn = draw(device, image, outpaint_left=16, outpaint_bottom=7)
    grown = array(drawn.pictures[0])
    assert grown.shape == (55, 80, 3)
    assert (grown[:48, 16:] == array(image)).all()
    assert grown[48:].std() > 10
    assert drawn.ran.inpainting.sides == (16, 0, 0, 7)


def test_only_the_masked_part_is_drawn_at_the_models_size(device: Device) -> None:
    """A large picture keeps its size, and the part around the mask (with its padding) is what the model sees."""
    image, box = noise(400, 300), (300, 20, 340, 60)
    drawn = draw(device, image, mask(400, 300, box), inpaint_full_res=True, inpaint_full_res_padding=8)
    assert drawn.ran.inpainting.box == (292, 12, 348, 68)
    assert "drawn at 64x64 and put back into 400x300" in drawn.ran.notes
    before, after = array(image).copy(), array(drawn.pictures[0]).copy()
    assert (before[20:60, 300:340] != after[20:60, 300:340]).any(2).mean() > 0.9
    before[20:60, 300:340] = after[20:60, 300:340] = 0
    assert (before == after).all()


def test_the_feather_lies_inside_the_mask(device: Device) -> None:
    plan = planned(device, noise(64, 64), mask(64, 64, (32, 0, 64, 64)), mask_blur=3)
    share = np.asarray(inpainting.prepare(plan).share)
    assert share[10, 30:38].tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    sharp = planned(device, noise(64, 64), mask(64, 64, (32, 0, 64, 64)), mask_blur=0)
    assert np.asarray(inpainting.prepare(sharp).share)[10, 30:34].tolist() == [0, 0, 255, 255]


def test_a_thin_mask_reaches_the_latents(device: Device) -> None:
    """A line of one pixel lies between the points at which a mask is usually sampled for the latents."""
    image = noise(64, 64)
    drawn = draw(device, image, mask(64, 64, (33, 0, 34, 64)), mask_blur=0, strength=1)
    assert (array(drawn.pictures[0])[:, 33] != array(image)[:, 33]).any()


def test_a_prompt_repaints_the_half_that_it_may(device: Device) -> None:
    """The starter: the masked half of a red heart becomes blue, the other half stays red."""
    heart = draw(device, None, prompt="red heart", seed=1, num_inference_steps=20).pictures[0]
    for seed in (11, 12):
        drawn = draw(device, heart, mask(64, 64, (32, 0, 64, 64)), prompt="blue heart", seed=seed, num_inference_steps=20).pictures[0]
        flat = [half.reshape(-1, 3).astype(float) for half in (array(drawn)[:, :32], array(drawn)[:, 37:])]
        colours = [half[np.ptp(half, axis=1) > 60].mean(0) for half in flat]
        assert [int(colour.argmax()) for colour in colours] == [0, 2]


def test_alike_requests_share_a_batch_and_get_what_they_get_alone(device: Device) -> None:
    """Whatever their masks: each row has its own."""
    image = noise(64, 64)
    asked = [(mask(64, 64, (32, 0, 64, 64)), {"seed": 1}), (mask(64, 64, (0, 0, 64, 20)), {"seed": 2, "inpainting_fill": "latent noise"})]
    alone = [draw(device, image, m, **more).pictures[0] for m, more in asked]
    resident = device.residency.acquire(device.catalogue.find("starter"), Path(), torch.float32)
    rows: list[int] = []
    hook = resident.base.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]) // 2))
    go = held(device)
    futures = [device.submit(planned(device, image, m, **more), Path()) for m, more in asked]
    go.set()
    try:
        together = [f.result(60).pictures[0] for f in futures]
    finally:
        hook.remove()
    assert set(rows) == {2}
    assert all(np.abs(array(a).astype(int) - array(b)).max() <= 1 for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("image", "masked", "values", "field"),
    [
        (None, mask(64, 64, (0, 0, 9, 9)), {}, "image"),
        (None, None, {"outpaint_left": 8}, "image"),
        (noise(64, 64), mask(64, 64, (0, 0, 0, 0)), {}, "mask"),
        (noise(64, 64), mask(64, 64, (0, 0, 64, 64)), {"inpainting_mask_invert": True}, "mask"),
        (noise(64, 64), mask(64, 32, (0, 0, 9, 9)), {}, "mask"),
        (noise(64, 64), None, {"mask_blur": 3}, "mask_blur"),
        (noise(64, 64), None, {"inpainting_fill": "fill"}, "inpainting_fill"),
        (noise(64, 64), None, {"inpainting_mask_invert": True, "outpaint_top": 8}, "inpainting_mask_invert"),
        (noise(64, 64), mask(64, 64, (0, 0, 9, 9)), {"inpaint_full_res_padding": 8}, "inpaint_full_res_padding"),
        (noise(64, 64), mask(64, 64, (0, 0, 9, 9)), {"mask_blur": 65}, "mask_blur"),
        (noise(64, 64), mask(64, 64, (0, 0, 9, 9)), {"inpainting_fill": "blue"}, "inpainting_fill"),
        (noise(64, 64), None, {"outpaint_left": 4096, "outpaint_top": 4096, "count_returned": 16}, "count_returned"),
        (None, None, {"model_id": "nine"}, "mask"),
        (noise(64, 64), None, {"model_id": "nine"}, "mask"),
    ],
)
def test_what_cannot_be_inpainted_is_refused_by_its_field_name(device: Device, image: Pixels | None, masked: Pixels | None, values: dict, field: str) -> None:
    with pytest.raises(Problem) as caught:
        planned(device, image, masked, **values)
    assert caught.value.details.status == 422
    assert [e.field for e in caught.value.details.errors] == [field]


def test_an_inpainting_model_that_is_not_listed_as_one_says_so(device: Device) -> None:
    with pytest.raises(Problem, match="inpainting: true") as caught:
        draw(device, None, model_id="unsaid")
    assert caught.value.details.status == 503


# Over HTTP.


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.http
def test_a_mask_with_post_config_repaints_and_is_told(server: Server, tmp_path: Path) -> None:
    rgb = Image.frombytes("RGB", (70, 50), noise(70, 50).data)
    white = Image.new("L", (140, 100), 0)
    white.paste(255, (0, 0, 40, 100))
    files = {"image": png(rgb), "mask": png(white)}
    response = server.post("/post_config", params={"prompt": "red apple", "inpainting_fill": "fill", **FAST}, files=files)
    drawn = picture(response)
    assert drawn.size == (70, 50)
    assert (np.asarray(drawn)[:, 20:] == np.asarray(rgb)[:, 20:]).all()
    assert (np.asarray(drawn)[:, :20] != np.asarray(rgb)[:, :20]).any()
    assert "Denoising strength: 0.75, Mask blur: 4, Masked content: fill" in drawn.info["parameters"]
    assert "resized from 140x100 to 70x50" in response.headers["x-easel-notes"]
    # The typed API, by BentoML's client, and without a mask: what is transparent is repainted.
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.eval(white.resize((70, 50), Image.Resampling.NEAREST), lambda v: 255 - v))
    for name, data in (("image.png", files["image"]), ("mask.png", files["mask"])):
        (tmp_path / name).write_bytes(data)
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        typed = client.inpaint(prompt="red apple", image=tmp_path / "image.png", mask=tmp_path / "mask.png", inpainting_fill="fill", **FAST)
    by_alpha = server.post("/inpaint", data={"prompt": "red apple", "inpainting_fill": "fill", **FAST}, files={"image": png(clear)}).json()
    singles = [np.asarray(Image.open(io.BytesIO(base64.b64decode(body["images"][0])))) for body in (typed, by_alpha)]
    assert (singles[0] == np.asarray(drawn)).all()
    assert (singles[1][:, 20:] == np.asarray(rgb)[:, 20:]).all()
    assert typed["ran"]["inpainting"]["fill"] == "fill"


@pytest.mark.http
def test_bad_masks_are_problems(server: Server) -> None:
    plain = png(Image.new("RGB", (64, 64), "red"))
    see_through = png(Image.new("RGBA", (64, 64), (255, 255, 255, 90)))

    def refused(path: str, status: int, **files: bytes) -> str:
        return problem(server.post(path, data={"prompt": "x", **FAST}, files=files), status)["detail"]

    assert "transparent" in refused("/post_config", 422, image=plain, mask=see_through)
    assert "mask is not a picture" in refused("/post_config", 415, image=plain, mask=b"no picture at all")
    assert "image" in refused("/post_config", 422, mask=plain)
    assert "nothing of image is transparent" in refused("/inpaint", 422, image=plain)
    problem(server.post("/inpaint", json={"prompt": "x"}), 422)
    problem(server.post("/inpaint", json={"prompt": "x", "mask": "http://127.0.0.1:1/x.png"}), 422)
    assert requests.get(server.url + "/readyz", timeout=10).ok
