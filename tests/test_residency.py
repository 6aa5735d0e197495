"""Models come when asked for, go when idle, make room for each other, and give their memory back."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch

from core.catalogue import Catalogue
from core.families import Entry
from core.model_settings import Model, Models
from core.problems import Problem
from core.settings import Settings
from runners import loading
from runners.residency import Residency

CPU = torch.device("cpu")
STARTER = Model(id="starter/stable-diffusion", family="starter")


def entry(model: Model) -> Entry:
    return Catalogue(Settings(models=Models(default=model.id, catalogue=[model]))).find(model.id)


def residency(**settings: object) -> Residency:
    return Residency(Models(default=STARTER.id, catalogue=[STARTER], **settings), CPU)


def acquire(home: Residency, model: Model):
    made = entry(model)
    return home.acquire(made, loading.fetch(made, None), torch.float32)


def warm(home: Residency) -> set[str]:
    return {m.model_id for m in home.snapshot([]) if m.state == "warm"}


def test_a_model_is_loaded_once_and_measured() -> None:
    home = residency()
    first = acquire(home, STARTER)
    assert acquire(home, STARTER) is first
    counted = sum(p.numel() for m in ("unet", "vae", "text_encoder") for p in getattr(first.base, m).parameters()) * 4
    assert counted <= first.bytes < 1.05 * counted
    assert first.pipeline("img2img").text_encoder is first.base.text_encoder
    assert first.pipeline("img2img") is not first.pipeline("img2img")  # each is its caller's own


def test_an_idle_model_is_unloaded_after_its_own_timeout(miniatures: dict[str, Path]) -> None:
    home = residency(idle_timeout_s=60)
    acquire(home, STARTER)
    acquire(home, Model(id="brief", family="sd15", source=str(miniatures["sd15"]), idle_timeout_s=0.05))
    time.sleep(0.1)
    home.sweep()
    assert warm(home) == {"starter/stable-diffusion"}


def test_the_least_recently_used_makes_room(miniatures: dict[str, Path]) -> None:
    a, b, c = (Model(id=n, family="sd15", source=str(miniatures["sd15"])) for n in "abc")
    size = acquire(residency(), a).bytes
    home = residency(memory_budget_bytes=int(size * 2.5))
    acquire(home, a), acquire(home, b)
    acquire(home, a)
    acquire(home, c)
    assert warm(home) == {"a", "c"}


def test_a_model_larger_than_the_budget_is_refused() -> None:
    home = residency(memory_budget_bytes=1000)
    with pytest.raises(Problem, match="memory_budget_bytes"):
        acquire(home, STARTER)
    assert home.snapshot([entry(STARTER)])[0].state == "failed"


def test_memory_is_given_back_by_unloading() -> None:
    process, home, after = psutil.Process(), residency(), []
    for _ in range(20):
        acquire(home, STARTER)
        home.unload(None)
        after.append(process.memory_info().rss)
    assert after[-1] <= after[0] * 1.05
