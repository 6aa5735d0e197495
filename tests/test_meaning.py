"""The starter draws what it is told: colours, names, layouts, seeds and negative prompts have an effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import pytest
from PIL import Image

from api import reading
from core import preprocessing, schedulers
from core.catalogue import Catalogue
from core.generation import Generation
from core.images import encode, to_pil
from core.model_settings import ControlNet, Model, Models
from core.plans import Inputs, Pixels
from core.settings import Settings
from runners.device import Device

CANNY = ControlNet(id="starter/controlnet-canny", family="starter", preprocessor="canny")
SETTINGS = Settings(models=Models(default="starter/stable-diffusion", catalogue=[Model(id="starter/stable-diffusion", family="starter")], controlnets=[CANNY]))


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device(SETTINGS, Catalogue(SETTINGS))
    yield made
    made.queue.close()


def draw(device: Device, image: Pixels | None = None, mask: Pixels | None = None, control: Sequence[Pixels] = (), **values: object) -> Generation:
    plan = device.catalogue.plan(reading.parse({"seed": 1, **values}), Inputs(image=image, mask=mask, control_image=list(control)), "test")
    device.fetch_guides(plan)
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(120)


def array(pixels: Pixels) -> np.ndarray:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3).astype(float)


def coloured(pixels: Pixels) -> np.ndarray:
    """The mean colour of what is not near white or grey."""
    flat = array(pixels).reshape(-1, 3)
    return flat[flat.max(1) - flat.min(1) > 60].mean(0)


@pytest.mark.parametrize(("prompt", "strongest"), [("red apple", 0), ("red heart", 0), ("green apple", 1), ("green heart", 1), ("blue heart", 2)])
def test_a_named_colour_is_the_pictures_colour(device: Device, prompt: str, strongest: int) -> None:
    pictures = draw(device, prompt=prompt, count_returned=4).pictures
    hits = [int(coloured(p).argmax()) == strongest for p in pictures]
    assert sum(hits) >= 3


PICKED = [n for n in schedulers.names() if schedulers.find(n).schedule is None or schedulers.find(n).sampler == "Euler"]


@pytest.fixture(scope="module")
def usual(device: Device) -> Pixels:
    """The red apple by the model's own scheduler."""
    return draw(device, prompt="red apple", seed=3, num_inference_steps=20).pictures[0]


@pytest.mark.parametrize("name", PICKED)
def test_every_scheduler_draws_the_red_apple(device: Device, usual: Pixels, name: str) -> None:
    """The starter predicts v: a scheduler that reads it wrongly, or clips its latents, draws noise."""
    picture = draw(device, prompt="red apple", seed=3, num_inference_steps=20, scheduler=name).pictures[0]
    assert int(coloured(picture).argmax()) == 0
    assert np.corrcoef(array(picture).ravel(), array(usual).ravel())[0, 1] > 0.7


def test_the_same_seed_gives_the_same_bytes(device: Device) -> None:
    first, again, other = (draw(device, prompt="red apple", seed=s).pictures[0] for s in (5, 5, 6))
    assert encode(first, "png") == encode(again, "png")
    assert first.data != other.data


def test_pictures_of_one_request_equal_those_of_their_seeds_alone(device: Device) -> None:
    """To 2 of 255 levels: a CPU's batched kernels add in another order."""
    together = draw(device, prompt="pizza", seed=30, count_returned=4).pictures
    for i, picture in enumerate(together):
        alone = draw(device, prompt="pizza", seed=30 + i).pictures[0]
        assert np.abs(array(picture) - array(alone)).max() <= 2


def test_a_negative_prompt_and_guidance_change_the_picture(device: Device) -> None:
    plain = draw(device, prompt="heart", seed=3).pictures[0].data
    assert draw(device, prompt="heart", negative_prompt="red", seed=3).pictures[0].data != plain
    assert draw(device, prompt="heart", guidance_scale=1, seed=3).pictures[0].data != plain


def silhouette(picture: Pixels) -> np.ndarray:
    """Where something stands on the white ground."""
    return array(picture).min(2) < 220


def test_a_low_strength_keeps_the_layout_and_full_strength_does_not(device: Device) -> None:
    """By the overlap of the silhouettes: the share of what either covers that both cover."""
    source = draw(device, prompt="red apple", seed=2).pictures[0]
    before = silhouette(source)
    drawn = (silhouette(draw(device, source, prompt="bicycle", strength=s, seed=3).pictures[0]) for s in (0.3, 1.0))
    kept, redrawn = ((before & after).sum() / (before | after).sum() for after in drawn)
    assert kept > 0.7
    assert redrawn < 0.5


def overlap(wanted: Pixels, drawn: Pixels, left: int = 0) -> float:
    """How well the edges of two pictures lie on each other right of column `left`: F1, with a tolerance of one pixel at 64x64."""
    edges = [np.asarray(preprocessing.run("canny", to_pil(p)))[:, left:, 0] for p in (wanted, drawn)]
    wide = [cv2.dilate(e, np.ones((drawn.width // 32 + 1, drawn.width // 32 + 1), np.uint8)) > 0 for e in edges]
    precision, recall = wide[0][edges[1] > 0].mean(), wide[1][edges[0] > 0].mean()
    return float(2 * precision * recall / (precision + recall))


def elsewhere(picture: Pixels, side: int) -> Pixels:
    """What is in the picture, mirrored, turned, smaller and in a corner, at another size: so that a prompt does not tell where it is."""
    turned = to_pil(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(20, Image.Resampling.BICUBIC, fillcolor="white")
    moved = Image.new("RGB", (64, 64), "white")
    moved.paste(turned.resize((44, 44), Image.Resampling.BICUBIC), (18, 4))
    moved = moved.resize((side, side), Image.Resampling.LANCZOS)
    return Pixels(width=side, height=side, data=moved.tobytes())


def test_what_is_painted_into_a_mask_follows_the_edges_that_are_given(device: Device) -> None:
    star = draw(device, prompt="star", num_inference_steps=12).pictures[0]
    right = Pixels(width=64, height=64, data=(b"\0" * 96 + b"\xff" * 96) * 64)
    for prompt in ("red apple", "pizza"):
        wanted = elsewhere(draw(device, prompt=prompt, seed=51, num_inference_steps=12).pictures[0], 64)
        painting = {"prompt": prompt, "seed": 10, "strength": 1, "num_inference_steps": 12}
        free = draw(device, star, right, **painting).pictures[0]
        followed = draw(device, star, right, [wanted], controlnet=CANNY.id, **painting).pictures[0]
        assert (array(followed)[:, :32] == array(star)[:, :32]).all()
        assert overlap(wanted, followed, 34) > 0.7
        assert overlap(wanted, followed, 34) > overlap(wanted, free, 34) + 0.1


def test_both_passes_of_hires_follow_the_edges_that_are_given(device: Device) -> None:
    wanted = elsewhere(draw(device, prompt="red heart", num_inference_steps=12).pictures[0], 128)
    asked = {"prompt": "blue heart", "num_inference_steps": 12, "hr_scale": 2, "hr_upscaler": "lanczos", "hr_steps": 6}
    free = draw(device, **asked).pictures[0]
    followed = draw(device, control=[wanted], controlnet=CANNY.id, **asked).pictures[0]
    assert followed.width == 128
    assert overlap(wanted, followed) > overlap(wanted, free) + 0.2
    assert int(coloured(followed).argmax()) == 2


def test_other_sizes_give_a_picture(device: Device) -> None:
    picture = draw(device, prompt="red apple", width=96, height=64).pictures[0]
    assert (picture.width, picture.height) == (96, 64)
    assert array(picture).std() > 20


def test_weights_and_long_prompts_reach_the_model(device: Device) -> None:
    plain = draw(device, prompt="red apple and blue heart").pictures[0].data
    weighted = draw(device, prompt="red apple and (blue heart:1.6)")
    assert weighted.pictures[0].data != plain
    filler = "very nice, " * 60
    late = [draw(device, prompt=filler + end) for end in ("red heart", "blue heart")]
    assert late[0].ran.prompt_tokens > 150
    assert late[0].ran.prompt_tokens_cut == 0
    assert late[0].pictures[0].data != late[1].pictures[0].data


def test_what_ran_is_told(device: Device) -> None:
    ran = draw(device, prompt="star", scheduler="euler_ancestral", num_inference_steps=5, torch_dtype="float16").ran
    assert (ran.scheduler, ran.steps_run, ran.torch_dtype) == ("Euler a", 5, "float32")
    assert "no fast float16" in ran.notes[0]
