"""Requests share denoising steps, and each gets what it gets alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import ControlNet, Model, Models
from core.plans import Inputs, Pixels, Plan, PlannedLora
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Settings
from runners import denoise
from runners.device import Device
from runners.pace import Pace
from runners.stepping import Decoder, share_passes
from tests import lora_files, miniatures
from tests.conftest import held

PICTURE = Pixels(width=64, height=64, data=np.random.default_rng(0).integers(0, 256, 64 * 64 * 3, dtype=np.uint8).tobytes())
MODELS = ("starter", "sdxl", "flux")
SIZES = {"starter": 64, "sd15": 128, "sdxl": 256, "flux": 256}
PROMPTS = ("red apple", "blue heart", "cat face", "green leaf", "yellow star", "pink flower", "dog face", "brown shoe")


@contextlib.contextmanager
def drawing(entries: list[Model]) -> Iterator[Device]:
    """A device with these models, the first by default, which draws as many pictures at once as it may."""
    nets = [ControlNet(id="starter/controlnet-canny", family="starter")]
    settings = Settings(models=Models(default=entries[0].id, catalogue=entries, controlnets=nets, cpu_threads=1, max_batch=4))
    made = Device(settings, Catalogue(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "worth", lambda _, ceiling: ceiling)  # what this machine's other work does to times is not the question here
        yield made
    made.queue.close()
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [Model(id="starter", family="starter", source="starter/stable-diffusion")]
    entries += [Model(id=family, family=family, source=str(miniatures[family])) for family in ("sd15", "sdxl", "flux")]
    with drawing(entries) as made:
        yield made


def planned(
    device: Device, client: str = "test", image: Pixels | None = None, mask: Pixels | None = None, control: Pixels | None = None, loras: list[tuple[Path, float]] | None = None, **values: object
) -> Plan:
    size = SIZES[str(values.get("model_id", "starter"))]
    asked = {"prompt": "red apple", "model_id": "starter", "num_inference_steps": 3, "width": size, "height": size, **values}
    plan = device.catalogue.plan(GenerationRequest.model_validate(asked), Inputs(image=image, mask=mask, control_image=[control] if control else []), client)
    return plan.model_copy(update={"loras": [PlannedLora(name=path.stem, weight=weight, path=str(path), sha256=None, commercial_use=True, credit=None) for path, weight in loras or []]})


def submit(device: Device, plan: Plan) -> Future[Generation]:
    device.fetch_guides(plan)
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id)))


def together(device: Device, *requests: dict) -> tuple[list[Generation], list[int]]:
    """The outcomes of requests that wait at the same time, and how many pictures each denoising step had."""
    go = held(device)
    futures = [submit(device, planned(device, client=f"client{i}", **each)) for i, each in enumerate(requests)]
    resident = device.residency.acquire(device.catalogue.find(requests[0].get("model_id", "starter")), Path(), torch.float32)
    pipe = resident.base
    rows: list[int] = []

    def count(_: object, args: tuple, named: dict) -> None:
        latents = args[0] if args else named["hidden_states"]
        rows.append(math.ceil(len(latents) / 2) if hasattr(pipe, "unet") else len(latents))  # Flux has no unconditional half

    hook = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).register_forward_pre_hook(count, with_kwargs=True)
    go.set()
    try:
        return [f.result(60) for f in futures], rows
    finally:
        hook.remove()


@pytest.fixture
def decoded(device: Device) -> Iterator[list[int]]:
    """How many pictures of the starter were decoded at once, time after time."""
    entry, rows = device.catalogue.find("starter"), []
    vae = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.vae
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


def test_those_that_take_their_last_step_at_once_are_decoded_together(device: Device, decoded: list[int]) -> None:
    asked = [{"prompt": prompt, "seed": i, "num_inference_steps": steps} for i, (prompt, steps) in enumerate(zip(PROMPTS, (3, 3, 3, 5), strict=False))]
    shared, _ = together(device, *asked)
    assert decoded == [3, 1]
    assert all(worst(one, submit(device, planned(device, **each)).result(60)) <= 1 for one, each in zip(shared, asked, strict=True))


@pytest.mark.parametrize(("dtype", "upcast", "shared"), [(torch.float16, True, False), (torch.float16, False, True), (torch.bfloat16, True, True)])
def test_a_vae_that_changes_its_precision_to_decode_is_shared_by_nobody(dtype: torch.dtype, upcast: bool, shared: bool) -> None:
    pipe = miniatures.sdxl()
    pipe.vae.to(dtype).register_to_config(force_upcast=upcast)
    assert isinstance(share_passes(pipe).vae, Decoder) == shared


def worst(one: Generation, other: Generation) -> int:
    """The largest difference of a channel, in 255 levels."""
    pairs = zip(one.pictures, other.pictures, strict=True)
    return max(int(np.abs(np.frombuffer(a.data, np.uint8).astype(int) - np.frombuffer(b.data, np.uint8)).max()) for a, b in pairs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("image", [None, PICTURE], ids=["txt2img", "img2img"])
def test_alike_requests_share_a_batch_and_get_what_they_get_alone(device: Device, model: str, image: Pixels | None) -> None:
    asked = [
        {"prompt": "red apple", "seed": 1, "model_id": model, "image": image},
        {"prompt": "blue heart", "seed": 2, "count_returned": 2, "model_id": model, "image": image},
        {"prompt": "cat face", "seed": 3, "model_id": model, "image": image},
    ]
    alone = [submit(device, planned(device, **each)).result(60) for each in asked]
    shared, rows = together(device, *asked)
    assert set(rows) == {4}
    assert [g.seeds for g in shared] == [[1], [2, 3], [3]]
    assert [g.ran.prompt for g in shared] == ["red apple", "blue heart", "cat face"]
    assert [g.ran.steps_run for g in shared] == [g.ran.steps_run for g in alone]
    assert all(worst(a, b) <= 1 for a, b in zip(alone, shared, strict=True))
    assert worst(shared[0], shared[2]) > 1


# What a request may ask for that the others of its batch do not.
OTHERWISE = {
    "starter": [
        {"num_inference_steps": 5, "scheduler": "DDIM"},
        {"guidance_scale": 1},
        {"scheduler": "Euler a", "guidance_scale": 3},
        {"scheduler": "Heun", "num_inference_steps": 2},
        {"scheduler": "DPM++ 2M SDE", "num_inference_steps": 4},
        {"scheduler": "UniPC", "num_inference_steps": 6, "image": PICTURE, "strength": 0.5},
        {"negative_prompt": "green", "clip_skip": 1, "count_returned": 2, "scheduler": "LCM"},
    ],
    "sd15": [{"scheduler": "DPM2 a", "num_inference_steps": 4}, {"scheduler": "LMS Karras", "guidance_scale": 2}, {"scheduler": "DPM++ SDE", "image": PICTURE}],
    "sdxl": [{"scheduler": "Euler a"}, {"num_inference_steps": 5, "guidance_scale": 1}, {"scheduler": "DPM++ 3M SDE", "image": PICTURE, "strength": 0.9}],
    "flux": [{"num_inference_steps": 5, "guidance_scale": 1}, {"scheduler": "LCM"}, {"scheduler": "Euler Karras", "image": PICTURE, "strength": 0.7}],
}


@pytest.mark.parametrize("model", OTHERWISE)
def test_requests_that_ask_for_different_things_share_steps_and_get_what_they_get_alone(device: Device, model: str) -> None:
    asked = [{"prompt": prompt, "seed": i, "model_id": model, **each} for i, (prompt, each) in enumerate(zip(PROMPTS, [{}, *OTHERWISE[model]], strict=False))]
    alone = [submit(device, planned(device, **each)).result(60) for each in asked]
    shared, rows = together(device, *asked)
    assert [g.ran.steps_run for g in shared] == [g.ran.steps_run for g in alone]
    assert [g.ran.scheduler for g in shared] == [g.ran.scheduler for g in alone]
    assert max(rows) >= 4
    assert len(rows) < sum(g.ran.steps_run for g in alone)
    assert [worst(a, b) <= 1 for a, b in zip(alone, shared, strict=True)] == [True] * len(asked)
    assert len({g.pictures[0].data for g in shared}) == len(asked)


def test_requests_with_different_loras_share_steps_and_get_what_they_get_alone(device: Device, tmp_path: Path) -> None:
    paths = [lora_files.write(tmp_path / f"{i}.safetensors", lora_files.diffusers_layout(lora_files.matrices(starter(device), i, size=0.2))) for i in range(3)]
    sets = [[], [(0, 1.0)], [(1, 0.5)], [(0, 1.0), (2, -0.5)], [(0, 0.3)], []]
    asked = [{"prompt": "red apple", "seed": 5, "num_inference_steps": 3 + i % 2, "loras": [(paths[n], weight) for n, weight in each]} for i, each in enumerate(sets)]
    alone = [submit(device, planned(device, **each)).result(60) for each in asked]
    shared, rows = together(device, *asked)
    assert max(rows) == 4  # as many as may be
    assert [[(lora.sha256, lora.weight) for lora in g.ran.loras] for g in shared] == [[(lora.sha256, lora.weight) for lora in g.ran.loras] for g in alone]
    assert [worst(a, b) <= 1 for a, b in zip(alone, shared, strict=True)] == [True] * len(asked)
    assert len({g.pictures[0].data for g in shared}) == 6


def test_loras_that_do_not_fit_the_memory_together_take_turns(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [lora_files.write(tmp_path / f"{i}.safetensors", lora_files.diffusers_layout(lora_files.matrices(starter(device), i, size=0.2))) for i in range(2)]
    resident = device.residency.acquire(device.catalogue.find("starter"), Path(), torch.float32)
    monkeypatch.setattr(resident.adapters, "budget", int(1.5 * paths[0].stat().st_size))
    shared, rows = together(device, *({"seed": 5, "loras": [(paths[n], 1.0)] if n is not None else []} for n in (0, 1, None, 0)))
    assert [[lora.weight for lora in g.ran.loras] for g in shared] == [[1.0], [1.0], [], [1.0]]
    assert 2 <= max(rows) < 4
    assert shared[0].pictures[0].data == shared[3].pictures[0].data != shared[1].pictures[0].data


def starter(device: Device) -> DiffusionPipeline:
    return device.residency.acquire(device.catalogue.find("starter"), device.fetch(device.catalogue.find("starter")), torch.float32).base


GUIDED = {"controlnet": "starter/controlnet-canny", "preprocessor": "canny", "control": PICTURE}
MASK = Pixels(width=64, height=64, data=bytes(64 * 32 * 3) + b"\xff" * (64 * 32 * 3))


@pytest.mark.parametrize(
    "asked",
    [
        [{}, {"image": PICTURE, "mask": MASK, "scheduler": "Euler a", "num_inference_steps": 5}],
        [GUIDED, {**GUIDED, "num_inference_steps": 5, "scheduler": "DDIM"}, {**GUIDED, "image": PICTURE}],
        [{"hr_scale": 1.5, "hr_steps": 2}, {"hr_scale": 1.5, "hr_steps": 2, "guidance_scale": 2, "num_inference_steps": 4, "scheduler": "Euler"}],
    ],
    ids=["inpainting", "controlnet", "hires"],
)
def test_other_pipelines_share_steps_too(device: Device, asked: list[dict]) -> None:
    asked = [{"seed": i, **each} for i, each in enumerate(asked)]
    alone = [submit(device, planned(device, **each)).result(60) for each in asked]
    shared, rows = together(device, *asked)
    assert len(rows) < sum(g.ran.steps_run for g in alone)
    assert max(rows) == len(asked)
    assert [worst(a, b) <= 1 for a, b in zip(alone, shared, strict=True)] == [True] * len(asked)


def test_other_sizes_models_and_lengths_of_prompt_are_not_mixed(device: Device) -> None:
    long = "apple " * 100
    outcomes, rows = together(device, {"seed": 1}, {"seed": 1, "width": 48}, {"seed": 1, "prompt": long}, {"seed": 2})
    assert sorted(rows) == [1] * 6 + [2] * 3
    assert worst(outcomes[2], submit(device, planned(device, seed=1, prompt=long)).result(60)) == 0


def test_one_that_overflows_does_not_take_the_others_along(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = denoise.to_pixels, []

    def spoilt(array: np.ndarray) -> Pixels:
        seen.append(1)
        return plain(np.full_like(array, np.nan) if len(seen) == 1 else array)

    monkeypatch.setattr(denoise, "to_pixels", spoilt)
    (first, second), rows = together(device, {"seed": 1}, {"seed": 2})
    assert rows == [2, 2, 2]
    assert first.problem is not None
    assert first.problem.type.endswith("overflow")
    assert len(second.pictures) == 1


def test_one_that_is_cancelled_does_not_take_the_others_along(device: Device) -> None:
    leaving, staying = (planned(device, client=client, seed=1, num_inference_steps=4) for client in "ab")
    resident = device.residency.acquire(device.catalogue.find("starter"), Path(), torch.float32)

    def cancel(id: str) -> None:
        device.queue.cancel(id)

    hook = resident.base.unet.register_forward_hook(lambda *_: cancel(leaving.id))
    go = held(device)
    futures = [submit(device, plan) for plan in (leaving, staying)]
    go.set()
    try:
        with pytest.raises(Problem, match="cancelled"):
            futures[0].result(60)
        assert len(futures[1].result(60).pictures) == 1
    finally:
        hook.remove()


class Watch:
    """Look at the device before every pass of the starter's denoiser; passes are counted from 1."""

    def __init__(self, device: Device, look: Callable[[int], object]) -> None:
        self.passes: list[int] = []  # how many pictures each had
        entry = device.catalogue.find("starter")
        unet = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.unet

        def before(_: object, args: tuple) -> None:
            self.passes.append(len(args[0]) // 2)
            look(len(self.passes))

        self._hook = unet.register_forward_pre_hook(before)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_a_request_joins_at_a_step_and_a_shorter_one_is_told_before_the_longer_one_is_done(device: Device) -> None:
    late: list[Future[Generation]] = []
    told: dict[int, bool] = {}

    def look(passes: int) -> None:
        if passes == 3:
            late.append(submit(device, planned(device, "late", seed=2, num_inference_steps=2)))
        if late:
            told[passes] = late[0].done()

    with Watch(device, look) as watch:
        first = submit(device, planned(device, seed=1, num_inference_steps=7)).result(60)
    assert watch.passes == [1, 1, 1, 2, 2, 1, 1]
    assert told == {3: False, 4: False, 5: False, 6: True, 7: True}
    joined = late[0].result(0)
    assert joined.ran.timing.queue > 0
    assert worst(first, submit(device, planned(device, seed=1, num_inference_steps=7)).result(60)) <= 1
    assert worst(joined, submit(device, planned(device, seed=2, num_inference_steps=2)).result(60)) <= 1


def test_one_that_cannot_join_waits_no_longer_than_for_the_steps_that_were_left(device: Device) -> None:
    """A picture of another size waits; of those that could join, the short one does, and the one that would take longer waits its turn."""
    order: list[str] = []

    def ask(name: str, **values: object) -> Future[Generation]:
        future = submit(device, planned(device, name, seed=1, **values))
        future.add_done_callback(lambda _: order.append(name))
        return future

    futures: list[Future[Generation]] = []

    def look(passes: int) -> None:
        if passes == 2:
            futures.extend([ask("other", width=48, num_inference_steps=1), ask("longer", num_inference_steps=5), ask("shorter", num_inference_steps=2)])

    with Watch(device, look) as watch:
        futures.append(ask("first", num_inference_steps=5))
        for future in futures:
            future.result(60)
        for future in futures:
            future.result(60)
    assert order == ["shorter", "first", "other", "longer"]
    assert watch.passes == [1, 1, 2, 2, 1, 1, *[1] * 5]


def test_a_request_of_many_pictures_is_not_starved_by_small_ones(device: Device) -> None:
    order: list[str] = []
    futures: list[Future[Generation]] = []

    def ask(name: str, **values: object) -> None:
        futures.append(submit(device, planned(device, name, seed=1, **values)))
        futures[-1].add_done_callback(lambda _: order.append(name))

    def look(passes: int) -> None:
        if passes == 1:
            ask("large", count_returned=4, num_inference_steps=1)
        if passes <= 3:
            ask(f"small{passes}", num_inference_steps=4)

    with Watch(device, look):
        ask("first", num_inference_steps=4)
        for future in futures:
            future.result(60)
        while len(order) < 5:
            futures[len(order)].result(60)
    assert order[:2] == ["first", "large"]


def test_the_queue_tells_how_far_the_device_is(device: Device) -> None:
    """Six pictures in batches of four, three steps each."""
    entry = device.catalogue.find("starter")
    resident = device.residency.acquire(entry, device.fetch(entry), torch.float32)
    told: list[int | None] = []

    def look(*_: object) -> None:
        progress = device.queue.status().progress
        told.append(progress and progress.steps_done)
        assert progress is None or (progress.model_id, progress.steps) == ("starter", 6)

    hook = resident.base.unet.register_forward_pre_hook(look)
    try:
        submit(device, planned(device, seed=1, count_returned=6)).result(60)
    finally:
        hook.remove()
    assert told == [None, 1, 2, 3, 4, 5]
    assert device.queue.status().progress is None
