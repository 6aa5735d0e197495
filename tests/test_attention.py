"""Keys and values of the texts are made once for all steps, and the pictures are the same to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from core.generation import Generation
from core.model_settings import Model
from runners.attention import Kept, numbers, plain, repeat_nothing
from runners.device import Device
from tests import lora_files, miniatures
from tests.conftest import held, wait_for
from tests.test_batching import GUIDED, PICTURE, drawing, planned, submit


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    with drawing([Model(id="starter", family="starter", source="starter/stable-diffusion"), Model(id="sdxl", family="sdxl", source=str(miniatures["sdxl"]))]) as made:
        yield made


def unet(device: Device, model: str = "starter") -> nn.Module:
    entry = device.catalogue.find(model)
    network: nn.Module = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.unet
    return network


def layers(network: nn.Module) -> list[nn.Module]:
    return [block.attn2 for block in network.modules() if isinstance(block, BasicTransformerBlock)]


def kept(network: nn.Module) -> list[Kept]:
    return [layer.forward.args[1] for layer in layers(network)]


def draw(device: Device, *asked: dict) -> tuple[list[Generation], list[int]]:
    """What requests that wait at the same time get, and how many rows the first layer's keys were made for, time after time."""
    rows: list[int] = []
    model = asked[0].get("model_id", "starter")
    hook = layers(unet(device, model))[0].to_k.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    go = held(device)
    futures = [submit(device, planned(device, client=f"client{i}", **each)) for i, each in enumerate(asked)]
    go.set()
    try:
        return [f.result(60) for f in futures], rows
    finally:
        hook.remove()


def plainly(device: Device, **asked: object) -> Generation:
    """The picture as diffusers draws it, with nothing kept."""
    with plain(unet(device, str(asked.get("model_id", "starter")))):
        return draw(device, asked)[0][0]


@pytest.mark.parametrize(
    "asked",
    [{}, {"guidance_scale": 1}, {"image": PICTURE, "strength": 1, "scheduler": "Euler a"}, GUIDED, {"model_id": "sdxl"}, {"prompt": "apple " * 100}, {"hr_scale": 1.5, "hr_steps": 2}],
    ids=["plain", "unguided", "img2img", "controlnet", "sdxl", "long", "hires"],
)
def test_they_are_made_once_and_the_picture_is_the_same(device: Device, asked: dict) -> None:
    asked = {"num_inference_steps": 4, "seed": 3, **asked}
    theirs = plainly(device, **asked)
    (made,), rows = draw(device, asked)
    assert made.ran.steps_run >= 4
    assert rows == [1 if asked.get("guidance_scale") == 1 else 2] * (2 if "hr_scale" in asked else 1)
    assert made.pictures[0].data == theirs.pictures[0].data


def test_a_lora_acts_on_them(device: Device, tmp_path: Path) -> None:
    matrices = lora_files.diffusers_layout(lora_files.matrices(device.residency.acquire(device.catalogue.find("starter"), Path(), torch.float32).base, 1, size=0.2))
    path = lora_files.write(tmp_path / "one.safetensors", matrices)
    assert any("attn2.to_k" in key for key in matrices)
    asked = [{"seed": 3, "num_inference_steps": 4, "loras": loras} for loras in ([(path, 1.0)], [(path, 0.5)], [])]
    theirs = [plainly(device, **each).pictures[0].data for each in asked]
    assert [draw(device, each)[0][0].pictures[0].data for each in asked] == theirs  # one after another: nothing of one is left for the next
    assert len(set(theirs)) == 3


def test_with_others_they_are_made_anew_when_one_goes(device: Device) -> None:
    asked = [{"seed": seed, "num_inference_steps": steps} for seed, steps in ((1, 6), (2, 4), (3, 4))]
    shared, rows = draw(device, *asked)
    assert rows == [6, 2]  # three pictures with their unconditional halves, then the longest alone
    assert [g.ran.steps_run for g in shared] == [6, 4, 4]


def test_they_go_with_the_texts(device: Device) -> None:
    draw(device, {"seed": 1})
    found = kept(unet(device))
    assert len(found) == 7
    wait_for(lambda: not any(layer._keys or layer._values for layer in found), 10)  # the answer is there a little before the step ends
    network = UNet2DConditionModel(**miniatures.sdxl().unet.config)
    repeat_nothing(network)
    texts = torch.randn(2, 77, network.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, miniatures.sdxl().text_encoder_2.config.projection_dim), "time_ids": torch.randn(2, 6)}
    with torch.no_grad():
        network(torch.randn(2, 4, 16, 16), 1, texts, added_cond_kwargs=added)
    sizes = [t.numel() for layer in kept(network) for each in (layer._keys, layer._values) for t in each.values()]
    assert sum(sizes) == numbers(network) * 2 * 77 > 0
    del texts
    assert all(not layer._keys and not layer._values for layer in kept(network))


def test_compiled_blocks_make_them_themselves(miniatures: dict[str, Path]) -> None:
    entries = [Model(id="sdxl", family="sdxl", source=str(miniatures["sdxl"]), optimise={"compile": True})]
    with drawing(entries) as made:
        assert not any("forward" in vars(layer) for layer in layers(unet(made, "sdxl")))
