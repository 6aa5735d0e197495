"""Optimisations of catalogue entries: the same picture by other means, and combinations that cannot work refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from api import reading
from core.catalogue import Catalogue
from core.families import FAMILIES
from core.model_settings import Model, Models, UniDiffuser
from core.optimising import AttentionBackend, Optimise
from core.plans import Inputs, Pixels, Plan, PlannedLora
from core.problems import Problem
from core.settings import ROOT, Settings
from runners.device import Device
from runners.residency import Resident
from tests import lora_files

LORA = {"weight": 1.0, "sha256": None, "commercial_use": True, "credit": None}


@contextmanager
def optimised(miniatures: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch | None = None, **optimise: object) -> Iterator[Device]:
    """A device with one model. With `monkeypatch`, what needs a GPU is let be tried on a CPU."""
    model = Model(id="m", family=family, source=str(miniatures[family]), optimise=Optimise(**optimise))
    settings = Settings(models=Models(default="m", catalogue=[model], cpu_threads=1))
    if monkeypatch:
        monkeypatch.setattr(Models, "needs", lambda *_: [])
    before = torch.get_num_threads()
    device = Device(settings, Catalogue(settings))
    yield device
    device.queue.close()
    torch.set_num_threads(before)


def plan(device: Device, lora: Path | None = None, **values: object) -> Plan:
    side = FAMILIES[device.catalogue.find(None).model.family].min_size
    wanted = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "width": side, "height": side, **values}
    made = device.catalogue.plan(reading.parse(wanted), Inputs(), "test")
    return made.model_copy(update={"loras": [PlannedLora(name="l", path=str(lora), **LORA)]}) if lora else made


def draw(device: Device, lora: Path | None = None, **values: object) -> Pixels:
    return device.submit(plan(device, lora, **values), device.fetch(device.catalogue.find(None))).result(280).pictures[0]


def resident(device: Device) -> Resident:
    return device.residency.acquire(device.catalogue.find(None), device.fetch(device.catalogue.find(None)), torch.float32)


def levels(a: Pixels, b: Pixels) -> int:
    """The largest difference, of 255."""
    first, second = (np.frombuffer(p.data, np.uint8).astype(int) for p in (a, b))
    return int(abs(first - second).max())


@pytest.fixture(scope="module")
def plain(miniatures: dict[str, Path]) -> dict[str, Pixels]:
    """What each family draws as it is."""
    drawn = {}
    for family in ("sd15", "sdxl", "flux"):
        with optimised(miniatures, family) as device:
            drawn[family] = draw(device)
    return drawn


# What a server does that is started again, up to its first picture; it tells torch's counts of kernels made and taken from the cache.
SECOND_START = """
import json, pathlib, sys, torch
from tests import test_optimising
torch._inductor.config.cpp_cache_precompile_headers = False
with test_optimising.optimised({"sd15": pathlib.Path(sys.argv[1])}, "sd15", compile=True) as device:
    test_optimising.draw(device)
print(json.dumps(torch._dynamo.utils.counters["inductor"]))
"""
SAME = [
    ("sd15", {"attention_slicing": True}), ("sd15", {"vae_slicing": True}), ("sdxl", {"channels_last": True}), ("flux", {"channels_last": True}),
    ("flux", {"attention_backend": "_native_math"}),
    *((family, {"offload": offload}) for family in ("sd15", "sdxl", "flux") for offload in ("model", "sequential", "group")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "optimise"), SAME)
def test_an_optimised_model_draws_the_same_picture(
    family: str, optimise: dict, plain: dict[str, Pixels], miniatures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with optimised(miniatures, family, monkeypatch, **optimise) as device:
        assert levels(draw(device), plain[family]) <= 1
        assert (device.residency.snapshot([])[0].host_bytes > 0) == ("offload" in optimise)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_lora_acts_on_a_model_that_is_offloaded_whole(
    family: str, plain: dict[str, Pixels], miniatures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with optimised(miniatures, family) as device:
        lora = lora_files.write(tmp_path / "l.safetensors", lora_files.diffusers_layout(lora_files.matrices(resident(device).base, size=0.05)))
        styled = draw(device, lora)
    assert levels(styled, plain[family]) > 4
    with optimised(miniatures, family, monkeypatch, offload="model") as device:
        assert levels(draw(device, lora), styled) <= 1
        assert levels(draw(device), plain[family]) <= 1  # and is gone with its request


def test_each_optimisation_is_really_on(miniatures: dict[str, Path]) -> None:
    with optimised(miniatures, "sd15", attention_slicing=True, vae_slicing=True, vae_tiling=True, channels_last=True) as device:
        pipe = resident(device).base
        assert all(isinstance(p, SlicedAttnProcessor) for p in pipe.unet.attn_processors.values())
        assert pipe.vae.use_slicing
        assert pipe.vae.use_tiling
        assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    before = _AttentionBackendRegistry.get_active_backend()
    with optimised(miniatures, "flux", attention_backend="_native_math") as device:
        assert resident(device).base.transformer.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    assert _AttentionBackendRegistry.get_active_backend() == before  # other models keep theirs


def test_tiles_stand_for_a_large_picture(plain: dict[str, Pixels], miniatures: dict[str, Path]) -> None:
    tiles = []
    with optimised(miniatures, "sd15", vae_tiling=True) as device:
        decoder = resident(device).base.vae.decoder
        decoder.register_forward_hook(lambda *args: tiles.append(args[1][0].shape[-1]))
        picture = draw(device)
    assert len(tiles) > 1
    assert max(tiles) < picture.width // 8
    # Tiles have statistics of their own to normalise by, so that they are near the whole's, not the same.
    assert levels(picture, plain["sd15"]) > 0


def test_a_quantised_flux_is_smaller_and_takes_loras(plain: dict[str, Pixels], miniatures: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the extra `quantisation` is not installed")
    with optimised(miniatures, "flux") as device:
        whole = resident(device)
        lora = lora_files.write(tmp_path / "l.safetensors", lora_files.diffusers_layout(lora_files.matrices(whole.base, size=0.05)))
        styled = draw(device, lora)
    with optimised(miniatures, "flux", quantisation="int8") as device:
        assert levels(draw(device), plain["flux"]) <= 4
        small = resident(device)
        linear = [m for m in (*whole.base.transformer.modules(), *whole.base.text_encoder_2.modules()) if isinstance(m, torch.nn.Linear)]
        saved = sum(3 * m.weight.numel() for m in linear)  # float32 to int8
        assert small.bytes == pytest.approx(whole.bytes - saved, rel=0.1)
        assert levels(draw(device, lora), styled) <= 4
        assert levels(styled, plain["flux"]) > 4
        assert levels(draw(device), plain["flux"]) <= 4


def test_compiled_blocks_draw_the_same_and_are_kept_on_disk(plain: dict[str, Pixels], miniatures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself sets it when it is imported
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # undone after the test
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)  # they pay from the second kernel on
    (tmp_path / "configuration.yaml").write_text((ROOT / "configuration.yaml").read_text())
    monkeypatch.setenv("EASEL_CONFIGURATION", str(tmp_path / "configuration.yaml"))
    torch._dynamo.reset()
    with optimised(miniatures, "sd15", compile=True) as device:
        assert levels(draw(device), plain["sd15"]) <= 1
    assert list((tmp_path / "compile_cache/inductor").rglob("*.so"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    again = subprocess.run([sys.executable, "-c", SECOND_START, str(miniatures["sd15"])], cwd=ROOT, capture_output=True, text=True, timeout=280, check=True)
    kernels = json.loads(again.stdout.splitlines()[-1])
    assert kernels["fxgraph_cache_hit"] >= 1, kernels
    assert kernels.get("fxgraph_cache_miss", 0) == 0, "a second start compiled what the first one has kept"


@pytest.mark.parametrize(
    ("family", "source", "optimise", "said"),
    [
        ("flux", None, {"attention_slicing": True}, "cannot be sliced"),
        ("sd15", None, {"attention_backend": "native"}, "torch's own attention"),
        ("sd15", None, {"attention_backend": "fast"}, "Input should be 'native'"),
        ("sdxl", None, {"quantisation": "int8"}, "flux family"),
        ("flux", "a.safetensors", {"quantisation": "int8"}, "single file"),
        ("flux", None, {"quantisation": "int8", "offload": "sequential"}, "one by one"),
        ("sd15", None, {"compile": True, "offload": "group"}, "one by one"),
        ("sd15", None, {"device_map": "balanced", "offload": "model"}, "without offload"),
        ("unidiffuser", None, {"offload": "model"}, "UniDiffuser has vae_slicing"),
        ("sd15", None, {"xformers": True}, "Extra inputs"),
    ],
)
def test_what_cannot_go_together_is_refused(family: str, source: str | None, optimise: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Model(id="m", family=family, source=source, optimise=optimise)


@pytest.mark.parametrize(
    ("optimise", "gpus", "said"),
    [
        ({"offload": "model"}, 0, "runs on a CPU"),
        ({"device_map": "balanced"}, 1, "has 1"),
        ({"quantisation": "float8"}, 0, "use int8"),
        ({"attention_backend": "sage"}, 0, "needs a GPU"),
        ({"attention_backend": "sage"}, 1, "package sageattention"),
        ({"attention_backend": "_flash_3_hub"}, 1, "package kernels"),
    ],
)
def test_what_is_not_here_is_named(optimise: dict, gpus: int, said: str) -> None:
    found = Models(default="m", catalogue=[Model(id="m", family="flux", optimise=optimise)]).needs(gpus)
    assert "m: " in found[0]
    assert said in " ".join(found)


def test_what_can_be_had_is_not_refused() -> None:
    settings = [{"offload": "group"}, {"device_map": "balanced"}, {"attention_backend": "_native_cudnn"}, {"compile": True, "offload": "model"}, {}]
    for optimise in settings:
        assert not Models(default="m", catalogue=[Model(id="m", family="flux", optimise=optimise)]).needs(2)
    assert not UniDiffuser(default="m", catalogue=[Model(id="m", family="unidiffuser", optimise={"vae_tiling": True})]).needs(0)


def test_attention_backends_are_diffusers_own() -> None:
    assert set(get_args(AttentionBackend)) <= {b.value for b in AttentionBackendName}


def test_the_service_does_not_start_with_what_it_cannot_do(tmp_path: Path) -> None:
    configuration = yaml.safe_load((ROOT / "configuration.yaml").read_text())
    configuration["models"] |= {"device": "cpu"}
    configuration["models"]["catalogue"][0]["optimise"] = {"offload": "sequential"}
    (tmp_path / "configuration.yaml").write_text(yaml.safe_dump(configuration))
    env = {**os.environ, "EASEL_CONFIGURATION": str(tmp_path / "configuration.yaml"), "API_KEY": "k"}
    ended = subprocess.run([sys.executable, "-c", "import service"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Easel cannot start.")
    assert "starter/stable-diffusion: offload: sequential" in ended.stderr


def test_loras_are_refused_where_layers_are_moved_one_by_one(tmp_path: Path) -> None:
    registry = '{"l": {"base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "lora_path": "l.safetensors", "trigger words": []}}'
    (tmp_path / "lora_list.json").write_text(registry)
    (tmp_path / "l.safetensors").write_bytes(b"x")
    model = Model(id="stable-diffusion-v1-5/stable-diffusion-v1-5", family="sd15", optimise=Optimise(offload="group"))
    settings = Settings(models=Models(default=model.id, catalogue=[model]), loras={"registry": tmp_path / "lora_list.json", "folder": tmp_path})
    with pytest.raises(Problem, match="layer by layer") as caught:
        Catalogue(settings).plan(reading.parse({"prompt": "x", "lora": "l"}), Inputs(), "test")
    assert caught.value.details.errors[0].field == "lora"
