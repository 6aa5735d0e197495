"""UniDiffuser's tasks on a miniature: as plain diffusers does them, alone and in a batch."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniDiffuserPipeline

from core import multimodal, schedulers
from core.catalogue import Catalogue
from core.generation import Generation, Vector
from core.images import to_pil
from core.model_settings import Model, Models, UniDiffuser
from core.multimodal import (
    CaptionRequest,
    EmbedRequest,
    JointRequest,
    PicturesRequest,
    PromptToImageRequest,
    TextsRequest,
    TextVariationRequest,
)
from core.plans import Pixels
from core.problems import Problem
from core.settings import ROOT, Settings
from runners.device import Device
from tests.conftest import held

FAST = {"num_inference_steps": 3, "seed": 7}
GUIDANCE = 8.0  # the family's default
# Another seed is another text here, and noise of its own another picture.
PICTURES = [Pixels(width=64, height=64, data=np.random.default_rng(i).integers(0, 256, 64 * 64 * 3, dtype=np.uint8).tobytes()) for i in range(3)]


@pytest.fixture(scope="module")
def source(miniatures: dict[str, Path]) -> Path:
    return miniatures["unidiffuser"]


@pytest.fixture(scope="module")
def device(source: Path) -> Iterator[Device]:
    models = UniDiffuser(default="mini", catalogue=[Model(id="mini", family="unidiffuser", source=str(source), size=64)], cpu_threads=1, max_batch=4)
    settings = Settings(unidiffuser=models)
    made = Device(settings, Catalogue(settings, models))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def plain(source: Path) -> UniDiffuserPipeline:
    pipe = UniDiffuserPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def submit(device: Device, task: str, request: object, *pictures: Pixels, client: str = "test") -> Future[Generation]:
    plan = multimodal.plan(device.catalogue, task, request, list(pictures), client)
    return device.submit(plan, device.fetch(device.catalogue.find(None)))


def do(device: Device, task: str, request: object, *pictures: Pixels) -> Generation:
    return submit(device, task, request, *pictures).result(120)


def array(pixels: Pixels) -> np.ndarray:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3).astype(float)


def floats(vector: Vector) -> np.ndarray:
    return np.frombuffer(vector.data, "<f4").reshape(vector.shape)


def refusal(catalogue: Catalogue, task: str, request: object) -> set[str]:
    with pytest.raises(Problem) as caught:
        multimodal.plan(catalogue, task, request, [], "me")
    assert caught.value.details.status == 422
    return {e.field for e in caught.value.details.errors}


def drawn_plainly(pipe: UniDiffuserPipeline, mode: str, seed: int, **inputs: object) -> tuple[np.ndarray | None, str | None]:
    pipe.mode = mode
    made = pipe(**inputs, num_inference_steps=3, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed), output_type="np")
    picture = None if made.images is None else (made.images[0] * 255).round()
    return picture, None if made.text is None else " ".join(made.text[0].split())


def test_diffusers_still_has_the_pipeline() -> None:
    """Fails when diffusers moves or drops it, or its range is widened: see "When diffusers drops it" in docs/unidiffuser.md."""
    module = importlib.import_module("diffusers.pipelines.deprecated.unidiffuser")
    assert UniDiffuserPipeline is module.UniDiffuserPipeline
    assert version("diffusers").startswith("0.42.")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "diffusers>=0.42.1,<0.43" in dependencies


def test_captions_are_those_of_the_plain_pipeline(device: Device, plain: UniDiffuserPipeline) -> None:
    """Six rows in two batches, decoded together, against one at a time."""
    said = do(device, "caption", CaptionRequest(count_returned=2, **FAST), *PICTURES)
    expected = [drawn_plainly(plain, "img2text", seed, image=to_pil(p))[1] for p in PICTURES for seed in (7, 8)]
    assert said.texts == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 2), (5.0, 4)])
def test_guidance_of_one_or_less_takes_one_pass_a_step(device: Device, guidance: float, passes: int) -> None:
    request = PromptToImageRequest(prompt="a cat", num_inference_steps=2, guidance_scale=guidance, seed=1)
    entry = device.catalogue.find(None)
    rows: list[int] = []
    hook = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        do(device, "generate", request)
    finally:
        hook.remove()
    assert sum(rows) == passes


@pytest.mark.parametrize(("task", "mode"), [("generate", "text2img"), ("joint", "joint"), ("image", "img"), ("text", "text")])
def test_each_mode_gives_what_the_plain_pipeline_gives(device: Device, plain: UniDiffuserPipeline, task: str, mode: str) -> None:
    """Pictures to 1 of 255 levels: a CPU's batched kernels add in another order."""
    requests = {"generate": PromptToImageRequest(prompt="a cat", count_returned=2, **FAST), "joint": JointRequest(count_returned=2, **FAST)}
    requests |= {"image": PicturesRequest(count_returned=2, **FAST), "text": TextsRequest(count_returned=2, **FAST)}
    made = do(device, task, requests[task])
    for i in range(2):
        picture, text = drawn_plainly(plain, mode, 7 + i, **({"prompt": "a cat"} if task == "generate" else {}))
        if picture is not None:
            assert np.abs(array(made.pictures[i]) - picture).max() <= 1
        if text is not None:
            assert made.texts[i] == text
    assert (len(made.pictures), len(made.texts)) == {"generate": (2, 0), "joint": (2, 2), "image": (2, 0), "text": (0, 2)}[task]


def test_variations_go_to_the_other_modality_and_back(device: Device) -> None:
    varied = do(device, "image_variation", JointRequest(**FAST), PICTURES[0])
    assert varied.texts == do(device, "caption", CaptionRequest(**FAST), PICTURES[0]).texts
    assert len(varied.pictures) == 1
    texts = [do(device, "text_variation", TextVariationRequest(prompt=p, count_returned=2, **FAST)) for p in ("a cat", "a dog")]
    assert [(len(t.texts), len(t.pictures)) for t in texts] == [(2, 0)] * 2


def test_embeddings_are_clips_projection_and_the_vaes_scaled_mean(device: Device, plain: UniDiffuserPipeline) -> None:
    """To 1e-5, in a batch."""
    made = do(device, "embed", EmbedRequest(), *PICTURES)
    for picture, embedding in zip(PICTURES, made.embeddings, strict=True):
        image = to_pil(picture)
        with torch.no_grad():
            clip = plain.image_encoder(**plain.clip_image_processor(image, return_tensors="pt")).image_embeds[0]
            vae = plain.vae.encode(plain.image_processor.preprocess(image)).latent_dist.mode()[0] * plain.vae.config.scaling_factor
        assert np.allclose(floats(embedding.clip), clip, atol=1e-5)
        assert np.allclose(floats(embedding.vae), vae, atol=1e-5)
    assert made.ran.steps_run == 0


def test_callers_share_a_batch_and_each_gets_what_it_gets_alone(device: Device) -> None:
    """Captions equal, pictures to 1 of 255 levels, embeddings to 1e-5."""
    pipe = device.residency.acquire(device.catalogue.find(None), device.fetch(device.catalogue.find(None)), torch.float32).base
    asked = [
        *(("caption", CaptionRequest(num_inference_steps=3, seed=s), p) for s, p in zip((1, 2, 3), PICTURES, strict=True)),
        *(("embed", EmbedRequest(), p) for p in PICTURES),
        *(("generate", PromptToImageRequest(prompt=w, num_inference_steps=3, seed=s)) for s, w in enumerate(("cat", "dog", "fish"))),
    ]
    alone = [do(device, *each) for each in asked]
    steps: list[int] = []
    encoded: list[int] = []
    hooks = [
        pipe.unet.register_forward_pre_hook(lambda _, inputs: steps.append(len(inputs[0]))),
        pipe.image_encoder.register_forward_pre_hook(lambda _, __, named: encoded.append(len(named["pixel_values"])), with_kwargs=True),
    ]
    go = held(device)
    futures = [submit(device, *each, client=f"client{i}") for i, each in enumerate(asked)]
    go.set()
    together = [f.result(60) for f in futures]
    for hook in hooks:
        hook.remove()
    assert steps == [3] * 12  # two tasks, three steps, with and without the condition
    assert encoded == [3, 3]
    for one, other in zip(alone, together, strict=True):
        assert one.texts == other.texts
        assert one.seeds == other.seeds
        for a, b in zip(one.pictures, other.pictures, strict=True):
            assert np.abs(array(a) - array(b)).max() <= 1
        for e, f in zip(one.embeddings, other.embeddings, strict=True):
            assert np.allclose(floats(e.clip), floats(f.clip), atol=1e-5)
            assert np.allclose(floats(e.vae), floats(f.vae), atol=1e-5)


def test_other_settings_do_not_share_a_batch(device: Device) -> None:
    pipe = device.residency.acquire(device.catalogue.find(None), device.fetch(device.catalogue.find(None)), torch.float32).base
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    go = held(device)
    steps = (2, 3, 2)
    futures = [submit(device, "text", TextsRequest(num_inference_steps=n), client=f"client{i}") for i, n in enumerate(steps)]
    go.set()
    ran = [f.result(60).ran for f in futures]
    hook.remove()
    assert rows == [2, 2, 1, 1, 1]
    assert [r.steps_run for r in ran] == list(steps)


def test_a_cancel_stops_within_one_step_and_between_the_tokens_of_a_text(device: Device) -> None:
    pipe = device.residency.acquire(device.catalogue.find(None), device.fetch(device.catalogue.find(None)), torch.float32).base
    plan = multimodal.plan(device.catalogue, "text", TextsRequest(num_inference_steps=20), [], "test").model_copy(update={"id": "to-cancel"})
    for network, last in ((pipe.unet, 3), (pipe.text_decoder.transformer, 5)):
        calls: list[int] = []

        def counted(*_: object, calls: list[int] = calls, last: int = last) -> None:
            calls.append(1)
            if len(calls) == last:
                assert device.queue.cancel("to-cancel")

        hook = network.register_forward_pre_hook(counted)
        outcome = device.submit(plan, device.fetch(device.catalogue.find(None))).exception(60)
        hook.remove()
        assert outcome.details.status == 499
        assert len(calls) == last
    assert do(device, "text", TextsRequest(**FAST)).texts


def test_every_scheduler_on_offer_samples(device: Device) -> None:
    names = schedulers.names(unscaled=True)
    assert "Euler" not in names
    for name in names:
        if schedulers.find(name, unscaled=True).schedule is None:  # texts' latents have three dimensions, pictures' two
            assert do(device, "text", TextsRequest(scheduler=name, num_inference_steps=6, seed=1)).texts
        made = do(device, "image", PicturesRequest(scheduler=name, num_inference_steps=6, seed=1))
        assert len(set(made.pictures[0].data)) > 3, name
        assert f"{made.ran.scheduler} {made.ran.schedule or ''}".strip() == name


def test_which_parts_of_a_prompt_it_cannot_read_is_told(device: Device) -> None:
    ran = do(device, "generate", PromptToImageRequest(prompt="(cat:1.3) " + "dog " * 100, **FAST)).ran
    assert ran.prompt_tokens - ran.prompt_tokens_cut == 75
    assert [word for word in ("weights", "cut") if any(word in note for note in ran.notes)] == ["weights", "cut"]
    assert do(device, "generate", PromptToImageRequest(prompt="cat", **FAST)).ran.notes == []


def test_a_size_that_is_not_the_models_is_a_503_that_says_so(source: Path) -> None:
    models = UniDiffuser(default="mini", catalogue=[Model(id="mini", family="unidiffuser", source=str(source), size=512)])
    settings = Settings(unidiffuser=models)
    other = Device(settings, Catalogue(settings, models))
    with pytest.raises(Problem, match="mend its `size`"):
        do(other, "text", TextsRequest(**FAST))
    other.queue.close()


def test_what_the_pipeline_cannot_honour_is_refused(device: Device) -> None:
    def asked(**values: object) -> PromptToImageRequest:
        return PromptToImageRequest(prompt="x", **values)

    assert refusal(device.catalogue, "generate", asked(negative_prompt="y", strength=0.5, clip_skip=1, width=128)) == {"negative_prompt", "strength", "clip_skip", "width"}
    assert refusal(device.catalogue, "generate", asked(scheduler="Euler")) == {"scheduler"}
    assert refusal(device.catalogue, "caption", CaptionRequest(num_inference_steps=1000, count_returned=99)) == {"num_inference_steps", "count_returned"}
    assert refusal(device.catalogue, "embed", EmbedRequest(model_id="starter/stable-diffusion")) == {"model_id"}


def test_data_type_is_unidiffusers_or_a_precision() -> None:
    def read(value: object) -> tuple[int, str | None]:
        made = CaptionRequest.model_validate({"data_type": value})
        return made.data_type, made.torch_dtype

    assert [read(v) for v in (0, "1", "torch.float16", "bf16")] == [(0, None), (1, None), (1, "float16"), (1, "bfloat16")]
    for bad in (2, "int8", ""):
        with pytest.raises(ValueError, match="data_type"):
            read(bad)


def test_each_family_stands_in_its_own_catalogue() -> None:
    for section, family in ((Models, "unidiffuser"), (UniDiffuser, "sd15")):
        with pytest.raises(ValueError, match="cannot hold m"):
            section(default="m", catalogue=[Model(id="m", family=family)])
