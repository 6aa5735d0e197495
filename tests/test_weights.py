"""Weight files: which are read, what they take in memory, and the hash that a picture names its model by."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from core.catalogue import Catalogue
from core.model_settings import Family, Model, Models, UniDiffuser
from core.problems import Problem
from core.settings import Settings
from runners import loading, memory, weights
from runners.residency import Residency


def digest(*files: Path) -> list[str]:
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two precisions, with an image checker that is not loaded."""
    for name, dtype in (("diffusion_pytorch_model.safetensors", torch.float32), ("diffusion_pytorch_model.fp16.safetensors", torch.float16)):
        for component in ("unet", "vae", "safety_checker"):
            (tmp_path / component).mkdir(exist_ok=True)
            save_file({"w": torch.zeros(10, 30, dtype=dtype)}, tmp_path / component / name)
    return tmp_path


def test_a_folder_is_hashed_by_its_denoiser_in_the_wanted_variant(folder: Path) -> None:
    plain, half = folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    assert [weights.sha256(folder, None), weights.sha256(folder, "fp16")] == digest(plain, half)
    assert weights.sha256(plain, None) == digest(plain)[0]


def test_a_file_that_changed_is_hashed_anew(folder: Path) -> None:
    before = weights.sha256(folder, None)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({"w": torch.ones(10, 30)}, file)
    os.utime(file, ns=(1, 1))
    assert weights.sha256(folder, None) == digest(file)[0] != before


def test_a_file_that_is_added_is_read(folder: Path) -> None:
    assert weights.numbers(folder, None) == {"unet": [300], "vae": [300]}
    (folder / "text_encoder").mkdir()
    save_file({"w": torch.zeros(7)}, folder / "text_encoder" / "model.safetensors")
    assert weights.numbers(folder, None) == {"unet": [300], "vae": [300], "text_encoder": [7]}


def test_shards_are_hashed_by_their_hashes_and_cached_blobs_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "blobs").mkdir()
    first, second = (tmp_path / f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.zeros(3)}, first)
    named = tmp_path / "blobs" / ("ab" * 32)
    save_file({"b": torch.zeros(3)}, named)
    second.symlink_to(named)
    assert weights.sha256(tmp_path, None) == hashlib.sha256("\n".join([*digest(first), "ab" * 32]).encode()).hexdigest()


def test_memory_is_counted_by_what_will_be_loaded(folder: Path, miniatures: dict[str, Path]) -> None:
    assert weights.numbers(folder, "fp16") == weights.numbers(folder, None) == {"unet": [300], "vae": [300]}
    for family, path in ((f, p) for f, p in miniatures.items() if f in get_args(Family)):
        model = Model(id="m", family=family, source=str(path))
        starter = Model(id="starter/stable-diffusion", family="starter")  # an upscaler is no default model
        models = UniDiffuser(default="m", catalogue=[model]) if family == "unidiffuser" else Models(catalogue=[model, starter])
        entry = Catalogue(Settings(), models).find("m")
        resident = Residency(models, torch.device("cpu")).acquire(entry, path, torch.float32)
        assert memory.weights_at_rest(entry, path, torch.float32) == pytest.approx(resident.bytes, rel=0.05)


def test_a_folder_of_another_family_is_a_503_and_shown_as_failed(miniatures: dict[str, Path]) -> None:
    settings = Settings(models=Models(default="m", catalogue=[Model(id="m", family="sd15", source=str(miniatures["flux"]))]))
    entry = Catalogue(settings).find("m")
    home = Residency(settings.models, torch.device("cpu"))
    with pytest.raises(Problem) as caught:
        home.acquire(entry, loading.fetch(entry, None), torch.float32)
    assert caught.value.details.status == 503
    assert home.snapshot([entry])[0].state == "failed"
