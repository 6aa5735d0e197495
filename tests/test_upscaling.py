"""Upscalers in a runner: networks and diffusion models, tiles without seams, cancelling, memory, and hires-fix."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from api import reading
from core import hires, metadata, upscaling
from core.catalogue import Catalogue
from core.generation import Generation
from core.images import to_pil
from core.model_settings import Model, Models
from core.plans import Hires, Inputs, Pixels, Plan
from core.problems import Problem
from core.settings import ROOT, Settings
from core.tiling import spans
from core.upscaling import UpscaleRequest
from runners import compact, tiling, upscalers
from runners.device import Device
from runners.work import Job
from tests.conftest import held

STARTER = ROOT / "starter/upscaler/emoji_x4.safetensors"
RANDOM = np.random.default_rng(0)


def picture(width: int, height: int) -> Pixels:
    """Smooth shapes with noise on them."""
    y, x = np.mgrid[:height, :width]
    shapes = np.stack([128 + 100 * np.sin(x / 7), 128 + 100 * np.cos(y / 5), 128 + 100 * np.sin((x + y) / 9)], axis=-1)
    return Pixels(width=width, height=height, data=(shapes + RANDOM.integers(0, 20, shapes.shape)).clip(0, 255).astype(np.uint8).tobytes())


def array(pixels: Pixels) -> np.ndarray:
    return np.asarray(to_pil(pixels)).astype(int)


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [
        Model(id="starter/upscaler", family="upscaler", licence="Apache-2.0", commercial_use=True),
        Model(id="in-tiles", family="upscaler", source=str(STARTER), size=64, idle_timeout_s=0.01),
        Model(id="x4", family="sd_x4_upscaler", source=str(miniatures["sd_x4_upscaler"]), size=32),
        Model(id="x2", family="latent_upscaler", source=str(miniatures["latent_upscaler"]), size=64),
        *(Model(id=f, family=f, source=str(miniatures[f])) for f in ("sd15", "sdxl", "flux")),
        Model(id="starter", family="starter", source=str(ROOT / "starter/stable-diffusion")),
    ]
    before = torch.get_num_threads()
    settings = Settings(models=Models(default="starter", catalogue=entries, cpu_threads=1))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(before)


def planned(device: Device, image: Pixels, **values: object) -> Plan:
    return upscaling.plan(device.catalogue, reading.check(UpscaleRequest, values), image, "test")


def run(device: Device, plan: Plan) -> Generation:
    paths = {id: device.fetch(device.catalogue.find(id)) for id in plan.models}
    made = device.submit(plan, paths[plan.model_id], paths).result(120)
    assert made.problem is None, made.problem
    return made


def enlarged(device: Device, image: Pixels, **values: object) -> Generation:
    return run(device, planned(device, image, **values))


def drawn(device: Device, **values: object) -> Generation:
    wanted = reading.parse({"prompt": "red apple", "num_inference_steps": 3, "seed": 1, **values})
    return run(device, device.catalogue.plan(wanted, Inputs(), "test"))


@pytest.mark.parametrize(("length", "tile"), itertools.product((1, 31, 64, 65, 200, 1024), (32, 64, 256)))
def test_tiles_cover_a_side_and_share_what_they_should(length: int, tile: int) -> None:
    starts = spans(length, tile)
    ends = [start + min(tile, length) for start in starts]
    assert starts[0] == 0
    assert ends[-1] == length
    assert all(end - start >= min(32, tile // 4) for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("size", [(70, 64), (150, 97)])
def test_a_picture_in_tiles_is_the_picture_made_at_once(device: Device, size: tuple[int, int]) -> None:
    """No seam: a tile's edge, which the network saw without its surroundings, does not count."""
    image = picture(*size)
    whole, tiled = (enlarged(device, image, model_id=id) for id in ("starter/upscaler", "in-tiles"))
    assert (whole.ran.upscale.tiles, tiled.ran.upscale.tiles > 1) == (1, True)
    assert np.abs(array(whole.pictures[0]) - array(tiled.pictures[0])).max() <= 1


def test_edges_that_disagree_are_blended_evenly() -> None:
    """Each tile gets a grey of its own: between two of them it goes from one to the other without a step."""
    shade = itertools.count(0)

    def grey(tile: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, tile.shape[2] * 2, tile.shape[3] * 2), next(shade) / 10)

    made = tiling.enlarge(grey, np.zeros((100, 300, 3), np.uint8), 2, 128, lambda: None)
    assert made.shape == (200, 600, 3)
    assert made.min() == 0
    assert made.max() == pytest.approx(0.2)
    assert np.abs(np.diff(made, axis=1)).max() < 0.1 / 10


def test_a_large_picture_takes_memory_for_a_tile_at_a_time(device: Device) -> None:
    """The network never sees more than a tile, and the result is 4096x4096."""
    entry = device.catalogue.find("starter/upscaler")
    network = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.network
    sides: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: sides.append(max(inputs[0].shape[2:])))
    stand_in = network.body  # convolutions of a thousand tiles are not the point
    network.body = torch.nn.ModuleList([torch.nn.Conv2d(3, 48, 1)])
    try:
        made = enlarged(device, picture(1024, 1024))
    finally:
        network.body = stand_in
        hook.remove()
    assert (made.pictures[0].width, made.pictures[0].height) == (4096, 4096)
    assert set(sides) == {256}
    assert len(sides) == made.ran.upscale.tiles == 25


def test_a_smaller_factor_or_size_than_the_models(device: Device) -> None:
    image = picture(40, 20)
    for asked, size in (({"scale": 2.5}, (100, 50)), ({"width": 100}, (100, 50)), ({"height": 80}, (160, 80)), ({}, (160, 80)), ({"scale": 1}, (40, 20))):
        made = enlarged(device, image, **asked)
        assert (made.pictures[0].width, made.pictures[0].height) == size == (made.ran.width, made.ran.height)
    small, large = array(enlarged(device, image, scale=2).pictures[0]), array(enlarged(device, image).pictures[0])
    halved = large.reshape(40, 2, 80, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 4


def refusal(device: Device, image: Pixels, **values: object) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        planned(device, image, **values)
    assert caught.value.details.status == 422
    return {error.field: error.message for error in caught.value.details.errors}


def test_what_cannot_be_is_refused_by_name(device: Device) -> None:
    image = picture(40, 20)
    assert refusal(device, image, scale=5) == {"scale": "is more than starter/upscaler does"}
    assert set(refusal(device, image, scale=2, width=80)) == {"width"}
    assert "40 " not in refusal(device, image, width=200)["width"]
    assert "not the picture's shape" in refusal(device, image, width=80, height=80)["height"]
    assert set(refusal(device, image, prompt="x", seed=1, noise_level=3)) == {"prompt", "seed", "noise_level"}
    assert set(refusal(device, image, model_id="x2", noise_level=3)) == {"noise_level"}
    assert "is no upscaler" in refusal(device, image, model_id="starter")["model_id"]
    assert "did you mean 'in-tiles'" in refusal(device, image, model_id="in-tile")["model_id"]
    assert set(refusal(device, image, model_id="in-tiles", commercial=True)) == {"commercial"}
    assert "becomes 4100x4100" in refusal(device, Pixels(width=1025, height=1025, data=bytes(3 * 1025**2)))["image"]
    with pytest.raises(Problem, match="POST /upscale"):
        device.catalogue.plan(reading.parse({"prompt": "x", "model_id": "x4"}), None, "test")


def test_the_starter_is_what_spandrel_makes_of_its_file() -> None:
    """The same file in the library's architecture gives the same picture."""
    entry = Catalogue(Settings(models=Models(allow_unlisted=True, catalogue=[Model(id="starter/upscaler", family="upscaler")]))).find("starter/upscaler")
    theirs = upscalers._spandrel(entry).ModelLoader().load_from_file(STARTER)
    assert (theirs.architecture.id, theirs.scale) == ("Compact", 4)
    ours = upscalers.load(entry, STARTER, torch.float32)
    tile = torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours(tile), theirs.model.float().eval()(tile).clamp(0, 1), atol=1e-5)


def test_an_esrgan_of_the_catalogue_runs_through_spandrel(tmp_path: Path, device: Device) -> None:
    upscalers._spandrel(device.catalogue.find("starter/upscaler"))
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    esrgan = ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2)
    save_file({k: v.clone() for k, v in esrgan.state_dict().items()}, tmp_path / "x2.safetensors")
    entry = Model(id="esrgan", family="upscaler", source=str(tmp_path), scale=2)
    settings = Settings(models=Models(default="starter", catalogue=[Model(id="starter", family="starter"), entry], cpu_threads=1))
    catalogue = Catalogue(settings)
    network = upscalers.load(catalogue.find("esrgan"), upscalers.file_in(tmp_path, catalogue.find("esrgan")), torch.float32)
    assert type(network.network).__name__ == "RRDBNet"
    image = torch.rand(1, 3, 17, 12)
    with torch.inference_mode():
        assert torch.allclose(network(image), esrgan.eval()(image).clamp(0, 1), atol=1e-5)
    for wrong, message in (({"scale": 4}, "2 times as large"), ({"source": str(ROOT / "starter/stable-diffusion/unet")}, "architecture")):
        changed = Catalogue(Settings(models=Models(default="starter", catalogue=[Model(id="starter", family="starter"), entry.model_copy(update=wrong)]))).find("esrgan")
        with pytest.raises(Problem, match=message) as caught:
            upscalers.load(changed, upscalers.file_in(Path(changed.model.source or ""), changed), torch.float32)
        assert caught.value.details.status == 503


def test_weights_of_another_kind_are_not_taken_for_the_starters() -> None:
    state = load_file(STARTER)
    assert compact.from_state(state) is not None
    assert compact.from_state({k: v for k, v in state.items() if k != "body.4.bias"}) is None
    assert compact.from_state({"conv_first.weight": torch.zeros(8, 3, 3, 3)}) is None


@pytest.mark.parametrize(("model", "factor"), [("x4", 4), ("x2", 2)])
def test_diffusion_upscalers_take_a_prompt_steps_and_a_seed(device: Device, model: str, factor: int) -> None:
    image = picture(75, 30)
    asked = {"model_id": model, "prompt": "a (red:1.2) apple", "num_inference_steps": 2, "guidance_scale": 3, "seed": 5}
    first, again, other = (enlarged(device, image, **asked | more) for more in ({}, {}, {"seed": 6}))
    assert (first.pictures[0].width, first.pictures[0].height) == (75 * factor, 30 * factor)
    assert first.pictures == again.pictures != other.pictures
    assert first.pictures != enlarged(device, image, **asked | {"prompt": "night"}).pictures
    ran = first.ran
    assert (ran.num_inference_steps, ran.steps_run, ran.guidance_scale, ran.upscale.tiles > 1) == (2, 2 * ran.upscale.tiles, 3, True)
    assert first.seeds == [5]
    text = metadata.parameters(ran, 5)
    assert text.startswith("a (red:1.2) apple\nSteps: 2, Sampler: ")
    assert f"Postprocess upscale by: {factor}, Postprocess upscaler: {model}" in text


def test_noise_on_the_small_picture_is_the_x4_upscalers_own(device: Device) -> None:
    asked = {"model_id": "x4", "num_inference_steps": 2, "seed": 5}
    usual, more = (enlarged(device, picture(32, 32), **asked | extra) for extra in ({}, {"noise_level": 300}))
    assert usual.pictures != more.pictures
    assert (usual.ran.upscale.noise_level, more.ran.upscale.noise_level) == (20, 300)


@pytest.mark.parametrize(("model", "module", "most"), [("in-tiles", "network", 2), ("x4", "unet", 2)])
def test_a_cancel_stops_between_tiles_and_between_steps(device: Device, model: str, module: str, most: int) -> None:
    plan = planned(device, picture(200, 200), model_id=model, **({"num_inference_steps": 10} if model == "x4" else {}))
    entry = device.catalogue.find(model)
    network = getattr(device.residency.acquire(entry, device.fetch(entry), torch.float32).base, module)
    calls: list[int] = []

    def counted(*_: object) -> None:
        calls.append(1)
        if len(calls) == most:
            device.queue.cancel(plan.id)

    hook = network.register_forward_hook(counted)
    with pytest.raises(Problem) as caught:
        device.submit(plan, device.fetch(entry)).result(60)
    hook.remove()
    assert caught.value.details.status == 499
    assert len(calls) == most


def test_an_upscaler_is_measured_and_unloaded_when_idle(device: Device) -> None:
    enlarged(device, picture(8, 8), model_id="in-tiles")
    entry = device.catalogue.find("in-tiles")
    (warm,) = [m for m in device.residency.snapshot([entry]) if m.model_id == "in-tiles"]
    assert warm.resident_bytes == sum(t.numel() for t in load_file(STARTER).values()) * 4 or warm.state == "cold"
    time.sleep(0.05)
    device.queue.submit(Job("sweep", "test", lambda _: device.residency.sweep(), 30)).result(90)
    assert [m.state for m in device.residency.snapshot([entry]) if m.model_id == "in-tiles"] == ["cold"]


@pytest.mark.parametrize("model", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("upscaler", ["latent", "lanczos", "starter/upscaler"])
def test_hires_draws_over_what_it_enlarged(device: Device, model: str, upscaler: str) -> None:
    side = {"width": 256, "height": 128 if model == "sd15" else 256}
    made = drawn(device, model_id=model, hr_scale=1.5, hr_upscaler=upscaler, hr_steps=3, hr_strength=0.7, scheduler="Euler", **side)
    final = (384, side["height"] * 3 // 2)
    assert (made.pictures[0].width, made.pictures[0].height) == final == (made.ran.width, made.ran.height)
    assert made.ran.steps_run == 3 + 3
    text = metadata.parameters(made.ran, 1)
    assert f"Size: 256x{side['height']}" in text
    assert f"Denoising strength: 0.7, Hires upscale: 1.5, Hires steps: 3, Hires upscaler: {upscaler if '/' in upscaler else upscaler.title()}" in text


def test_hires_keeps_what_the_first_pass_drew(device: Device) -> None:
    """The apple stays where it was, and strength decides how much of it is drawn anew."""
    first = array(drawn(device, num_inference_steps=12).pictures[0])

    def distance(strength: float) -> float:
        made = drawn(device, num_inference_steps=12, hr_scale=2, hr_upscaler="starter/upscaler", hr_strength=strength, hr_steps=4)
        return float(np.abs(array(made.pictures[0]).reshape(64, 2, 64, 2, 3).mean((1, 3)) - first).mean())

    gentle, strong = distance(0.15), distance(0.95)
    assert gentle < 16
    assert gentle < strong / 2


def test_hires_pictures_share_a_batch_and_are_what_they_are_alone(device: Device) -> None:
    asked = {"hr_scale": 2, "hr_upscaler": "lanczos", "hr_steps": 2}
    go = held(device)
    plans = [device.catalogue.plan(reading.parse({"prompt": p, "num_inference_steps": 3, "seed": s, **asked}), None, p) for p, s in (("red apple", 1), ("star", 5))]
    assert plans[0].batch_key == plans[1].batch_key
    path = device.fetch(device.catalogue.find("starter"))
    unet = device.residency.acquire(device.catalogue.find("starter"), path, torch.float32).base.unet
    rows: list[tuple[int, int]] = []
    hook = unet.register_forward_pre_hook(lambda _, args, named: rows.append(tuple((args[0] if args else named["sample"]).shape[::3])), with_kwargs=True)
    futures = [device.submit(plan, path) for plan in plans]
    go.set()
    together = [f.result(120) for f in futures]
    hook.remove()
    assert rows == [(4, 16)] * 3 + [(4, 32)] * 2  # two pictures, with and without the prompt
    for (prompt, seed), made in zip((("red apple", 1), ("star", 5)), together, strict=True):
        alone = drawn(device, prompt=prompt, seed=seed, **asked)
        assert np.abs(array(made.pictures[0]) - array(alone.pictures[0])).max() <= 1
    pair = drawn(device, count_returned=2, seed=4, **asked)
    assert np.abs(array(pair.pictures[1]) - array(together[1].pictures[0])).max() > 1  # another prompt
    assert np.abs(array(pair.pictures[1]) - array(drawn(device, seed=5, **asked).pictures[0])).max() <= 1


def test_hires_that_cannot_be_is_refused_by_name(device: Device) -> None:
    def refused(image: Pixels | None = None, **values: object) -> dict[str, str]:
        with pytest.raises(Problem) as caught:
            device.catalogue.plan(reading.parse({"prompt": "x", **values}), Inputs(image=image), "test")
        return {error.field: error.message for error in caught.value.details.errors}

    assert set(refused(hr_steps=3, hr_strength=0.5, hr_upscaler="latent")) == {"hr_steps", "hr_strength", "hr_upscaler"}
    assert "makes 768x768" in refused(width=256, height=256, hr_scale=3)["hr_scale"]
    assert "did you mean 'lanczos'" in refused(hr_scale=2, hr_upscaler="lancos")["hr_upscaler"]
    assert "no upscaler 'x4'" in refused(hr_scale=2, hr_upscaler="x4")["hr_upscaler"]
    assert set(refused(hr_scale=2, hr_steps=151)) == {"hr_steps"}
    assert set(refused(hr_scale=2, hr_steps=30, hr_strength=0.01)) == {"hr_strength"}
    assert "from a prompt alone" in refused(picture(32, 32), hr_scale=2)["hr_scale"]
    assert set(refused(hr_scale=4.5)) == {"hr_scale"}


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.99), (7, 0.35), (30, 0.7), (20, 1.0), (3, 0.003), (3, 0.7)])
def test_a_second_pass_runs_just_the_steps_it_was_asked_for(steps: int, strength: float, flow: bool) -> None:
    length = hires.schedule(Hires(scale=2, first=(64, 64), width=128, height=128, upscaler="latent", steps=steps, strength=strength), flow)
    assert (math.ceil(length * strength - 1e-9) if flow else min(int(length * strength), length)) == steps
