"""Requests that are alike share denoising batches, and each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Inputs, Pixels, Plan
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Settings
from runners import denoise
from runners.device import Device
from tests.conftest import held

PICTURE = Pixels(width=64, height=64, data=np.random.default_rng(0).integers(0, 256, 64 * 64 * 3, dtype=np.uint8).tobytes())
MODELS = ("starter", "sdxl", "flux")
SIZES = {"starter": 64, "sdxl": 256, "flux": 256}


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [Model(id="starter", family="starter", source="starter/stable-diffusion")]
    entries += [Model(id=family, family=family, source=str(miniatures[family])) for family in ("sdxl", "flux")]
    settings = Settings(models=Models(default="starter", catalogue=entries, cpu_threads=1, max_batch=4))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, client: str = "test", image: Pixels | None = None, **values: object) -> Plan:
    size = SIZES[str(values.get("model_id", "starter"))]
    asked = {"prompt": "red apple", "model_id": "starter", "num_inference_steps": 3, "width": size, "height": size, **values}
    return device.catalogue.plan(GenerationRequest.model_validate(asked), Inputs(image=image), client)


def submit(device: Device, plan: Plan) -> Future[Generation]:
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
        rows.append(len(latents) // 2 if hasattr(pipe, "unet") else len(latents))  # Flux has no unconditional half

    hook = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).register_forward_pre_hook(count, with_kwargs=True)
    go.set()
    try:
        return [f.result(60) for f in futures], rows
    finally:
        hook.remove()


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


def test_other_settings_and_other_lengths_of_prompt_do_not_share(device: Device) -> None:
    long = "apple " * 100
    outcomes, rows = together(
        device, {"seed": 1}, {"seed": 1, "guidance_scale": 3}, {"seed": 1, "scheduler": "Euler"}, {"seed": 1, "prompt": long}, {"seed": 2}
    )
    assert rows.count(2) == 0
    assert sorted({g.ran.scheduler for g in outcomes}) == ["DPM++ 2M", "Euler"]
    assert worst(outcomes[3], submit(device, planned(device, seed=1, prompt=long)).result(60)) == 0


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
    hook = resident.base.unet.register_forward_hook(lambda *_: device.queue.cancel(leaving.id) and None)
    go = held(device)
    futures = [submit(device, plan) for plan in (leaving, staying)]
    go.set()
    try:
        with pytest.raises(Problem, match="cancelled"):
            futures[0].result(60)
        assert len(futures[1].result(60).pictures) == 1
    finally:
        hook.remove()


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
