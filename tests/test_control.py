"""ControlNets and IP-Adapters: each family's miniature through the real diffusers classes, alone, together, and in requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pydantic import ValidationError

from core import preprocessing
from core.catalogue import Catalogue
from core.generation import Generation
from core.images import to_pil
from core.model_settings import ControlNet, IpAdapter, Model, Models, UniDiffuser
from core.plans import Inputs, Pixels, Plan, PlannedLora
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Settings
from runners import control
from runners.device import Device
from tests import lora_files
from tests import miniatures as made
from tests.conftest import Server, held

FAMILIES = ("sd15", "sd2", "sdxl", "flux")
SIDE = {"nine": 128, "sd15": 128, "sd2": 128, "sdxl": 256, "flux": 256}


def pixels(seed: int, width: int = 128, height: int = 128) -> Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    return Pixels(width=width, height=height, data=image.tobytes())


DRAWING, OTHER = pixels(1), pixels(2)


def controlnet(family: str, miniature: Path, folder: Path) -> None:
    """A ControlNet for a miniature, its zero convolutions filled so that it acts."""
    if family == "flux":
        transformer = FluxTransformer2DModel.from_pretrained(miniature / "transformer")
        net = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, load_weights_from_transformer=False)
        zero = [*net.controlnet_blocks.parameters(), *net.controlnet_single_blocks.parameters(), *net.controlnet_x_embedder.parameters()]
    else:
        unet = UNet2DConditionModel.from_pretrained(miniature / "unet")
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 16, 16))
        zero = [*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters(), *net.controlnet_cond_embedding.conv_out.parameters()]
    for parameter in zero:
        torch.nn.init.normal_(parameter, std=0.5)
    net.save_pretrained(folder)


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("guides")
    torch.manual_seed(0)
    nets, adapters = [], []
    for family in FAMILIES:
        for name in ("a", "b"):
            path = folder / f"{family}-{name}"
            controlnet(family, miniatures[family], path)
            nets.append(ControlNet(id=f"{family}-{name}", family=family, source=str(path), preprocessor="canny" if name == "a" else "none", commercial_use=True))
    for family in ("sd15", "sdxl"):
        made.save_ip_adapter(UNet2DConditionModel.from_pretrained(miniatures[family] / "unet"), folder / f"ip-{family}")
        adapters.append(IpAdapter(id=f"ip-{family}", family=family, source=str(folder / f"ip-{family}"), subfolder="models", weight_name="ip-adapter.safetensors", image_encoder="models/image_encoder"))
    adapters.append(IpAdapter(id="ip-gone", family="sd15", source="/nowhere/at/all", weight_name="ip-adapter.safetensors"))
    nine = made._sd(made.sd15().scheduler, in_channels=9).components
    StableDiffusionInpaintPipeline(**nine, requires_safety_checker=False).save_pretrained(folder / "nine")
    entries = [Model(id=f, family=f, source=str(miniatures[f]), commercial_use=True) for f in FAMILIES]
    entries.append(Model(id="nine", family="sd15", source=str(folder / "nine"), inpainting=True))
    settings = Settings(models=Models(default="sd15", catalogue=entries, controlnets=nets, ip_adapters=adapters, cpu_threads=1))
    before = torch.get_num_threads()
    device = Device(settings, Catalogue(settings))
    yield device
    device.queue.close()
    torch.set_num_threads(before)


def submit(
    device: Device, model: str, control: Sequence[Pixels] = (), pictures: Sequence[Pixels] = (), image: Pixels | None = None, mask: Pixels | None = None, client: str = "test", **values: object
) -> Future[Generation]:
    side = SIDE[model]
    asked = {"prompt": "a cat", "model_id": model, "seed": 1, "num_inference_steps": 2, "width": side, "height": side, **values}
    plan = device.catalogue.plan(GenerationRequest.model_validate(asked), Inputs(image=image, mask=mask, control_image=list(control), ip_adapter_image=list(pictures)), client)
    device.fetch_guides(plan)
    return device.submit(plan, device.fetch(device.catalogue.find(model)))


def draw(device: Device, model: str, **values: object) -> Generation:
    return submit(device, model, **values).result(120)


def difference(one: Generation, other: Generation) -> int:
    """The largest of a channel, in 255 levels."""
    pairs = zip(one.pictures, other.pictures, strict=True)
    return max(int(np.abs(np.frombuffer(a.data, np.uint8).astype(int) - np.frombuffer(b.data, np.uint8)).max()) for a, b in pairs)


HALF = Pixels(width=128, height=128, data=(b"\xff" * 192 + b"\0" * 192) * 128)  # the left one is repainted
MODES: dict[str, dict] = {
    "txt2img": {},
    "img2img": {"image": OTHER},
    "inpaint": {"image": OTHER, "mask": HALF, "inpainting_fill": "latent noise", "strength": 1},
    "hires": {"hr_scale": 1.25, "hr_steps": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_controlnet_changes_the_picture_and_at_scale_0_leaves_it_as_it_was(device: Device, family: str, mode: str) -> None:
    net, how = f"{family}-a", MODES[mode]
    plain = draw(device, family, **how)
    acting = draw(device, family, **how, control=[DRAWING], controlnet=net)
    assert difference(plain, acting) > 1
    assert difference(acting, draw(device, family, **how, control=[OTHER], controlnet=net)) > 0
    assert difference(plain, draw(device, family, **how, control=[DRAWING], controlnet=net, controlnet_conditioning_scale=0)) == 0
    assert difference(plain, draw(device, family, **how)) == 0
    (told,) = acting.ran.controls
    assert (told.id, told.preprocessor, told.scale, told.start, told.end) == (net, "canny", 1, 0, 1)
    assert len(told.sha256) == 64


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_several_controlnets_act_each_with_its_own_scale_and_steps(device: Device, family: str) -> None:
    both = {"controlnet": f"{family}-a,{family}-b", "control": [DRAWING, OTHER]}
    one = draw(device, family, controlnet=f"{family}-a", control=[DRAWING])
    assert difference(one, draw(device, family, **both)) > 0
    assert difference(one, draw(device, family, **both, controlnet_conditioning_scale="1,0")) == 0
    early = draw(device, family, **both, control_guidance_end=[0.5, 1])
    assert difference(early, draw(device, family, **both)) > 0
    assert [c.end for c in early.ran.controls] == [0.5, 1]


def test_requests_with_other_control_images_share_a_batch(device: Device) -> None:
    asked = [{"control": [picture], "controlnet": "sd15-a", "seed": seed, "client": f"c{seed}"} for seed, picture in ((1, DRAWING), (2, OTHER))]
    alone = [draw(device, "sd15", **each) for each in asked]
    go = held(device)
    futures = [submit(device, "sd15", **each) for each in asked]
    rows: list[int] = []
    unet = device.residency.acquire(device.catalogue.find("sd15"), Path(), torch.float32).base.unet
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    go.set()
    shared = [f.result(60) for f in futures]
    hook.remove()
    assert set(rows) == {4}  # two pictures, each with its unconditional half
    assert all(difference(a, b) <= 1 for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_ip_adapter_changes_the_picture_and_leaves_nothing_behind(device: Device, family: str) -> None:
    adapter = {"ip_adapter": f"ip-{family}"}
    plain = draw(device, family)
    resident = device.residency.acquire(device.catalogue.find(family), Path(), torch.float32)
    before = resident.base.unet.attn_processors
    control = {"controlnet": f"{family}-b", "control": [DRAWING]}
    acting = draw(device, family, pictures=[DRAWING], **adapter)
    assert difference(plain, acting) > 1
    assert difference(acting, draw(device, family, pictures=[OTHER], **adapter)) > 0
    assert difference(acting, draw(device, family, pictures=[DRAWING, OTHER], **adapter)) > 0
    assert difference(plain, draw(device, family, pictures=[DRAWING], **adapter, ip_adapter_scale=0)) == 0
    assert difference(draw(device, family, **control), draw(device, family, pictures=[DRAWING], **adapter, **control)) > 0
    assert draw(device, family, pictures=[DRAWING], **adapter, image=OTHER).ran.strength == 0.75
    assert draw(device, family, pictures=[DRAWING], **adapter, guidance_scale=1).pictures
    assert (acting.ran.ip_adapter.id, acting.ran.ip_adapter.images, len(acting.ran.ip_adapter.sha256)) == (f"ip-{family}", 1, 64)
    assert difference(plain, draw(device, family)) == 0
    after = resident.base.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


def test_a_lora_and_an_ip_adapter_act_together_and_each_leaves_the_other(device: Device, tmp_path: Path) -> None:
    adapter = {"ip_adapter": "ip-sd15", "pictures": [DRAWING]}
    plain, guided = draw(device, "sd15"), draw(device, "sd15", **adapter)
    base = device.residency.acquire(device.catalogue.find("sd15"), Path(), torch.float32).base
    path = lora_files.write(tmp_path / "free.safetensors", lora_files.diffusers_layout(lora_files.matrices(base, encoders=False)))
    lora = PlannedLora(name="free", weight=0.8, path=str(path), sha256=None, commercial_use=True, credit=None)

    def with_lora(pictures: list[Pixels], **values: object) -> Generation:
        plan = planned(device, "", pictures, **values).model_copy(update={"loras": [lora]})
        return device.submit(plan, device.fetch(device.catalogue.find("sd15"))).result(60)

    alone, both = with_lora([]), with_lora([DRAWING], ip_adapter="ip-sd15")
    assert difference(alone, plain) > 0
    assert min(difference(both, alone), difference(both, guided)) > 0
    assert both.ran.loras[0].layers > 0
    assert both.ran.loras[0].unmatched == 0
    assert difference(with_lora([]), alone) == 0
    assert difference(draw(device, "sd15", **adapter), guided) == 0
    assert difference(draw(device, "sd15"), plain) == 0


def test_what_guides_counts_as_its_models_bytes_and_goes_when_idle_or_for_room(device: Device) -> None:
    draw(device, "sd15", control=[DRAWING], controlnet="sd15-a")
    draw(device, "sd15", pictures=[DRAWING], ip_adapter="ip-sd15")
    residency = device.residency
    resident = residency.acquire(device.catalogue.find("sd15"), Path(), torch.float32)
    shown = next(m for m in residency.snapshot([]) if m.model_id == "sd15")
    assert {"sd15-a", "ip-sd15"} <= {g.id for g in shown.guides}
    assert shown.resident_bytes == resident.weights_bytes + resident.remembered.bytes + sum(beside.resident_bytes for beside in (*shown.guides, *shown.loras))
    resident.guides.drop_idle(0)
    assert resident.guides.bytes == 0
    draw(device, "sd15", control=[DRAWING], controlnet="sd15-a")
    room, residency.budget = residency.budget, resident.bytes + 1  # for one, if the other goes
    try:
        residency.guide(resident, planned(device, "sd15-b"), device._guides)
        assert [g.id for g in resident.guides.snapshot()] == ["sd15-b"]
        with pytest.raises(Problem, match="memory_budget_bytes"):
            residency.guide(resident, planned(device, "sd15-a,sd15-b"), device._guides)
    finally:
        residency.budget = room


def planned(device: Device, controlnets: str, pictures: Sequence[Pixels] = (), **values: object) -> Plan:
    asked = {"prompt": "a cat", "model_id": "sd15", "seed": 1, "num_inference_steps": 2, "width": 128, "height": 128, "controlnet": controlnets or None, **values}
    inputs = Inputs(control_image=[DRAWING] if controlnets else [], ip_adapter_image=list(pictures))
    plan = device.catalogue.plan(GenerationRequest.model_validate(asked), inputs, "test")
    device.fetch_guides(plan)
    return plan


@pytest.mark.parametrize(
    ("values", "control", "field", "says"),
    [
        ({"controlnet": "sdxl-a"}, [DRAWING], "controlnet", "sd15-a"),
        ({"controlnet": "canny"}, [DRAWING], "controlnet", "sd15-a"),
        ({"controlnet": "sd15-a"}, [], "control_image", "multipart"),
        ({"controlnet": "sd15-a,sd15-b"}, [DRAWING] * 3, "control_image", "2 multipart"),
        ({}, [DRAWING], "controlnet", "sd15-a"),
        ({"controlnet_conditioning_scale": 0.5}, [], "controlnet_conditioning_scale", "leave it out"),
        ({"controlnet": "sd15-a", "controlnet_conditioning_scale": "1,2"}, [DRAWING], "controlnet_conditioning_scale", "1 or 1"),
        ({"controlnet": "sd15-a", "control_guidance_start": 0.5, "control_guidance_end": 0.5}, [DRAWING], "control_guidance_end", "more than 0.5"),
        ({"controlnet": "sd15-a", "preprocessor": "cany"}, [DRAWING], "preprocessor", "canny"),
        ({"ip_adapter": "ip-sdxl"}, [], "ip_adapter", "ip-sd15"),
        ({"ip_adapter": "ip-sd15"}, [], "ip_adapter_image", "multipart"),
        ({"ip_adapter_scale": 0.5}, [], "ip_adapter_scale", "leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(device: Device, values: dict, control: list[Pixels], field: str, says: str) -> None:
    request = GenerationRequest.model_validate({"prompt": "x", "model_id": "sd15"} | values)
    with pytest.raises(Problem) as caught:
        device.catalogue.plan(request, Inputs(control_image=control), "test")
    error = next(e for e in caught.value.details.errors if e.field == field)
    assert says in str(error.allowed)


@pytest.mark.parametrize("values", [{"controlnet_conditioning_scale": "1,x"}, {"controlnet_conditioning_scale": 3}, {"control_guidance_end": [True]}, {"controlnet": ""}])
def test_values_that_are_none_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest.model_validate({"prompt": "x", **values})


@pytest.mark.parametrize("model", [*FAMILIES, "nine"])
def test_what_a_mask_keeps_is_kept_to_the_last_bit_whatever_guides_the_rest(device: Device, model: str) -> None:
    family = "sd15" if model == "nine" else model
    side = SIDE[family] - 3
    image, half = pixels(2, side, side), Pixels(width=side, height=side, data=(b"\xff" * 60 + b"\0" * (3 * side - 60)) * side)
    given = {"image": image, "mask": half, "width": None, "height": None, "controlnet": f"{family}-a", "scheduler": "Euler"}
    drawn = [draw(device, model, control=[map], **given) for map in (DRAWING, OTHER)]
    rows = [np.frombuffer(made.pictures[0].data, np.uint8).reshape(side, side, 3) for made in drawn]
    before = np.frombuffer(image.data, np.uint8).reshape(side, side, 3)
    for row in rows:
        assert (row[:, 20:] == before[:, 20:]).all()
        assert (row[:, :20] != before[:, :20]).any()
    assert (rows[0][:, :20] != rows[1][:, :20]).any()


def test_a_control_image_is_of_the_whole_answer_whatever_part_of_it_is_drawn(device: Device) -> None:
    drawing = pixels(1, 64, 32)  # of an answer of 128x64, at half its size
    for values, box in (
        ({"inpaint_full_res": True, "inpaint_full_res_padding": 0}, (0, 16, 16, 32)),
        ({"outpaint_left": 8, "outpaint_bottom": 4}, (0, 0, 64, 32)),
    ):
        grown = (128 - values.get("outpaint_left", 0), 64 - values.get("outpaint_bottom", 0))
        image, mask = pixels(3, *grown), Image.new("RGB", grown)
        mask.paste("white", (0, 32, 32, 64))
        given = Inputs(image=image, mask=Pixels(width=grown[0], height=grown[1], data=mask.tobytes()), control_image=[drawing])
        plan = device.catalogue.plan(GenerationRequest.model_validate({"prompt": "x", "model_id": "sd15", "controlnet": "sd15-b", **values}), given, "test")
        (made,) = control.maps(plan, (plan.width, plan.height))
        part = to_pil(drawing).crop(box).resize((plan.width, plan.height), Image.Resampling.LANCZOS)
        assert np.array_equal((made * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), np.asarray(part))


def test_masked_requests_with_other_control_images_share_a_batch(device: Device) -> None:
    other_half = Pixels(width=128, height=128, data=HALF.data[::-1])
    asked = [
        {"control": [DRAWING], "image": OTHER, "mask": HALF, "controlnet": "sd15-a", "seed": 1, "client": "c1"},
        {"control": [OTHER], "image": DRAWING, "mask": other_half, "controlnet": "sd15-a", "seed": 2, "client": "c2"},
    ]
    alone = [draw(device, "sd15", **each) for each in asked]
    go = held(device)
    futures = [submit(device, "sd15", **each) for each in asked]
    rows: list[int] = []
    unet = device.residency.acquire(device.catalogue.find("sd15"), Path(), torch.float32).base.unet
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    go.set()
    shared = [f.result(60) for f in futures]
    hook.remove()
    assert set(rows) == {4}
    assert all(difference(a, b) <= 1 for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("mode", ["inpaint", "hires"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_ip_adapter_goes_with_a_mask_and_with_hires_and_with_a_controlnet_there(device: Device, family: str, mode: str) -> None:
    how, adapter = MODES[mode], {"ip_adapter": f"ip-{family}"}
    plain, acting = draw(device, family, **how), draw(device, family, **how, pictures=[DRAWING], **adapter)
    assert difference(plain, acting) > 0
    assert difference(acting, draw(device, family, **how, pictures=[OTHER], **adapter)) > 0
    assert difference(plain, draw(device, family, **how, pictures=[DRAWING], **adapter, ip_adapter_scale=0)) == 0
    both = draw(device, family, **how, pictures=[DRAWING], **adapter, control=[DRAWING, OTHER], controlnet=f"{family}-a,{family}-b")
    assert difference(acting, both) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_pass_of_hires_is_guided_too(device: Device, family: str) -> None:
    """By a map of its own size, made anew from the picture."""
    how = {"control": [DRAWING], "controlnet": f"{family}-a", "hr_scale": 1.5, "hr_upscaler": "lanczos", "hr_steps": 3, "hr_strength": 1, "scheduler": "Euler"}
    draw(device, family, **how)
    resident = device.residency.acquire(device.catalogue.find(family), Path(), torch.float32)
    net = resident.guides._kept[f"{family}-a"].loaded
    seen: list[tuple[int, ...]] = []
    hook = net.register_forward_pre_hook(lambda _, args, named: seen.append(tuple(named["controlnet_cond"].shape)), with_kwargs=True)
    made = draw(device, family, **how)
    hook.remove()
    side = SIDE[family]
    assert made.pictures[0].width == side * 3 // 2
    small, large = (1, (side // 16) ** 2), (1, (side * 3 // 32) ** 2)  # Flux: tokens
    if family != "flux":
        small, large = (2, 3, side, side), (2, 3, side * 3 // 2, side * 3 // 2)
    assert [shape[: len(small)] for shape in seen] == [small] * 2 + [large] * 3


def test_missing_and_broken_files_are_a_503_that_names_them(device: Device) -> None:
    with pytest.raises(Problem, match="/nowhere/at/all") as caught:
        draw(device, "sd15", pictures=[DRAWING], ip_adapter="ip-gone")
    assert caught.value.details.status == 503
    resident = device.residency.acquire(device.catalogue.find("sdxl"), device.fetch(device.catalogue.find("sdxl")), torch.float32)
    resident.guides.drop_idle(0)
    broken = device.catalogue.models.ip_adapters[0]  # of another architecture than this UNet's
    plan = device.catalogue.plan(GenerationRequest(prompt="x", model_id="sdxl", ip_adapter="ip-sdxl"), Inputs(ip_adapter_image=[DRAWING]), "test")
    with pytest.raises(Problem) as caught:
        device.residency.guide(resident, plan, {"ip-sdxl": (broken.model_copy(update={"id": "ip-sdxl"}), Path(broken.source))})
    assert caught.value.details.status == 503


def test_the_unidiffuser_runner_takes_none(device: Device) -> None:
    with pytest.raises(ValidationError, match="controlnets"):
        UniDiffuser(allow_unlisted=True, controlnets=[ControlNet(id="x", family="sd15")])


def test_commercial_use_asks_the_guides_too(device: Device) -> None:
    request = GenerationRequest(prompt="x", model_id="sd15", ip_adapter="ip-sd15", commercial=True)
    with pytest.raises(Problem) as caught:
        device.catalogue.plan(request, Inputs(ip_adapter_image=[DRAWING]), "test")
    assert "ip-sd15" in caught.value.details.errors[0].message


def test_preprocessors_find_a_squares_outline() -> None:
    square = np.full((64, 64, 3), 255, np.uint8)
    square[16:48, 16:48] = 40
    image = Image.fromarray(square)
    canny = np.asarray(preprocessing.run("canny", image))[..., 0] > 0
    ys, xs = np.nonzero(canny)
    assert {ys.min(), xs.min()} <= {15, 16}
    assert {ys.max(), xs.max()} <= {47, 48}
    assert not canny[20:44, 20:44].any()
    for name in preprocessing.NAMES:
        assert preprocessing.run(name, image, (32, 32)).size == (32, 32)
    assert np.array_equal(np.asarray(preprocessing.run("invert", image)), 255 - square)
    for name in ("lineart_standard", "scribble_xdog"):
        lines = np.asarray(preprocessing.run(name, image))[..., 0]
        assert lines[17, 32] > 100  # inside the dark square's edge
        assert lines[4, 4] == 0
        assert preprocessing.run(name, Image.new("RGB", (32, 32), "white")).getextrema() == ((0, 0),) * 3


def test_a_request_is_guided_over_http_and_says_so(server: Server) -> None:
    square = np.full((64, 64, 3), 255, np.uint8)
    square[16:48, 16:48] = 40
    file = io.BytesIO()
    Image.fromarray(square).save(file, "PNG")
    asked = {"prompt": "red apple", "seed": 1, "num_inference_steps": 2}
    control = {"controlnet": "starter/controlnet-canny", "control_guidance_end": 0.9}
    plain = server.post("/post_config", params=asked)
    guided = server.post("/post_config", params=asked | control, files={"control_image": file.getvalue()})
    assert guided.status_code == 200, guided.text
    assert guided.content != plain.content
    assert guided.headers["X-Easel-Controlnets"] == "starter/controlnet-canny:1;preprocessor=canny;start=0;end=0.9"
    assert "X-Easel-Controlnets" not in plain.headers
    text = Image.open(io.BytesIO(guided.content)).text["parameters"]
    assert 'ControlNet 0: "Module: canny, Model: starter/controlnet-canny, Weight: 1, Guidance Start: 0, Guidance End: 0.9"' in text
    as_json = server.post("/txt2img", data=asked | control, files=[("control_image", file.getvalue())]).json()
    assert as_json["ran"]["controls"][0]["id"] == "starter/controlnet-canny"
    assert base64.b64decode(as_json["images"][0])[:4] == b"\x89PNG"
    shown = server.get("/buffer_status").json()["models"]
    assert any(g["id"] == "starter/controlnet-canny" for m in shown for g in m["guides"])
    offered = server.get("/capabilities").json()
    assert next(m for m in offered["models"] if m["family"] == "starter")["controlnets"] == ["starter/controlnet-canny"]
    refused = server.post("/post_config", params=asked | {"controlnet": "starter/canny"}, files={"control_image": file.getvalue()})
    assert (refused.status_code, refused.json()["errors"][0]["allowed"]) == (422, ["starter/controlnet-canny"])
    made = server.post("/preprocess", params={"preprocessor": "canny"}, files={"image": file.getvalue()})
    found = np.asarray(Image.open(io.BytesIO(made.content)))
    assert np.array_equal(found, np.asarray(preprocessing.run("canny", Image.fromarray(square))))
    assert server.post("/preprocess", params={"preprocessor": "cany"}, files={"image": file.getvalue()}).status_code == 422
    assert server.post("/preprocess", params={"preprocessor": "canny"}).status_code == 422
