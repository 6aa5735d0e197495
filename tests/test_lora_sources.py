"""What is looked up and chosen: names and ids on Civitai, licence flags, base models, hub repositories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.loras import rights
from core.loras.civitai import Reference, local_name, parse
from core.loras.messages import AddLora
from core.loras.registry import is_name
from core.problems import Problem
from core.settings import Settings
from tests.civitai import FakeCivitai, weights
from tests.test_lora_downloads import add, contents, installer, refused

SITE = "https://civitai.com"


@pytest.fixture
def fake() -> Iterator[FakeCivitai]:
    with FakeCivitai() as running:
        yield running


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (None, False), ([], False), (["None"], False), (["Image"], True), (["RentCivit"], False), (["Rent"], False), (["Sell"], False),
        (["RentCivit", "Rent", "Sell"], False), (["Image", "RentCivit"], True), (["Image", "RentCivit", "Rent", "Sell"], True), (["Whatever"], False),
        ("None", False), ("Image", True), ("RentCivit", True), ("Rent", True), ("Sell", True), ("Whatever", False), ("", False),
        ("{Image,Rent}", True), ("{Rent}", False), ("{None}", False), ("AllowCommercialUse", True), ("NoCommercialUse", False), (["AllowCommercialUse"], True),
    ],
)
def test_every_value_of_allow_commercial_use(fake: FakeCivitai, tmp_path: Path, value: Any, allowed: bool) -> None:
    assert rights.pictures_may_be_sold(value) is allowed
    fake.add(1, "Style", allowCommercialUse=value)
    made = installer(fake, tmp_path)
    assert add(made).lora["usage_rights"] == ("AllowCommercialUse" if allowed else "NoCommercialUse")
    assert made.registry.find("Style").commercial_use is allowed


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("SD 1.4", "sd15"), ("SD 1.5", "sd15"), ("SD 1.5 LCM", "sd15"), ("SD 2.0", "sd2"), ("SD 2.1", "sd2"), ("SD 2.1 768", "sd2"), ("SDXL 1.0", "sdxl"),
        ("SDXL Lightning", "sdxl"), ("Pony", "sdxl"), ("Illustrious", "sdxl"), ("NoobAI", "sdxl"), ("Flux.1 D", "flux"), ("Flux.1 S", "flux"), ("Flux.1 Kontext", "flux"),
    ],
)
def test_base_models_become_families_and_hub_ids_of_the_catalogue(fake: FakeCivitai, tmp_path: Path, base: str, family: str) -> None:
    fake.add(1, "Style", base=base)
    lora = add(installer(fake, tmp_path)).lora
    assert (lora["family"], lora["civitai_base_model"]) == (family, base)
    assert lora["base_model"] in {m.id for m in Settings().models.catalogue if m.family == family}


@pytest.mark.parametrize("base", ["SD 3.5 Large", "Flux.2 D", "Pony V7", "Qwen", "ZImageTurbo", "Other", "sdxl"])
def test_other_base_models_are_refused_with_what_is_supported(fake: FakeCivitai, tmp_path: Path, base: str) -> None:
    fake.add(1, "Style", version_id=11, base="SDXL 1.0")
    fake.add(1, "Style", version_id=12, base=base)
    assert "Versions that fit: 11 (SDXL 1.0)" in refused(installer(fake, tmp_path), 422, "invalid-parameters")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("pixel art", Reference(name="pixel art")), ("123", Reference(model_id=123)), ("123@456", Reference(123, 456)), ("123 @ 456", Reference(123, 456)),
        ("urn:air:sdxl:lora:civitai:123@456", Reference(123, 456)), (f"{SITE}/models/123", Reference(model_id=123)),
        (f"{SITE}/models/123/some-slug?modelVersionId=456", Reference(123, 456)), ("https://www.civitai.com/models/123/", Reference(model_id=123)),
        (f"{SITE}/api/download/models/456?type=Model&format=SafeTensor", Reference(version_id=456)), (f"{SITE}/api/v1/model-versions/456", Reference(version_id=456)),
    ],
)
def test_what_may_name_a_lora(text: str, reference: Reference) -> None:
    assert parse(text, SITE) == reference


@pytest.mark.parametrize(
    "text",
    ["", "   ", "a\x00b", "x" * 201, "0", "9" * 40, "https://evil.example/models/1", "http://169.254.169.254/models/1", "https://civitai.com.evil.example/models/1", "file:///etc/passwd",
     f"{SITE}/user/ann", f"{SITE}/models/12x", f"{SITE}/models/1?modelVersionId=x", "https://[", f"{SITE}/models/{'9' * 30}"],
)
def test_what_may_not(text: str) -> None:
    with pytest.raises(Problem) as caught:
        parse(text, SITE)
    assert caught.value.details.status == 422


def test_a_name_that_several_have_lists_the_candidates(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "Pixel Art")
    fake.add(2, "pixel art", creator={"username": "bob"})
    fake.add(3, "Pixel Art XL")
    made = installer(fake, tmp_path)
    assert "2 LoRAs are called" in refused(made, 409, "lora-ambiguous", "pixel art")
    with pytest.raises(Problem) as caught:
        add(made, "pixel art")
    assert caught.value.details.candidates == [
        {"model_id": 1, "name": "Pixel Art", "creator": "ann", "base_model": "SDXL 1.0", "downloads": 3},
        {"model_id": 2, "name": "pixel art", "creator": "bob", "base_model": "SDXL 1.0", "downloads": 6},
    ]
    assert add(made, 2).lora["creator"] == "bob"
    assert "No LoRA is called just 'pixel'" in refused(made, 409, "lora-ambiguous", "pixel")


def test_an_exact_name_wins_whatever_the_case_and_the_page(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.page = 2
    for i, name in enumerate(["Watercolor deluxe", "Watercolor mini", "WaterColor", "Watercolor x"], 1):
        fake.add(i, name)
    assert add(installer(fake, tmp_path), "watercolor").lora["model_id"] == 3


def test_the_only_one_with_the_words_is_taken_and_none_is_a_404(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "Ghibli style v2")
    fake.add(2, "Ghibli style model", type="Checkpoint")
    made = installer(fake, tmp_path)
    assert add(made, "ghibli").name == "Ghibli style v2"
    assert "no LoRA called 'nothing'" in refused(made, 404, "lora-not-found", "nothing")


def test_a_bare_number_is_a_model_or_else_a_version(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "One", version_id=500)
    fake.add(2, "A checkpoint", version_id=600, type="Checkpoint")
    fake.add(3, "Three", version_id=2)
    made = installer(fake, tmp_path)
    assert add(made, 500).name == "One"
    assert add(made, "2").name == "Three"  # model 2 is no LoRA; version 2 is one of model 3
    assert "No model with id 77" in refused(made, 404, "lora-not-found", 77)
    assert "is a Checkpoint" in refused(made, 422, "lora-type", 600)


def test_a_textual_inversion_must_have_vectors(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "Style", type="TextualInversion")
    made = installer(fake, tmp_path)
    assert "not of an embedding" in refused(made, 502, "lora-kind")
    assert contents(made) == []


def test_both_ids_and_an_unknown_version(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "One", version_id=11)
    fake.add(1, "One", version_id=12)
    made = installer(fake, tmp_path)
    assert add(made, {"model_id": 1}).lora["version_id"] == 12  # the newest
    second = add(made, {"model_id": 1, "version_id": 11})
    assert (second.name, second.lora["version_id"]) == ("One-11", 11)
    assert "it has 12 (v12), 11 (v11)" in refused(made, 404, "lora-not-found", "1@99")
    assert "Model not found" in refused(made, 404, "lora-not-found", {"version_id": 99})
    assert "names nothing" in refused(made, 422, "invalid-parameters", {})


@pytest.mark.parametrize(
    ("change", "status", "slug"),
    [
        ({"type": "Checkpoint"}, 422, "lora-type"),
        ({"mode": "Archived"}, 410, "lora-archived"),
        ({"mode": "TakenDown"}, 410, "lora-archived"),
        ({"version": {"status": "Draft"}}, 404, "lora-not-found"),
        ({"version": {"usageControl": "Generation"}}, 422, "lora-not-downloadable"),
        ({"version": {"files": []}}, 422, "lora-not-safetensors"),
        ({"file": {"name": "x.ckpt", "metadata": {"format": "PickleTensor"}}}, 422, "lora-not-safetensors"),
        ({"file": {"name": "x.safetensors", "metadata": {"format": "PickleTensor"}}}, 422, "lora-not-safetensors"),
        ({"file": {"pickleScanResult": "Danger"}}, 422, "lora-dangerous"),
        ({"file": {"virusScanResult": "Danger"}}, 422, "lora-dangerous"),
        ({"file": {"sizeKB": 9e9}}, 413, "lora-too-large"),
    ],
    ids=str,
)
def test_what_civitai_has_but_easel_does_not_take(fake: FakeCivitai, tmp_path: Path, change: dict[str, Any], status: int, slug: str) -> None:
    fake.add(1, "Style", **change)
    made = installer(fake, tmp_path)
    refused(made, status, slug)
    assert contents(made) == []
    assert fake.downloads() == []


@pytest.mark.parametrize("kind", ["LORA", "LoCon"])
def test_the_kinds_that_are_taken(fake: FakeCivitai, tmp_path: Path, kind: str) -> None:
    fake.add(1, "Style", type=kind)
    add(installer(fake, tmp_path), "style")


def test_the_safetensors_file_is_chosen_beside_a_pickle_and_training_data(fake: FakeCivitai, tmp_path: Path) -> None:
    model = fake.add(1, "Style")
    good = model["modelVersions"][0]["files"][0]
    pickle = {**good, "id": 7, "name": "x.pt", "metadata": {"format": "PickleTensor"}, "primary": True}
    data = {**good, "id": 8, "name": "data.zip", "type": "Training Data"}
    model["modelVersions"][0]["files"] = [data, pickle, {**good, "primary": False}]
    add(installer(fake, tmp_path))
    assert any(f"fileId={good['id']}" in s.path for s in fake.seen)


def test_a_file_without_a_hash_is_taken_with_a_note(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "Style", file={"hashes": {}}, creator=None, version={"images": [], "trainedWords": None})
    added = add(installer(fake, tmp_path))
    assert "no SHA-256" in added.notes[0]
    assert len(added.lora["sha256"]) == 64


@pytest.mark.parametrize("text", ["Ghibli: <v2>, \"best\"/ever\\ \n", "..", "日本 style", "x" * 300, "\u202eevil", "  a  ", "🎨"])
def test_names_from_civitai_become_names_that_fit_a_prompt(text: str) -> None:
    assert is_name(local_name(text, "civitai-1"))


def test_an_admin_may_name_it_and_say_more(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(1, "Style")
    fake.add(2, "Other")
    made = installer(fake, tmp_path)
    added = add(made, 1, name="mine", trigger_words=["zap"], usage_rights="NoCommercialUse", allow_no_mention=True, creator="Ann B.")
    assert (added.name, added.lora["trigger words"], added.lora["usage_rights"], added.lora["creator"]) == ("mine", ["zap"], "NoCommercialUse", "Ann B.")
    assert made.registry.find("mine").credit is None
    refused(made, 409, "lora-name-taken", 2, name="mine")
    refused(made, 422, "invalid-parameters", 2, base_model="SDXL 1.0")


@pytest.mark.parametrize("body", [{"source": 1, "name": "a:b"}, {"source": ""}, {"source": 0}, {"source": {"repo_id": "x"}}, {"source": {"repo_id": "../x/y"}}, {"source": {"repo_id": "a/b", "revision": "../x"}}, {"source": 1, "usage_rights": "Yes"}, {"source": 1, "x": 2}, {"source": True}, {}])
def test_a_body_that_makes_no_sense_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        AddLora.model_validate(body)


# The hub


def test_a_hub_repository_gives_its_file_pinned_to_a_commit(fake: FakeCivitai, tmp_path: Path) -> None:
    content = weights(5)
    fake.add_repo("ann/sketch-lora", {"README.md": b"x", "sub dir/w.safetensors": content}, base_model="stabilityai/stable-diffusion-xl-base-1.0", license="openrail++", instance_prompt="in sketch style")
    made = installer(fake, tmp_path)
    added = add(made, {"repo_id": "ann/sketch-lora"})
    assert added.name == "sketch-lora"
    assert added.lora["lora_path"] == f"{fake.hub_url}/ann/sketch-lora/resolve/{'a' * 40}/sub%20dir/w.safetensors"
    assert (added.lora["family"], added.lora["usage_rights"], added.lora["creator"], added.lora["trigger words"]) == ("sdxl", "AllowCommercialUse", "ann", ["in sketch style"])
    assert made.registry.file(made.registry.find("sketch-lora")).read_bytes() == content
    assert add(made, {"repo_id": "ann/sketch-lora"}).already_there
    assert {s.headers.get("Authorization") for s in fake.seen if s.host == "127.0.0.3"} == {"Bearer hub-secret"}
    assert all("Authorization" not in s.headers for s in fake.downloads())
    made.registry.file(made.registry.find("sketch-lora")).unlink()
    assert not add(made, "sketch-lora").already_there


def test_a_hub_repository_that_leaves_a_choice_or_says_too_little(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add_repo("ann/two", {"a.safetensors": weights(1), "b.safetensors": weights(2)})
    fake.add_repo("ann/pickle", {"pytorch_lora_weights.bin": b"x"})
    fake.add_repo("ann/sd3", {"a.safetensors": weights(1)}, base_model=["stabilityai/stable-diffusion-3.5-large"])
    made = installer(fake, tmp_path)
    refused(made, 409, "lora-ambiguous", {"repo_id": "ann/two"})
    assert "does not say" in refused(made, 422, "invalid-parameters", {"repo_id": "ann/two", "filename": "b.safetensors"})
    refused(made, 422, "invalid-parameters", {"repo_id": "ann/two", "filename": "c.safetensors"}, base_model="SDXL 1.0")
    refused(made, 422, "lora-not-safetensors", {"repo_id": "ann/pickle"})
    refused(made, 422, "invalid-parameters", {"repo_id": "ann/sd3"})
    refused(made, 404, "lora-not-found", {"repo_id": "ann/none"})
    added = add(made, {"repo_id": "ann/two", "filename": "b.safetensors"}, base_model="starter/stable-diffusion")
    assert (added.lora["family"], added.lora["base_model"], added.lora["usage_rights"]) == ("starter", "starter/stable-diffusion", "NoCommercialUse")
