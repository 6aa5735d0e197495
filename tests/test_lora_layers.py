"""LoRAs on the miniature of each family: layouts, switching, memory, and a model that is never harmed."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from core.plans import PlannedLora
from core.problems import Problem
from runners.adapters import Adapters
from runners.lora_files import _scale
from tests import lora_files, miniatures

FAMILIES = ("sd15", "sd2", "sdxl", "flux")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipes() -> dict[str, DiffusionPipeline]:
    made = {}
    for family, make in miniatures.MAKERS.items():
        if family in FAMILIES:
            torch.manual_seed(0)
            made[family] = make()
            made[family].set_progress_bar_config(disable=True)
            for part in made[family].components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
    return made


@pytest.fixture
def adapters(pipes: dict[str, DiffusionPipeline]) -> Iterator[Adapters]:
    """On SD 1.5; afterwards the model is as it was."""
    made = Adapters(pipes["sd15"], "small", 2**30)
    yield made
    empty(made)


def empty(adapters: Adapters) -> None:
    adapters.apply([])
    while adapters._loaded:
        adapters._drop(next(iter(adapters._loaded)))


def draw(pipe: DiffusionPipeline, size: int = 64) -> np.ndarray:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return pipe("a cat", num_inference_steps=2, width=size, height=size, generator=torch.Generator().manual_seed(0), output_type="np").images


def lora(path: Path, weight: float = 1, name: str = "it") -> PlannedLora:
    return PlannedLora(name=name, weight=weight, path=str(path), sha256=None, commercial_use=True, credit=None)


def file(pipe: DiffusionPipeline, folder: Path, name: str = "a", seed: int = 0, **options: object) -> Path:
    return lora_files.write(folder / f"{name}.safetensors", lora_files.diffusers_layout(lora_files.matrices(pipe, seed, **options)))


def merged(pipe: DiffusionPipeline, made: lora_files.Matrices, sign: int) -> None:
    """Add the LoRA to the weights themselves: W + sign * alpha / rank * B A."""
    with torch.no_grad():
        for component, modules in made.items():
            for path, (a, b) in modules.items():
                pipe.components[component].get_submodule(path).weight += sign * lora_files.ALPHA / lora_files.RANK * (b @ a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
def test_every_layout_draws_what_merged_weights_draw(pipes: dict[str, DiffusionPipeline], tmp_path: Path, family: str, layout: str) -> None:
    pipe = pipes[family]
    made = lora_files.matrices(pipe, encoders=layout != "peft")  # PEFT's has the denoiser alone
    plain = draw(pipe)
    path = lora_files.write(tmp_path / "x.safetensors", lora_files.LAYOUTS[layout](made))
    adapters = Adapters(pipe, family, 2**30)
    applied = adapters.apply([lora(path)])
    drawn = draw(pipe)
    assert (applied[0].layers, applied[0].unmatched) == (sum(map(len, made.values())), 0)
    empty(adapters)
    merged(pipe, made, 1)
    expected = draw(pipe)
    merged(pipe, made, -1)
    assert np.abs(drawn - expected).max() < 1e-3
    assert np.abs(drawn - plain).max() > 0.1


def layers_of_peft(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    components = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    return [m for component in components for m in component.modules() if isinstance(m, BaseTunerLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_requests_draw_the_same_bytes_before_beside_and_after_loras(pipes: dict[str, DiffusionPipeline], tmp_path: Path, family: str) -> None:
    pipe = pipes[family]
    first, second = file(pipe, tmp_path, "a", 1), file(pipe, tmp_path, "b", 2)
    adapters, plain = Adapters(pipe, family, 2**30), draw(pipe)
    adapters.apply([lora(first)])
    alone = draw(pipe)
    assert not np.array_equal(alone, plain)
    assert layers_of_peft(pipe)
    adapters.apply([])
    assert not layers_of_peft(pipe)  # each would cost time, LoRA or none
    assert np.array_equal(draw(pipe), plain)
    adapters.apply([lora(first, 0.5), lora(second, -0.7)])
    both = draw(pipe)
    adapters.apply([lora(first)])
    assert np.array_equal(draw(pipe), alone)
    adapters.apply([lora(second, -0.7), lora(first, 0.5)])
    assert np.abs(draw(pipe) - both).max() < 1e-4
    empty(adapters)
    assert np.array_equal(draw(pipe), plain)
    assert not layers_of_peft(pipe)


def test_weight_scales_the_change_and_zero_is_none(adapters: Adapters, tmp_path: Path) -> None:
    pipe, path = adapters.pipe, file(adapters.pipe, tmp_path, size=0.1)
    plain = draw(pipe)
    changes = []
    for weight in (0, 0.1, 1):
        adapters.apply([lora(path, weight)])
        changes.append(np.abs(draw(pipe) - plain).mean())
    assert changes[0] < 1e-6 < changes[1] < changes[2]


PATTERNS = [("attn1.to_q", True), ("^{}$", True), ("{}", True), ("^attn1.to_q", False), ("ttn1.to_q", False), ("attn1.to_k", False)]


@pytest.mark.parametrize(("pattern", "meant"), [*PATTERNS, (r"attn1\.to_q$", True)])
def test_a_layers_own_alpha_is_found_by_its_name(pattern: str, meant: bool) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    settings = {"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern.format(layer): 12}}
    assert _scale(settings, "unet", layer, 4) == (3 if meant else 1)


def test_alpha_in_the_header_is_heeded(adapters: Adapters, tmp_path: Path) -> None:
    made = lora_files.matrices(adapters.pipe)
    raw = {k: v / (lora_files.ALPHA / lora_files.RANK) if "lora_B" in k else v for k, v in lora_files.diffusers_layout(made).items()}
    header = '{"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 8}'
    adapters.apply([lora(lora_files.write(tmp_path / "raw.safetensors", raw, {"lora_adapter_metadata": header}))])
    with_header = draw(adapters.pipe)
    adapters.apply([lora(lora_files.write(tmp_path / "folded.safetensors", lora_files.diffusers_layout(made)))])
    assert np.abs(draw(adapters.pipe) - with_header).max() < 1e-5


def test_layers_that_the_model_lacks_are_counted(adapters: Adapters, tmp_path: Path) -> None:
    tensors = lora_files.diffusers_layout(lora_files.matrices(adapters.pipe, encoders=False))
    extra = {"unet.nowhere.to_q.lora_A.weight": torch.ones(4, 8), "unet.nowhere.to_q.lora_B.weight": torch.ones(8, 4), "other.lora_A.weight": torch.ones(2, 2)}
    applied = adapters.apply([lora(lora_files.write(tmp_path / "x.safetensors", tensors | extra))])
    assert (applied[0].layers, applied[0].unmatched) == (36, 2)


def broken(kind: str, pipe: DiffusionPipeline, folder: Path) -> Path:
    tensors = lora_files.diffusers_layout(lora_files.matrices(pipe))
    path, first = folder / f"{kind}.safetensors", next(iter(tensors))
    if kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "cut":
        lora_files.write(path, tensors)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "nan":
        lora_files.write(path, tensors | {first: torch.full_like(tensors[first], float("nan"))})
    elif kind == "half a pair":
        lora_files.write(path, {k: v for k, v in tensors.items() if k != first})
    elif kind == "wrong shape":
        lora_files.write(path, {k: torch.ones(4, 7) if "text_encoder" in k and "lora_A" in k else v for k, v in tensors.items()})
    elif kind == "strange keys":
        lora_files.write(path, {"lora_unet_down.lora_down.weight": torch.ones(2, 2)})
    elif kind == "dora":
        lora_files.write(path, {**tensors, "unet.mid_block.attentions.0.proj_in.dora_scale": torch.ones(2)})
    elif kind == "another model":
        lora_files.write(path, {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2), "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(2, 2)})
    elif kind == "endless pattern":  # PEFT would match it against the layers' names
        lora_files.write(path, tensors, {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {r"([\w.]+)+!": 4}})})
    elif kind == "no LoRA":
        lora_files.write(path, {"x": torch.ones(2)})
    return path


@pytest.mark.parametrize(
    ("kind", "status", "slug"),
    [
        ("missing", 503, "lora-missing"), ("text", 503, "lora-broken"), ("cut", 503, "lora-broken"), ("nan", 503, "lora-broken"),
        ("half a pair", 422, "lora-unfit"), ("wrong shape", 422, "lora-unfit"), ("strange keys", 422, "lora-unfit"), ("dora", 422, "lora-unfit"),
        ("endless pattern", 422, "lora-unfit"), ("another model", 422, "lora-no-effect"), ("no LoRA", 422, "lora-no-effect"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_problem_and_harms_nothing(adapters: Adapters, tmp_path: Path, kind: str, status: int, slug: str) -> None:
    pipe, good = adapters.pipe, file(adapters.pipe, tmp_path, "good")
    plain = draw(pipe)
    adapters.apply([lora(good)])
    expected = draw(pipe)
    with pytest.raises(Problem, match="poor") as caught:
        adapters.apply([lora(good), lora(broken(kind, pipe, tmp_path), name="poor")])
    assert (caught.value.details.status, caught.value.details.type.rpartition(":")[2]) == (status, slug)
    assert np.array_equal(draw(pipe), plain)
    adapters.apply([lora(good)])
    assert np.array_equal(draw(pipe), expected)
    assert [x.name for x in adapters.snapshot()] == ["it"]


def test_the_least_recently_used_go_when_the_budget_is_full(adapters: Adapters, tmp_path: Path) -> None:
    paths = [file(adapters.pipe, tmp_path, str(i), i) for i in range(4)]
    adapters.apply([lora(paths[0])])
    size = adapters.bytes
    adapters.budget = max(3 * size, 2 * size + paths[0].stat().st_size)
    for use in ([0], [1], [0], [2], [3, 0]):
        adapters.apply([lora(paths[i], name=str(i)) for i in use])
    assert {x.name for x in adapters.snapshot()} >= {"3"}
    assert "1" not in {x.name for x in adapters.snapshot()}
    assert adapters.bytes <= adapters.budget
    with pytest.raises(Problem, match="memory_budget_bytes"):
        adapters.apply([lora(p, 0.1, str(i)) for i, p in enumerate(paths)])
    plain = draw(adapters.pipe)
    empty(adapters)
    assert np.array_equal(draw(adapters.pipe), plain)


def test_a_replaced_file_is_read_anew(adapters: Adapters, tmp_path: Path) -> None:
    path = file(adapters.pipe, tmp_path, seed=1)
    first = adapters.apply([lora(path)])[0].sha256
    drawn = draw(adapters.pipe)
    file(adapters.pipe, tmp_path, seed=2)
    os.utime(path, ns=(1, 1))
    assert adapters.apply([lora(path)])[0].sha256 != first
    assert not np.array_equal(draw(adapters.pipe), drawn)
    assert len(adapters.snapshot()) == 1


def test_loading_and_dropping_again_and_again_keeps_no_memory(adapters: Adapters, tmp_path: Path) -> None:
    path = file(adapters.pipe, tmp_path, encoders=False)

    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))

    counts = []
    for cycle in range(20):
        adapters.apply([lora(path)])
        empty(adapters)
        if cycle in (0, 19):
            counts.append(tensors())
    assert counts[1] <= counts[0]


def test_a_lora_takes_the_models_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = miniatures.sd15().to(torch.bfloat16)
    adapters = Adapters(pipe, "small", 2**30)
    path = file(pipe, tmp_path)
    adapters.apply([lora(path)])
    assert abs(adapters.bytes / path.stat().st_size - 0.5) < 0.2
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_layers_of_several_ranks_draw_what_merged_weights_draw(adapters: Adapters, tmp_path: Path) -> None:
    pipe, made = adapters.pipe, lora_files.matrices(adapters.pipe)
    for i, (layer, (a, b)) in enumerate(made["unet"].items()):
        made["unet"][layer] = (a[: i % 3 + 1], b[:, : i % 3 + 1])
    adapters.apply([lora(lora_files.write(tmp_path / "x.safetensors", lora_files.diffusers_layout(made)))])
    drawn = draw(pipe)
    empty(adapters)
    merged(pipe, made, 1)
    expected = draw(pipe)
    merged(pipe, made, -1)
    assert np.abs(drawn - expected).max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_pass_have_loras_of_their_own(pipes: dict[str, DiffusionPipeline], tmp_path: Path, family: str) -> None:
    pipe = pipes[family]
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    adapters, given = Adapters(pipe, family, 2**30), []
    hook = network.register_forward_pre_hook(lambda _, args, named: given.append((args, named)), with_kwargs=True)
    draw(pipe)
    hook.remove()
    args, named = given[0]

    def out(repeats: int) -> torch.Tensor:
        def wider(value: object) -> object:
            if isinstance(value, dict):
                return {k: wider(v) for k, v in value.items()}
            return torch.cat([value[:1]] * repeats) if isinstance(value, torch.Tensor) and value.ndim else value

        kept = {k: v for k, v in named.items() if k in ("txt_ids", "img_ids")}
        with torch.no_grad():
            return network(*map(wider, args), **{k: wider(v) for k, v in named.items() if k not in kept}, **kept)[0]

    alone, acting = [out(1)], [()]
    paths = [file(pipe, tmp_path, str(n), n) for n in range(2)]
    for n, weight in ((0, 0.5), (1, 1.0), (0, -1.0)):
        adapters.apply([lora(paths[n], weight)])
        alone.append(out(1))
        acting.append(adapters.acting)
    order = [1, 0, 2, 3, 1, 2, 0]  # rows of one LoRA that are neighbours, and that are not
    adapters.act_by_row([acting[i] for i in order])
    mixed = out(len(order))
    adapters.act_by_row([()] * 3)
    assert torch.allclose(out(3)[1], alone[0][0], atol=1e-4)
    assert not layers_of_peft(pipe)
    adapters.act_by_row([acting[i] for i in order])
    assert all(torch.allclose(mixed[row], alone[i][0], atol=1e-4) for row, i in enumerate(order))
    assert min((alone[i] - alone[j]).abs().max() for i in range(4) for j in range(i)) > 1e-2
    with pytest.raises(ValueError, match="1 rows came to a layer, of 7"):
        out(1)
    empty(adapters)
    assert torch.equal(out(1), alone[0])
