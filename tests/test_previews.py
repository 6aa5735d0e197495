"""Previews of pictures in the making: they are of the picture that comes, of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models
from core.multimodal import JointRequest, PromptToImageRequest, TextVariationRequest
from core.multimodal import plan as multimodal_plan
from core.plans import Pixels, Plan
from core.requests import GenerationRequest
from core.settings import Settings
from runners import previews
from runners.device import Device


def drawn(device: Device, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[Generation, list[Pixels]]:
    """What came of a plan, and the previews that were made of it, one for each step."""
    shown: list[Pixels] = []
    show = previews.show

    def watched(job: Any, *rest: Any) -> None:
        job.watched_until = float("inf")
        before = job.preview
        show(job, *rest)
        if job.preview is not before:
            shown.append(job.preview)

    monkeypatch.setattr(previews, "EVERY_S", 0)
    monkeypatch.setattr(previews, "show", watched)
    try:
        return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(120), shown
    finally:
        device.queue.close()


def array(pixels: Pixels) -> np.ndarray:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3).astype(int)


def test_unidiffusers_last_preview_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    catalogue = Catalogue(settings, settings.unidiffuser)
    for task, request in (("generate", PromptToImageRequest(prompt="red apple", num_inference_steps=4, seed=3)), ("joint", JointRequest(num_inference_steps=4, seed=3))):
        with monkeypatch.context() as patched:
            made, shown = drawn(Device(settings, catalogue), multimodal_plan(catalogue, task, request, [], "k"), patched)
        assert len(shown) == 4
        assert np.abs(array(shown[-1]) - array(made.pictures[0])).max() <= 2
        assert np.abs(array(shown[0]) - array(made.pictures[0])).mean() > 10  # and the first was not


def test_a_texts_making_shows_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    catalogue = Catalogue(settings, settings.unidiffuser)
    plan = multimodal_plan(catalogue, "text_variation", TextVariationRequest(prompt="red apple", num_inference_steps=2, seed=3), [], "k")
    made, shown = drawn(Device(settings, catalogue), plan, monkeypatch)
    assert made.texts
    assert shown == []


def test_large_unidiffusers_are_shown_as_stable_diffusions_latents() -> None:
    latents = torch.randn(1, 4, 64, 64)
    pictures = [previews._picture(resident(family), latents) for family in ("sd15", "unidiffuser")]
    assert pictures[0] is not None
    assert pictures[0] == pictures[1]
    assert (pictures[0].width, pictures[0].height) == (64, 64)


def test_fluxs_patches_are_put_where_they_belong(miniatures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(models=Models(default="m", device="cpu", cpu_threads=1, catalogue=[Model(id="m", family="flux", source=str(miniatures["flux"]))]))
    catalogue = Catalogue(settings)
    plan = catalogue.plan(GenerationRequest(prompt="x", seed=1, num_inference_steps=3, width=288, height=256), None, "k")
    with monkeypatch.context() as patched:
        patched.setitem(previews._FACTORS, "flux", previews._SD)  # the miniature has four channels
        patched.setitem(previews._BIAS, "flux", [0, 0, 0])
        made, shown = drawn(Device(settings, catalogue), plan, patched)
    assert made.problem is None
    assert [(each.width, each.height) for each in shown] == [(36, 32)] * 3
    # Latents that are one colour on the left and another on the right stay so.
    latents = torch.zeros(1, 16, 32, 36)
    latents[..., 18:] = 3
    packed = FluxPipeline._pack_latents(latents, 1, 16, 32, 36)
    picture = previews._picture(resident("flux"), previews._unpacked(packed, plan, resident("flux")))
    assert picture is not None
    pixels = array(picture)
    assert pixels.shape == (32, 36, 3)
    assert np.ptp(pixels[:, :18], axis=(0, 1)).max() == np.ptp(pixels[:, 18:], axis=(0, 1)).max() == 0
    assert np.abs(pixels[0, 0] - pixels[0, 35]).max() > 20
    unknown = plan.model_copy(update={"width": 640})
    assert previews._unpacked(packed, unknown, resident("flux")) is None


def resident(family: str) -> Any:
    base = SimpleNamespace(vae_scale_factor=8, _unpack_latents=FluxPipeline._unpack_latents)
    return SimpleNamespace(entry=SimpleNamespace(model=SimpleNamespace(family=family)), base=base)
