"""Nothing is computed twice: texts and pictures that a model has seen, and the half of a step that guidance of 1 or less does not need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import ControlNet, Model, Models
from core.plans import Inputs, Pixels, Plan, PlannedEmbedding, PlannedLora
from core.requests import GenerationRequest
from core.settings import Settings
from runners.device import Device
from runners.remembered import Remembered
from runners.residency import Resident
from tests import lora_files

SIZES = {"starter": 64, "sd15": 128, "sd2": 128, "sdxl": 256, "flux": 256}
ENCODERS = {"starter": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"], "flux": ["text_encoder", "text_encoder_2"]}


def picture(seed: int) -> Pixels:
    """Large blocks of colour, which a VAE does not average away."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Pixels(width=128, height=128, data=blocks.repeat(32, 0).repeat(32, 1).tobytes())


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [Model(id="starter", family="starter", source="starter/stable-diffusion")]
    entries += [Model(id=family, family=family, source=str(miniatures[family])) for family in ("sd15", "sd2", "sdxl", "flux")]
    settings = Settings(models=Models(default="starter", catalogue=entries, controlnets=[ControlNet(id="starter/controlnet-canny", family="starter")], cpu_threads=1))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, model: str, image: Pixels | None = None, mask: Pixels | None = None, control: Pixels | None = None, **values: object) -> Plan:
    asked = {"prompt": "red apple", "model_id": model, "num_inference_steps": 1 if image is None else 2, "width": SIZES[model], "height": SIZES[model], "seed": 1, **values}
    return device.catalogue.plan(GenerationRequest.model_validate(asked), Inputs(image=image, mask=mask, control_image=[control] if control else []), "test")


def run(device: Device, plan: Plan) -> Generation:
    device.fetch_guides(plan)
    outcome = device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(60)
    assert outcome.problem is None
    return outcome


def drawn(device: Device, model: str, **values: object) -> bytes:
    return run(device, planned(device, model, **values)).pictures[0].data


def resident(device: Device, model: str) -> Resident:
    entry = device.catalogue.find(model)
    return device.residency.acquire(entry, device.fetch(entry), torch.float32)


@contextlib.contextmanager
def passes(module: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of each pass through a module."""
    rows: list[int] = []

    def note(_: object, args: tuple, named: dict) -> None:
        first = next(t for t in (*args, *named.values()) if isinstance(t, torch.Tensor))
        rows.append(len(first))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@pytest.mark.parametrize("model", ENCODERS)
def test_a_text_is_read_once(device: Device, model: str) -> None:
    """Of three pictures, two have the same prompt, and all the same empty negative prompt."""
    here = resident(device, model)
    asked = [{"prompt": "red apple"}, {"prompt": "(blue:0.8) heart"}, {"prompt": "red apple", "seed": 2}]
    anew = []
    for each in asked:
        here.remembered.clear()
        anew.append(drawn(device, model, **each))
    here.remembered.clear()
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(passes(getattr(here.base, name))) for name in ENCODERS[model]]
        seen, found = [], []
        for each in asked:
            found.append(drawn(device, model, **each))
            seen.append([len(count) for count in counts])
    assert found == anew
    assert len(set(found)) == 3
    first, second, third = seen
    assert all(n > 0 for n in first)
    assert all(b > a for a, b in zip(first, second, strict=True))  # another text is read
    assert third == second


def test_clip_skip_and_length_are_told_apart(device: Device) -> None:
    long = "apple " * 100
    asked = [{}, {"clip_skip": 1}, {"prompt": long}, {"negative_prompt": long}, {}, {"clip_skip": 1}, {"prompt": long}]
    anew = []
    for each in asked:
        resident(device, "starter").remembered.clear()
        anew.append(drawn(device, "starter", **each))
    resident(device, "starter").remembered.clear()
    assert [drawn(device, "starter", **each) for each in asked] == anew
    assert len(set(anew)) == 4


def test_a_lora_that_a_text_encoder_has_changes_what_it_reads(device: Device, tmp_path: Path) -> None:
    here = resident(device, "starter")
    made = lora_files.matrices(DiffusionPipeline.from_pretrained("starter/stable-diffusion"), 3)
    both = lora_files.write(tmp_path / "both.safetensors", lora_files.diffusers_layout(made))
    denoiser = lora_files.write(tmp_path / "denoiser.safetensors", lora_files.diffusers_layout({"unet": made["unet"]}))

    def under(path: Path | None, weight: float = 1.0) -> bytes:
        loras = [PlannedLora(name="it", weight=weight, path=str(path), sha256=None, commercial_use=True, credit=None)] if path else []
        return run(device, planned(device, "starter").model_copy(update={"loras": loras})).pictures[0].data

    asked: list[tuple[Path | None, float]] = [(None, 1), (both, 1), (both, 0.5), (denoiser, 1), (both, 1)]
    anew = []
    for each in asked:
        here.remembered.clear()
        anew.append(under(*each))
    here.remembered.clear()
    with passes(here.base.text_encoder) as reads:
        found, counts = [], []
        for each in asked:
            found.append(under(*each))
            counts.append(len(reads))
    assert found == anew
    assert len(set(anew)) == 4
    plain, whole, half, only_denoiser, again = counts
    assert plain < whole < half
    assert only_denoiser == again == half  # the denoiser's LoRA changes nothing of what is read, and the last one was read before


def test_an_embedding_whose_file_was_replaced_is_read_anew(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    width = resident(device, "starter").base.text_encoder.config.hidden_size

    def with_vectors(seed: int) -> bytes:
        save_file({"emb_params": 3 * torch.randn(2, width, generator=torch.Generator().manual_seed(seed))}, path)
        planned_one = PlannedEmbedding(name="word", path=str(path), sha256=None, commercial_use=True, credit=None)
        return run(device, planned(device, "starter", prompt="a word").model_copy(update={"embeddings": [planned_one]})).pictures[0].data

    first, second = with_vectors(1), with_vectors(2)
    assert first != second
    assert with_vectors(1) == first


MASK = Pixels(width=128, height=128, data=bytes(128 * 64 * 3) + b"\xff" * (128 * 64 * 3))


@pytest.mark.parametrize("model", ["starter", "sdxl", "flux"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["img2img", "inpaint"])
def test_a_picture_is_encoded_once_and_drawn_from_as_if_anew(device: Device, model: str, mask: Pixels | None) -> None:
    here = resident(device, model)
    one, other = ({"image": picture(i), "mask": mask, "strength": 0.5, "num_inference_steps": 4} for i in (1, 2))
    asked = [one, {**one, "seed": 2}, other, one]
    anew = []
    with passes(here.base.vae.encoder) as without:
        for each in asked:
            here.remembered.clear()
            anew.append(drawn(device, model, **each))
    assert len(set(anew)) == 3  # the input is to be seen in what comes of it, and the seed
    here.remembered.clear()
    with passes(here.base.vae.encoder) as encoded:
        assert [drawn(device, model, **each) for each in asked] == anew
        assert len(encoded) == len(without) / 2  # two pictures of four; inpainting encodes what the mask leaves, too
        several = run(device, planned(device, model, **one, count_returned=3)).pictures
        assert len(encoded) == len(without) / 2
    assert len({p.data for p in several}) == 3


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    kept = Remembered(limit=100)
    made: list[str] = []

    def make(name: str, numbers: int = 10) -> torch.Tensor:
        (found,) = kept.get(name, lambda: (made.append(name), (torch.zeros(numbers),))[1])
        return found

    make("a"), make("b"), make("a"), make("c")
    assert kept.bytes == 80
    make("a"), make("b")
    assert made == ["a", "b", "c", "b"]
    make("too large", 26), make("a")
    assert made[4:] == ["too large"]
    assert kept.bytes == 80
    kept.get("view", lambda: (torch.zeros(1000)[:5],))
    assert kept.get("view", lambda: ())[0].untyped_storage().nbytes() == 20


def test_it_is_counted_with_its_model_and_goes_first_where_memory_is_short(device: Device) -> None:
    here = resident(device, "starter")
    here.remembered.clear()
    bare = here.bytes
    before = drawn(device, "starter", image=picture(1))
    assert bare < here.bytes == bare + here.remembered.bytes
    shown = next(m for m in device.residency.snapshot([]) if m.model_id == "starter")
    assert (shown.resident_bytes, shown.remembered_bytes) == (here.bytes, here.remembered.bytes)
    residency = device.residency
    residency.acquire(here.entry, Path(), torch.float32, room=residency.budget - residency.resident_bytes + 1)
    assert here.bytes == bare
    assert {m.model_id for m in residency.snapshot([]) if m.state == "warm"} >= {"starter", "sdxl"}  # no model had to go
    assert drawn(device, "starter", image=picture(1)) == before


HALVES = [
    ("starter", {}), ("sd15", {"image": picture(1)}), ("sd2", {}), ("sdxl", {}), ("sdxl", {"image": picture(1), "mask": MASK}),
    ("starter", {"controlnet": "starter/controlnet-canny", "preprocessor": "canny", "control": picture(1)}), ("starter", {"hr_scale": 1.5, "hr_steps": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "asked"), HALVES, ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain")
def test_guidance_of_one_or_less_computes_no_unconditional_half(device: Device, model: str, asked: dict) -> None:
    """Neither in the denoiser nor in the text encoder; and the negative prompt, however long, changes nothing."""
    here = resident(device, model)
    drawn_by: dict[float, bytes] = {}
    for guidance in (1.0, 0.0, 5.0):
        here.remembered.clear()
        negative = {"negative_prompt": "green " * 90} if guidance == 0 else {}
        with passes(here.base.unet) as rows, passes(here.base.text_encoder) as texts:
            drawn_by[guidance] = drawn(device, model, guidance_scale=guidance, **negative, **asked)
        assert set(rows) == {2 if guidance > 1 else 1}
        assert sum(texts) == (2 if guidance > 1 else 1)
    assert drawn_by[1.0] == drawn_by[0.0] != drawn_by[5.0]


def test_flux_is_told_its_guidance_and_runs_once_a_step(device: Device) -> None:
    here = resident(device, "flux")
    with passes(here.base.transformer) as rows:
        one, other = (drawn(device, "flux", guidance_scale=scale) for scale in (1.0, 7.0))
    assert rows == [1, 1]
    assert one != other
