"""Embeddings (textual inversion): found by name, read as diffusers reads them, for one request alone;
and that `washed_out` in the negative prompt makes colours stronger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from api import answering, reading
from core import embeddings, metadata
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Plan
from core.problems import Problem
from core.settings import ROOT, Loras, Settings
from runners import prompts
from runners.device import Device
from tests.conftest import held

SIZES = {"starter": 64, "sd15": 128, "sd2": 128, "sdxl": 256, "flux": 256}
WIDTHS = {"starter": 192, "sd15": 32, "sd2": 32, "sdxl": 32, "flux": 32}


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return 0.5 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


FILES = {  # name: family, tensors
    "glow": ("starter", {"emb_params": vectors(2, 192)}),
    "Bad (Hands)-5": ("sd15", {"emb_params": vectors(3, 32)}),
    "bad": ("sd15", {"<toy>": vectors(1, 32, 1)[0]}),
    "v2": ("sd2", {"emb_params": vectors(1, 32, 2)}),
    "large": ("sdxl", {"clip_l": vectors(2, 32, 3), "clip_g": vectors(2, 32, 4)}),
    "wide": ("sd15", {"emb_params": vectors(1, 48)}),
    "halved": ("sdxl", {"clip_l": vectors(1, 32)}),
    "gone": ("sd15", {}),
    "broken": ("sd15", {}),
}


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """Every family's model, and embeddings for them."""
    folder = tmp_path_factory.mktemp("embeddings")
    entries = {}
    for name, (family, tensors) in FILES.items():
        file = f"{family}-{len(entries)}.safetensors"
        sold = name == "glow"
        entries[name] = {
            "model_id": None, "kind": "embedding", "base_model": family, "family": family, "lora_path": file, "trigger words": [],
            "usage_rights": "AllowCommercialUse" if sold else "None", "allow_no_mention": sold, "creator": "Mina",
        }  # fmt: skip
        if tensors:
            save_file(tensors, folder / file)
        elif name == "broken":
            (folder / file).write_bytes(b"<html>")
    (folder / "lora_list.json").write_text(json.dumps(entries))
    models = [Model(id="starter", family="starter", source="starter/stable-diffusion", commercial_use=True)]
    models += [Model(id=family, family=family, source=str(miniatures[family])) for family in ("sd15", "sd2", "sdxl", "flux")]
    settings = Settings(
        models=Models(default="starter", catalogue=models, cpu_threads=1), loras=Loras(registry=folder / "lora_list.json", folder=folder),
    )  # fmt: skip
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, model: str = "starter", **values: object) -> Plan:
    size = SIZES[model]
    asked = {"prompt": "red apple", "seed": 1, "num_inference_steps": 2, "width": size, "height": size, "model_id": model, **values}
    return device.catalogue.plan(reading.parse(asked), None, "test")


def submit(device: Device, plan: Plan) -> Future[Generation]:
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id)))


def draw(device: Device, model: str = "starter", **values: object) -> Generation:
    return submit(device, planned(device, model, **values)).result(60)


def refusal(device: Device, model: str = "starter", **values: object) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        planned(device, model, **values)
    return {e.field: f"{e.message}; {e.allowed}" for e in caught.value.details.errors} or {"": caught.value.details.detail}


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a bad cat", ["bad"]), ("a BAD cat", ["bad"]), ("<bad> cat, (Bad:1.2)", ["bad"]), ("embedding:bad", ["bad"]), ("<embedding:bad>", ["bad"]),
        ("badly, not-bad, bad-ish, bad_one", []), ("bad (hands)-5", ["Bad (Hands)-5"]), ("a bad, Bad (Hands)-5", ["bad", "Bad (Hands)-5"]), ("ein bäd", []),
    ],
)  # fmt: skip
def test_names_are_found_as_words_of_their_own(device: Device, prompt: str, found: list[str]) -> None:
    plan = planned(device, "sd15", prompt=prompt)
    assert [e.name for e in plan.embeddings] == found
    assert plan.prompt == prompt
    assert [e.name for e in planned(device, "sd15", negative_prompt=prompt).embeddings] == found


@given(st.text("badx <>:()-embding", max_size=40))
def test_any_text_is_its_own_without_the_names(text: str) -> None:
    assert embeddings.replace(text, [], str) == text
    once = embeddings.replace(text, ["bad"], lambda _: "\ue000")
    assert embeddings.named(once, ["bad"]) in ([], ["bad"])
    assert ("bad" in embeddings.named(text, ["bad"])) == ("\ue000" in once)


def test_what_does_not_fit_is_refused_with_its_field(device: Device) -> None:
    assert refusal(device, prompt="a bad cat") == {"prompt": "'bad' is made for sd15 models (sd15), not for starter; it fits sd15; ['sd15']"}
    assert list(refusal(device, "sdxl", negative_prompt="v2")) == ["negative_prompt"]
    assert list(refusal(device, "flux", prompt="<large>")) == ["prompt"]
    assert "write its name into the prompt" in refusal(device, lora="glow")["lora"]
    assert "embedding bad does not allow" in refusal(device, "sd15", prompt="bad", commercial=True)["commercial"]
    assert planned(device, prompt="glow", commercial=True).commercial
    assert "embedding gone" in refusal(device, "sd15", prompt="gone")[""]


@pytest.mark.parametrize(("model", "name"), [("starter", "glow"), ("sd15", "bad"), ("sd15", "Bad (Hands)-5"), ("sd2", "v2"), ("sdxl", "large")])
def test_prompts_are_what_diffusers_own_textual_inversion_makes_of_them(device: Device, model: str, name: str) -> None:
    draw(device, model)
    entry = device.catalogue.find(model)
    pipe = device.residency.acquire(entry, Path(), torch.float32).base
    own = DiffusionPipeline.from_pretrained(entry.model.source, torch_dtype=torch.float32)
    tensors = list(FILES[name][1].values())
    own.load_textual_inversion({"newword": tensors[0]}, token="newword")
    if model == "sdxl":
        own.load_textual_inversion({"newword": tensors[1]}, token="newword", tokenizer=own.tokenizer_2, text_encoder=own.text_encoder_2)
    plan = planned(device, model, prompt=f"a red {name}, apple", negative_prompt=f"{name} heart {name}")
    mine = prompts.embed(pipe, entry.model.family, plan)
    texts = [text.replace(name, "newword") for text in (plan.prompt, plan.negative_prompt)]
    with torch.inference_mode():
        theirs = own.encode_prompt(texts[0], device=own.device, num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=texts[1])
    for value, expected in zip(mine.arguments.values(), theirs, strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)
    assert mine.tokens == len(own.tokenizer(own.maybe_convert_prompt(texts[0], own.tokenizer)).input_ids) - 2
    assert mine.used[0].vectors == (1 if tensors[0].ndim == 1 else len(tensors[0]))


@pytest.mark.parametrize(("model", "name"), [("starter", "glow"), ("sd15", "bad"), ("sd2", "v2"), ("sdxl", "large")])
def test_an_embedding_acts_where_it_is_named_and_leaves_nothing_behind(device: Device, model: str, name: str) -> None:
    plain = draw(device, model).pictures[0].data
    long = "very nice, " * 40
    drawn = [
        draw(device, model, **asked).pictures[0].data
        for asked in (
            {"prompt": f"red apple {name}"}, {"negative_prompt": name}, {"prompt": f"red apple ({name}:0.6)"}, {"prompt": f"red apple ({name}:1.4)"},
            {"prompt": f"{long} red apple {name}"}, {"prompt": f"{long} red apple"},
        )
    ]  # fmt: skip
    assert len({plain, *drawn}) == 7
    assert draw(device, model).pictures[0].data == plain


def test_what_ran_is_told_in_headers_and_metadata(device: Device) -> None:
    generation = draw(device, "sd15", prompt="a cat", negative_prompt="bad, <Bad (Hands)-5>")
    ran = generation.ran
    headers = answering.describe(ran, generation.seeds)
    assert headers["X-Easel-Embeddings"] == "bad;vectors=1, Bad (Hands)-5;vectors=3"
    assert (headers["X-Easel-Commercial-Use"], headers["X-Easel-Credit"]) == ("not allowed", "Mina")
    hashes = ", ".join(f"{e.name}: {e.sha256[:12]}" for e in ran.embeddings)
    assert f'TI hashes: "{hashes}", Version' in metadata.parameters(ran, 1)
    assert metadata.record(ran, 1)["embeddings"][0]["name"] == "bad"  # type: ignore[index]
    assert "Negative prompt: bad, <Bad (Hands)-5>" in metadata.parameters(ran, 1)
    assert draw(device, prompt="red glow").ran.commercial_use


def test_one_of_another_width_is_refused_and_does_not_take_the_batch_along(device: Device) -> None:
    go = held(device)
    asked = ({"prompt": "a wide cat"}, {"prompt": "a bad cat"}, {"prompt": "a cat"}, {"prompt": "a broken cat"})
    futures = [submit(device, planned(device, "sd15", **each)) for each in asked]
    go.set()
    wide, bad, plain, broken = (f.result(60) for f in futures)
    assert (wide.problem.status, wide.problem.type) == (422, "urn:easel:problem:embedding-unfit")
    assert "width 48; sd15 reads 32" in wide.problem.detail
    assert (broken.problem.status, broken.problem.type) == (503, "urn:easel:problem:embedding-broken")
    assert bad.ran.embeddings[0].name == "bad"
    assert plain.ran.embeddings == []
    assert plain.pictures[0].data != bad.pictures[0].data
    alone = draw(device, "sd15", prompt="a bad cat").pictures[0].data
    assert np.abs(np.frombuffer(alone, np.uint8).astype(int) - np.frombuffer(bad.pictures[0].data, np.uint8)).max() <= 1
    halved = draw(device, "sdxl", prompt="halved").problem
    assert "reads 32 and 32" in halved.detail


def test_a_file_that_was_replaced_is_read_anew_and_one_that_was_removed_is_missed(device: Device) -> None:
    plan = planned(device, prompt="red glow apple")
    before = submit(device, plan).result(60)
    path = Path(plan.embeddings[0].path)
    kept = path.read_bytes()
    try:
        save_file({"emb_params": vectors(3, 192, 9)}, path)
        after = submit(device, planned(device, prompt="red glow apple")).result(60)
        assert after.ran.embeddings[0].vectors == 3
        assert after.pictures[0].data != before.pictures[0].data
        path.unlink()
        gone = submit(device, plan).result(60)
        assert gone.problem.type == "urn:easel:problem:embedding-missing"
    finally:
        path.write_bytes(kept)
    assert draw(device, prompt="red glow apple").pictures[0].data == before.pictures[0].data


def strength_of_colours(generation: Generation) -> float:
    """The mean spread between a pixel's largest and smallest channel, in 255 levels."""
    pixels = np.stack([np.frombuffer(p.data, np.uint8).reshape(-1, 3) for p in generation.pictures]).astype(int)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def test_washed_out_in_the_negative_prompt_makes_colours_stronger() -> None:
    configured = Settings(
        models=Models(default="starter/stable-diffusion", cpu_threads=1, max_batch=8, catalogue=[Model(id="starter/stable-diffusion", family="starter")]),
        loras=Loras(registry=ROOT / "lora_list.json"),
    )  # fmt: skip
    device = Device(configured, Catalogue(configured))

    def drawn(**values: object) -> float:
        asked = {"prompt": "{bird|key|red apple|alarm clock|house|cactus}", "dynamic_prompts": True, "seed": 1, "count_returned": 4, "num_inference_steps": 8}
        plan = device.catalogue.plan(reading.parse({**asked, **values}), None, "test")
        return strength_of_colours(device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(250))

    try:
        plain = drawn()
        assert drawn(negative_prompt="washed_out") > 1.1 * plain
        assert drawn(prompt="washed_out") < 0.5 * plain
        assert (ROOT / "starter/embeddings/washed_out.safetensors").stat().st_size < 4096
    finally:
        device.queue.close()
        torch.set_num_threads(2)
