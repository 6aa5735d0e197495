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
from diffusers import ControlNetModel, FluxControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from PIL import Image
from pydantic import ValidationError

from core import preprocessing
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import ControlNet, IpAdapter, Model, Models, UniDiffuser
from core.plans import Inputs, Pixels, Plan, PlannedLora
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Settings
from runners.device import Device
from tests import lora_files
from tests import miniatures as made
from tests.conftest import Server, held

FAMILIES = ("sd15", "sd2", "sdxl", "flux")
SIDE = {"sd15": 128, "sd2": 128, "sdxl": 256, "flux": 256}


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
    entries = [Model(id=f, family=f, source=str(miniatures[f]), commercial_use=True) for f in FAMILIES]
    settings = Settings(models=Models(default="sd15", catalogue=entries, controlnets=nets, ip_adapters=adapters, cpu_threads=1))
    before = torch.get_num_threads()
    device = Device(settings, Catalogue(settings))
    yield device
    device.queue.close()
    torch.set_num_threads(before)


def submit(
    device: Device, model: str, control: Sequence[Pixels] = (), pictures: Sequence[Pixels] = (), image: Pixels | None = None, client: str = "test", **values: object
) -> Future[Generation]:
    side = SIDE[model]
    asked = {"prompt": "a cat", "model_id": model, "seed": 1, "num_inference_steps": 2, "width": side, "height": side, **values}
    plan = device.catalogue.plan(GenerationRequest.model_validate(asked), Inputs(image=image, control_image=list(control), ip_adapter_image=list(pictures)), client)
    device.fetch_guides(plan)
    return device.submit(plan, device.fetch(device.catalogue.find(model)))


def draw(device: Device, model: str, **values: object) -> Generation:
    return submit(device, model, **values).result(120)


def difference(one: Generation, other: Generation) -> int:
    """The largest of a channel, in 255 levels."""
    pairs = zip(one.pictures, other.pictures, strict=True)
    return max(int(np.abs(np.frombuffer(a.data, np.uint8).astype(int) - np.frombuffer(b.data, np.uint8)).max()) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image", [None, OTHER], ids=["txt2img", "img2img"])
def test_a_controlnet_changes_the_picture_and_at_scale_0_leaves_it_as_it_was(device: Device, family: str, image: Pixels | None) -> None:
    net = f"{family}-a"
    plain = draw(device, family, image=image)
    acting = draw(device, family, image=image, control=[DRAWING], controlnet=net)
    assert difference(plain, acting) > 1
    assert difference(acting, draw(device, family, image=image, control=[OTHER], controlnet=net)) > 0
    assert difference(plain, draw(device, family, image=image, control=[DRAWING], controlnet=net, controlnet_conditioning_scale=0)) == 0
    assert difference(plain, draw(device, family, image=image)) == 0
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
    assert shown.resident_bytes == resident.weights_bytes + sum(beside.resident_bytes for beside in (*shown.guides, *shown.loras))
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


def test_a_mask_goes_with_an_ip_adapter_and_not_with_a_controlnet(device: Device) -> None:
    asked = GenerationRequest(prompt="a cat", model_id="sd15", num_inference_steps=2, seed=1, width=128, height=128)
    painted = {"image": DRAWING, "mask": Pixels(width=128, height=128, data=b"\xff" * (3 * 128 * 128))}
    with pytest.raises(Problem, match="mask"):
        device.catalogue.plan(asked.model_copy(update={"controlnet": ["sd15-a"]}), Inputs(**painted, control_image=[DRAWING]), "test")
    drawn = []
    for pictures in ([OTHER], [DRAWING]):
        plan = device.catalogue.plan(asked.model_copy(update={"ip_adapter": "ip-sd15"}), Inputs(**painted, ip_adapter_image=pictures), "test")
        device.fetch_guides(plan)
        drawn.append(device.submit(plan, device.fetch(device.catalogue.find("sd15"))).result(120))
    assert difference(*drawn) > 0


def test_missing_and_broken_files_are_a_503_that_names_them(device: Device) -> None:
    with pytest.raises(Problem, match="/nowhere/at/all") as caught:
        draw(device, "sd15", pictures=[DRAWING], ip_adapter="ip-gone")
    assert caught.value.details.status == 503
    resident = device.residency.acquire(device.catalogue.find("sdxl"), device.fetch(device.catalogue.find("sdxl")), torch.float32)
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
