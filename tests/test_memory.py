"""Memory: what a request needs is estimated before it is queued, running out of it is survived, and both say what would fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from api import answering, reading
from bench import memory as bench
from core import animation
from core.animation import AnimationRequest
from core.catalogue import Catalogue
from core.families import FAMILIES
from core.generation import Generation
from core.model_settings import Animation, ControlNet, IpAdapter, Model, Models, UniDiffuser
from core.optimising import Optimise
from core.plans import Inputs, Pixels, Plan
from core.problems import Problem
from core.settings import Loras, Settings
from runners import memory
from runners.device import Device
from runners.memory import Request, Way
from tests import lora_files
from tests import miniatures as made
from tests.test_control import controlnet
from tests.test_optimising import levels

MIB = 2**20


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [Model(id=f, family=f, source=str(miniatures[f])) for f in ("sd15", "sdxl", "flux")]
    entries.append(Model(id="starter/stable-diffusion", family="starter"))
    made = make(Models(default="sd15", catalogue=entries, cpu_threads=1))
    yield made
    made.queue.close()


def make(models: Models) -> Device:
    settings = Settings(models=models)
    return Device(settings, Catalogue(settings))


def plan(device: Device, model: str, **values: object) -> Plan:
    side = FAMILIES[device.catalogue.find(model).model.family].min_size
    wanted = {"prompt": "a cat", "model_id": model, "seed": 1, "num_inference_steps": 2, "width": side, "height": side, **values}
    return device.catalogue.plan(reading.parse(wanted), Inputs(), "test")


def draw(device: Device, model: str, **values: object) -> Generation:
    return device.submit(plan(device, model, **values), device.fetch(device.catalogue.find(model))).result(120)


def denoiser(device: Device, model: str) -> torch.nn.Module:
    entry = device.catalogue.find(model)
    pipe = device.residency.acquire(entry, device.fetch(entry), torch.float32).base
    return pipe.transformer if model == "flux" else pipe.unet


def vae(device: Device, model: str) -> torch.nn.Module:
    entry = device.catalogue.find(model)
    return device.residency.acquire(entry, device.fetch(entry), torch.float32).base.vae


def failing_above(module: torch.nn.Module, limit: Callable[[Any], bool]) -> Any:
    """Let a module run out of memory for inputs that are too large."""

    def check(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not limit(args[0] if args else kwargs["hidden_states"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    return module.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("model", ["starter/stable-diffusion", "sdxl", "flux"])
def test_a_denoiser_out_of_memory_goes_on_with_less_and_the_next_request_as_usual(device: Device, model: str) -> None:
    size = {"width": 64, "height": 64, "num_inference_steps": 4} if model.startswith("starter") else {}
    usual = draw(device, model, count_returned=2, **size)
    assert usual.ran.degraded is None
    rows = 1 if model == "flux" else 2  # guidance doubles the others'
    hook = failing_above(denoiser(device, model), lambda latents: latents.shape[0] <= rows)
    try:
        short = draw(device, model, count_returned=2, **size)
    finally:
        hook.remove()
    assert "1 at a time instead of 2" in short.ran.degraded
    assert answering.describe(short.ran, short.seeds)["X-Easel-Degraded"] == short.ran.degraded
    assert short.seeds == usual.seeds
    if size:  # no larger than a tile, so that it is the same picture
        assert max(levels(a, b) for a, b in zip(short.pictures, usual.pictures, strict=True)) <= 1
    again = draw(device, model, count_returned=2, **size)
    assert again.pictures == usual.pictures
    assert again.ran.degraded is None


def test_a_vae_out_of_memory_decodes_in_tiles(device: Device) -> None:
    usual = draw(device, "sd15", num_inference_steps=1, width=256, height=256)
    decoder, tile = vae(device, "sd15").decoder, vae(device, "sd15").tile_latent_min_size
    hook = failing_above(decoder, lambda latents: latents.shape[0] == 1 and latents.shape[-1] <= tile)
    try:
        short = draw(device, "sd15", num_inference_steps=1, width=256, height=256, count_returned=2)
    finally:
        hook.remove()
    assert "VAE sliced and tiled" in short.ran.degraded
    assert [(p.width, p.height) for p in short.pictures] == [(256, 256)] * 2
    assert draw(device, "sd15", num_inference_steps=1, width=256, height=256).pictures == usual.pictures


@pytest.mark.parametrize("part", [denoiser, vae])
def test_a_request_that_nothing_helps_gets_a_507_that_says_what_would_fit(device: Device, part: Callable[..., torch.nn.Module]) -> None:
    usual = draw(device, "sd15")
    module = part(device, "sd15")
    hook = failing_above(getattr(module, "decoder", module), lambda _: False)
    try:
        with pytest.raises(Problem) as caught:
            draw(device, "sd15", width=512, height=256, count_returned=2, num_inference_steps=1)
    finally:
        hook.remove()
    assert caught.value.details.status == 507
    width, height = map(int, re.search(r"(\d+)x(\d+), count_returned 1", caught.value.details.detail).groups())
    assert width * height <= 512 * 256 / 2
    assert width / height == pytest.approx(2, rel=0.1)
    assert draw(device, "sd15").pictures == usual.pictures  # the worker lives, and draws as before
    assert draw(device, "sd15", width=width, height=height, num_inference_steps=1).pictures


def test_another_error_is_not_taken_for_want_of_memory(device: Device) -> None:
    hook = denoiser(device, "sd15").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(device, "sd15")
    hook.remove()
    hook = denoiser(device, "sd15").register_forward_pre_hook(lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        draw(device, "sd15")
    hook.remove()


def test_a_request_beyond_the_budget_is_refused_before_it_is_queued_and_what_it_is_told_fits(miniatures: dict[str, Path]) -> None:
    source = str(miniatures["sd15"])
    tight = make(Models(default="m", catalogue=[Model(id="m", family="sd15", source=source)], cpu_threads=1, memory_budget_bytes=220 * MIB))
    try:
        with pytest.raises(Problem) as caught:
            tight.submit(plan(tight, "m", width=1024, height=1024), Path(source))
        problem = caught.value.details
        assert problem.status == 507
        assert "220 MiB are allowed" in problem.detail
        side = int(re.search(r"(\d+)x\d+, count_returned 1", problem.detail)[1])
        assert 256 <= side < 1024
        assert draw(tight, "m", width=side, height=side, num_inference_steps=1).pictures
        # Several small ones fit in turns, and that is told; a single one runs as usual.
        several = draw(tight, "m", width=256, height=256, num_inference_steps=1, count_returned=4)
        assert "at a time instead of 4" in several.ran.degraded
        assert several.pictures[0] == draw(tight, "m", width=256, height=256, num_inference_steps=1).pictures[0]
    finally:
        tight.queue.close()


def test_other_models_make_room_for_what_a_large_picture_computes(miniatures: dict[str, Path]) -> None:
    entries = [Model(id=n, family="sd15", source=str(miniatures["sd15"])) for n in "ab"]
    home = make(Models(default="a", catalogue=entries, cpu_threads=1, memory_budget_bytes=57 * MIB))
    try:
        draw(home, "a", num_inference_steps=1)
        draw(home, "b", num_inference_steps=1)
        assert {m.model_id for m in home.residency.snapshot([])} == {"a", "b"}
        draw(home, "b", num_inference_steps=1, width=136, height=136)
        assert {m.model_id for m in home.residency.snapshot([])} == {"b"}
    finally:
        home.queue.close()


@pytest.fixture(scope="module")
def furnished(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """SD 1.5 with one of everything that may stand beside a model."""
    folder, sd15 = tmp_path_factory.mktemp("beside"), miniatures["sd15"]
    controlnet("sd15", sd15, folder / "net")
    made.save_ip_adapter(UNet2DConditionModel.from_pretrained(sd15 / "unet"), folder / "ip")
    pipe = DiffusionPipeline.from_pretrained(sd15, safety_checker=None, requires_safety_checker=False)
    lora_files.write(folder / "lora.safetensors", lora_files.kohya_layout(lora_files.matrices(pipe)))
    listed = {"model_id": None, "base_model": "sd15", "lora_path": "https://example.org/lora", "trigger words": [], "allow_no_mention": True, "usage_rights": "None", "file_name": "lora.safetensors"}
    (folder / "loras.json").write_text(json.dumps({"lora": listed}))
    models = Models(
        default="sd15", cpu_threads=1, catalogue=[Model(id="sd15", family="sd15", source=str(sd15)), Model(id="starter/upscaler", family="upscaler")],
        controlnets=[ControlNet(id="net", family="sd15", source=str(folder / "net"))],
        ip_adapters=[IpAdapter(id="ip", family="sd15", source=str(folder / "ip"), subfolder="models", weight_name="ip-adapter.safetensors", image_encoder="models/image_encoder")],
    )  # fmt: skip
    animated = Animation(motion_adapters=[{"id": "motion", "source": str(miniatures["motion"])}])
    settings = Settings(models=models, animation=animated, loras=Loras(registry=folder / "loras.json", folder=folder))
    home = Device(settings, Catalogue(settings))
    yield home
    home.queue.close()


@pytest.mark.parametrize(
    ("name", "values"),
    [("lora", {"lora": "lora"}), ("net", {"controlnet": "net"}), ("ip", {"ip_adapter": "ip"}), ("motion", {"num_frames": 2}), ("starter/upscaler", {"hr_scale": 1.5, "hr_upscaler": "starter/upscaler"})],
)
def test_what_stands_beside_a_model_is_estimated_and_made_room_for(furnished: Device, name: str, values: dict[str, object]) -> None:
    home, picture = furnished, Pixels(width=64, height=64, data=bytes(3 * 64 * 64))
    inputs = Inputs(control_image=[picture] if name == "net" else [], ip_adapter_image=[picture] if name == "ip" else [])
    wanted = {"prompt": "a cat", "model_id": "sd15", "seed": 1, "num_inference_steps": 2, "width": 128, "height": 128, **values}
    if name == "motion":
        asked = animation.plan(home.catalogue, reading.check(AnimationRequest, wanted), "test")
    else:
        asked = home.catalogue.plan(reading.parse(wanted), inputs, "test")
    home.fetch_guides(asked)
    paths = {id: home.fetch(home.catalogue.find(id)) for id in asked.models} | ({"motion": home.fetch_motion(asked)} if asked.animation else {})

    def draw(budget: int) -> Generation:
        before, home.residency.budget = home.residency.budget, budget
        try:
            return home.submit(asked, paths["sd15"], paths).result(60)
        finally:
            home.residency.budget = before

    home.unload(None).result(90)
    resident = home.residency.acquire(home.catalogue.find("sd15"), paths["sd15"], torch.float32)
    alone = home.residency.resident_bytes
    draw(home.residency.budget)
    ((_, estimated),) = home._beside(asked, paths, torch.float32).items()
    resident.remembered.clear()  # it goes by itself where memory is short
    assert estimated == pytest.approx(home.residency.resident_bytes - alone, rel=0.02)
    assert not home._beside(asked, paths, torch.float32).keys() - home.residency.present(resident.entry, torch.float32)
    # A byte less than is estimated, and it does not run as usual.
    wanted_memory = home._request([asked], paths)
    usual = memory.ways(wanted_memory, may_offload=False)[0]
    needs = memory.needed(wanted_memory, usual)
    assert needs - memory.needed(replace(wanted_memory, beside=0), usual) == estimated
    assert draw(needs).ran.degraded is None
    try:
        assert draw(needs - 1).ran.degraded
    except Problem as short:
        assert short.details.status == 507
    with pytest.raises(Problem, match=r"of it for the LoRAs, ControlNets, adapters") as caught:
        draw(memory.weights_in_use(wanted_memory, usual) - 1)
    assert caught.value.details.status == 503


def request(family: str, tmp_path: Path, rows: int = 4, side: int = 1024, dtype: torch.dtype = torch.float16, **optimise: object) -> Request:
    model = Model(id="m", family=family, source=str(tmp_path), optimise=Optimise(**optimise))
    models = (UniDiffuser if family == "unidiffuser" else Models)(default="m", catalogue=[model])
    return Request(Catalogue(Settings(), models).find("m"), tmp_path, dtype, side, side, rows, family != "flux", False)


def test_each_way_to_run_needs_less_than_the_one_before(tmp_path: Path) -> None:
    for family in ("sd15", "sd2", "sdxl", "flux"):
        wanted = request(family, tmp_path)
        needs = [memory.needed(wanted, way) for way in memory.ways(wanted, may_offload=True)]
        assert needs == sorted(needs, reverse=True)
        assert len(set(needs)) >= 4


def test_weights_are_counted_where_they_are_while_they_are_used(miniatures: dict[str, Path]) -> None:
    def at(family: str, way: Way | None = None, **optimise: object) -> int:
        return memory.weights_in_use(request(family, miniatures[family], **optimise), way or Way(1))

    wanted = request("sdxl", miniatures["sdxl"])
    assert memory.weights_at_rest(wanted.entry, wanted.path, wanted.dtype) == at("sdxl")
    assert at("sdxl") > at("sdxl", offload="model") > at("sdxl", offload="group") > 0
    assert at("sdxl", Way(1, thrifty=True, offload=True)) == at("sdxl", offload="model")
    assert at("flux") / 2 < at("flux", quantisation="int8") < at("flux")
    offloaded = request("sdxl", miniatures["sdxl"], offload="model")
    assert memory.weights_at_rest(offloaded.entry, offloaded.path, offloaded.dtype) == 0
    assert not any(way.offload for way in memory.ways(offloaded, may_offload=True))


@pytest.mark.parametrize("family", ["starter", "sd15"])
def test_the_coefficients_are_what_the_architectures_take(family: str) -> None:
    with bench.FakeTensorMode():
        denoise, config, side = bench.FAMILIES[family]
        counted = [f() / 4 / side**2 for f in (lambda: denoise(1, side), lambda: bench.vae(config, 1, side), lambda: bench.vae(config, 1, side, encode=True))]
        kept = bench.kept(bench.UNETS[family])
    known = memory.ACTIVATIONS[family]
    assert counted == pytest.approx([known.denoise, known.decode, known.encode], rel=0.05)
    assert kept == known.texts
