"""Animations with AnimateDiff: frames that are drawn together, in a file that plays them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import av
import bentoml
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, MotionAdapter, UNetMotionModel
from PIL import Image

from api import reading
from core import animation
from core.animation import AnimationRequest
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Animation, Model, Models
from core.plans import Pixels, Plan
from core.problems import Problem
from core.settings import Loras, Settings
from runners.device import Device
from tests import lora_files
from tests.conftest import USER, Server
from tests.test_http import problem

SMALL = {"prompt": "a cat", "num_frames": 4, "num_inference_steps": 3, "width": 128, "height": 128, "seed": 5}


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    still, other = tmp_path_factory.mktemp("still"), tmp_path_factory.mktemp("other")
    adapter = MotionAdapter.from_pretrained(miniatures["motion"])
    for name, tensor in adapter.named_parameters():
        if "proj_out" in name:
            torch.nn.init.zeros_(tensor)
    adapter.save_pretrained(still)
    MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8).save_pretrained(other)
    sources = {"motion": str(miniatures["motion"]), "still": str(still), "other": str(other), "nowhere": "/nowhere/at/all"}
    animated = Animation(motion_adapters=[{"id": id, "source": source, "max_frames": 24, "credit": f"the makers of {id}"} for id, source in sources.items()])
    loras = tmp_path_factory.mktemp("loras")
    pipe = DiffusionPipeline.from_pretrained(miniatures["sd15"], safety_checker=None, requires_safety_checker=False)
    lora_files.write(loras / "free.safetensors", lora_files.kohya_layout(lora_files.matrices(pipe)))
    listed = {"model_id": None, "base_model": "sd15", "lora_path": "https://example.org/free", "trigger words": [], "allow_no_mention": True, "usage_rights": "None", "file_name": "free.safetensors"}
    (loras / "lora_list.json").write_text(json.dumps({"free": listed}))
    entries = [Model(id="sd15", family="sd15", source=str(miniatures["sd15"]), commercial_use=True), Model(id="sdxl", family="sdxl", source=str(miniatures["sdxl"]))]
    settings = Settings(models=Models(default="sd15", catalogue=entries, cpu_threads=1), animation=animated, loras=Loras(registry=loras / "lora_list.json", folder=loras))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, **values: object) -> Plan:
    return animation.plan(device.catalogue, reading.check(AnimationRequest, {**SMALL, **values}), "test")


def draw(device: Device, **values: object) -> Generation:
    plan = planned(device, **values)
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id)), {plan.animation.motion_adapter: device.fetch_motion(plan)}).result(120)


def test_frames_are_as_many_as_asked_and_each_its_own_and_a_seed_repeats_them(device: Device) -> None:
    drawn = draw(device)
    assert len(drawn.pictures) == 4
    assert len({p.data for p in drawn.pictures}) == 4
    assert [(p.width, p.height) for p in drawn.pictures] == [(128, 128)] * 4
    assert draw(device).pictures == drawn.pictures
    assert draw(device, seed=6).pictures[0] != drawn.pictures[0]
    assert (drawn.ran.steps_run, drawn.ran.scheduler, drawn.ran.schedule) == (3, "DDIM", "Uniform")
    assert (drawn.ran.animation.num_frames, drawn.ran.animation.motion_adapter, len(drawn.ran.animation.sha256)) == (4, "motion", 64)
    assert "the makers of motion" in drawn.ran.credit
    assert not drawn.ran.commercial_use


def test_the_motion_adapter_acts_and_the_model_is_as_it_was_without_it(device: Device) -> None:
    still, moving = draw(device, motion_adapter="still"), draw(device, motion_adapter="motion")
    assert still.pictures != moving.pictures
    request = reading.parse({"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "width": 128, "height": 128, "scheduler": "Euler"})
    path = device.fetch(device.catalogue.find("sd15"))
    after = device.submit(device.catalogue.plan(request, None, "test"), path).result(60).pictures
    device.unload(None).result(90)
    assert device.submit(device.catalogue.plan(request, None, "test"), path).result(60).pictures == after


def test_an_adapter_takes_its_own_bytes_alone_and_goes_with_its_model(device: Device) -> None:
    entry = device.catalogue.find("sd15")
    device.unload(None).result(90)
    resident = device.residency.acquire(entry, device.fetch(entry), torch.float32)
    before = resident.bytes
    draw(device)
    adapter = MotionAdapter.from_pretrained(device.fetch_motion(planned(device)))
    own = sum(t.numel() * t.element_size() for t in (*adapter.parameters(), *adapter.buffers()))
    assert resident.bytes - resident.remembered.bytes - before == own
    unet, base = resident.motion.pipeline.unet, resident.base.unet
    places = {t.data_ptr() for t in base.parameters()}
    assert sum(t.numel() for t in unet.parameters() if t.data_ptr() not in places) == sum(t.numel() for t in adapter.parameters())
    draw(device, motion_adapter="still")
    assert resident.bytes - resident.remembered.bytes - before == own  # the other took its place
    copied = UNetMotionModel.from_unet2d(base, adapter)
    noise, text = torch.randn(1, 4, 4, 16, 16), torch.randn(4, 77, 32)
    draw(device)
    with torch.no_grad():
        ours = resident.motion.pipeline.unet(noise, 5, encoder_hidden_states=text).sample
        assert torch.equal(ours, copied.eval()(noise, 5, encoder_hidden_states=text).sample)
    assert device.unload(None).result(90) == 1
    assert device.residency.resident_bytes == 0


def test_a_lora_acts_on_an_animation_and_leaves_it(device: Device) -> None:
    """Whether it comes before the motion adapter or after."""
    for unloaded in (False, True):
        plain = draw(device).pictures
        if unloaded:
            device.unload(None).result(90)
        with_lora = draw(device, lora="free:0.8")
        assert with_lora.ran.loras[0].layers > 0
        assert with_lora.ran.loras[0].unmatched == 0
        assert with_lora.pictures != plain
        assert draw(device).pictures == plain


def test_a_cancel_stops_an_animation_within_one_step(device: Device) -> None:
    draw(device)
    entry = device.catalogue.find("sd15")
    unet = device.residency.acquire(entry, device.fetch(entry), torch.float32).motion.pipeline.unet
    steps: list[int] = []

    def counted(*_: object) -> None:
        steps.append(1)
        progress = device.queue.status().progress
        assert progress is None if len(steps) == 1 else (progress.steps_done, progress.steps) == (len(steps) - 1, 20)
        if len(steps) == 2:
            assert device.queue.cancel("to-cancel")

    hook = unet.register_forward_pre_hook(counted)
    plan = planned(device, num_inference_steps=20).model_copy(update={"id": "to-cancel"})
    outcome = device.submit(plan, device.fetch(entry), {plan.animation.motion_adapter: device.fetch_motion(plan)}).exception(60)
    hook.remove()
    assert isinstance(outcome, Problem)
    assert (outcome.details.status, len(steps)) == (499, 2)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_frames": 1}, "num_frames"), ({"num_frames": 25}, "num_frames"), ({"num_frames": 24, "width": 1024, "height": 1024}, "num_frames"), ({"fps": 0}, "fps"), ({"fps": "inf"}, "fps"),
        ({"format": "png"}, "format"), ({"count_returned": 2}, "count_returned"), ({"motion_adapter": "moton"}, "motion_adapter"), ({"model_id": "sdxl", "width": 256, "height": 256}, "model_id"),
        ({"strength": 0.5}, "strength"), ({"mask_blur": 4}, "mask_blur"), ({"hr_scale": 2}, "hr_scale"), ({"commercial": True}, "commercial"), ({"width": 130}, "width"),
    ],
)  # fmt: skip
def test_what_cannot_be_animated_is_refused_by_its_field_name(device: Device, values: dict, field: str) -> None:
    with pytest.raises(Problem) as caught:
        planned(device, **values)
    assert caught.value.details.status == 422
    assert [e.field for e in caught.value.details.errors] == [field]


def test_an_adapter_that_does_not_fit_or_sees_fewer_frames_says_so(device: Device) -> None:
    for values, status, said in (({"motion_adapter": "other"}, 503, "different number of blocks"), ({"motion_adapter": "nowhere"}, 503, "/nowhere/at/all"), ({"num_frames": 20}, 422, "sees at once")):
        with pytest.raises(Problem, match=said) as caught:
            draw(device, **values)
        assert caught.value.details.status == status
    assert len(draw(device).pictures) == 4


@pytest.mark.parametrize("format", ["gif", "webp", "mp4"])
def test_a_file_has_every_frame_its_time_and_its_metadata(format: str) -> None:
    shades = [Pixels(width=64, height=48, data=bytes([40 * i, 255 - 40 * i, 80]) * (64 * 48)) for i in range(6)]
    file = animation.encode(shades, 6, format, 90, "a cat, éà\nSteps: 3")
    if format == "mp4":
        with av.open(io.BytesIO(file)) as container:
            video = container.streams.video[0]
            frames = [frame.to_image() for frame in container.decode(video=0)]
            assert (video.codec_context.name, video.average_rate, container.metadata["comment"]) == ("h264", 6, "a cat, éà\nSteps: 3")
        milliseconds = 1000
    else:
        opened = Image.open(io.BytesIO(file))
        frames, milliseconds = [], 0
        for i in range(opened.n_frames):
            opened.seek(i)
            opened.load()
            milliseconds += opened.info["duration"]
            frames.append(opened.convert("RGB"))
        said = opened.info["comment"].decode() if format == "gif" else opened.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
        assert said == "a cat, éà\nSteps: 3"
        assert opened.info["loop"] == 0
    assert len(frames) == 6
    assert abs(milliseconds - 1000) <= 1
    for shade, frame in zip(shades, frames, strict=True):
        assert np.abs(np.asarray(frame, int) - np.frombuffer(shade.data, np.uint8).reshape(48, 64, 3)).mean() < 8


# Over HTTP.

ASKED = {**SMALL, "model_id": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@pytest.mark.http
def test_animate_answers_with_the_format_that_is_asked_for(server: Server) -> None:
    response = server.post("/animate", params={**ASKED, "fps": 10})
    assert response.headers["content-type"] == "image/gif", response.text
    gif = Image.open(io.BytesIO(response.content))
    assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (128, 128), 100)
    assert b"Seed: 5" in gif.info["comment"]
    assert b"Motion adapter: mini/motion" in gif.info["comment"]
    assert response.headers["x-easel-seeds"] == "5"
    webp = server.post("/animate", json={**ASKED, "format": "webp"})
    assert Image.open(io.BytesIO(webp.content)).n_frames == 4
    mp4 = server.post("/animate", params=ASKED, headers={"Accept": "video/mp4"})
    assert mp4.headers["content-type"] == "video/mp4"
    assert mp4.content[4:8] == b"ftyp"
    problem(server.post("/animate", params=ASKED, headers={"Accept": "text/html"}), 406)
    problem(server.post("/animate", params={**ASKED, "format": "gif"}, headers={"Accept": "video/mp4"}), 406)
    assert "model_id" in problem(server.post("/animate", params=SMALL), 422)["detail"]
    assert "num_frame" in problem(server.post("/animate", params={**ASKED, "num_frame": 4}), 422)["detail"]
    problem(server.post("/animate", data=ASKED, files={"image": b"x"}), 422)


@pytest.mark.http
def test_bentomls_client_gets_the_animation_as_a_file(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        path = client.animate(**ASKED)
    assert Image.open(path).n_frames == 4


def test_without_av_mp4_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(animation.MEDIA_TYPES, "mp4")
    assert AnimationRequest(prompt="x", format="WEBP").format == "webp"
    with pytest.raises(ValueError, match=r"mp4 needs the package av.*pip install 'easel\[video\]'"):
        AnimationRequest(prompt="x", format="mp4")
