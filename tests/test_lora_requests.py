"""Naming LoRAs in a request: what is read, what fits which model, trigger words, rights and metadata."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import answering, reading
from core import adapters, metadata
from core.catalogue import Catalogue
from core.generation import AppliedLora, Ran, Timing
from core.loras.registry import is_name
from core.model_settings import Model, Models
from core.plans import Plan
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Limits, Loras, Settings

SOLD = {"usage_rights": "AllowCommercialUse", "allow_no_mention": True}
ENTRIES = {
    "ink": {"base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "trigger words": ["ink wash, sumi-e", "Brush"], **SOLD},
    "neon": {"base_model": "a", "usage_rights": "None", "creator": "Mina"},
    "two": {"base_model": "stabilityai/stable-diffusion-2-1", **SOLD},
    "large": {"base_model": "SDXL 1.0", **SOLD},
    "pixels": {"base_model": "anything", "family": "starter", **SOLD},
    "gone": {"base_model": "a", **SOLD},
}
MODELS = [
    Model(id="a", family="sd15", licence="L", commercial_use=True, credit="Lab"), Model(id="b", family="sd15"), Model(id="v2", family="sd2"),
    Model(id="xl", family="sdxl"), Model(id="s", family="starter"),
]  # fmt: skip


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("registry")
    for name, entry in ENTRIES.items():
        entry.update(model_id=None, lora_path=f"https://example.org/{name}", file_name=f"{name}.safetensors")
        if name != "gone":
            (folder / f"{name}.safetensors").write_bytes(b"")
    (folder / "lora_list.json").write_text(json.dumps(ENTRIES))
    return Catalogue(Settings(
        models=Models(default="a", catalogue=MODELS), limits=Limits(loras=3), loras=Loras(registry=folder / "lora_list.json", folder=folder),
    ))  # fmt: skip


def plan(catalogue: Catalogue, **values: object) -> Plan:
    return catalogue.plan(reading.parse({"prompt": "a cat", **values}), None, "me")


def refusal(catalogue: Catalogue, **values: object) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        plan(catalogue, **values)
    assert caught.value.details.status == 422
    told: dict[str, str] = {}
    for e in caught.value.details.errors:
        told[e.field] = told.get(e.field, "") + f"{e.message}; {e.allowed}. "
    return told


@pytest.mark.parametrize(
    ("values", "weights", "prompt"),
    [
        ({"lora": "ink"}, {"ink": 1}, "a cat"),
        ({"lora": "ink:0.8"}, {"ink": 0.8}, "a cat"),
        ({"lora": " ink : 0.6 , neon:-1"}, {"ink": 0.6, "neon": -1}, "a cat"),
        ({"lora": "ink,neon:0.4", "lora_scale": 0.5}, {"ink": 0.5, "neon": 0.4}, "a cat"),
        ({"prompt": "<lora:ink:0.8> a cat"}, {"ink": 0.8}, "a cat"),
        ({"prompt": "a <lora:ink>cat", "lora": "neon", "lora_scale": 2}, {"neon": 2, "ink": 1}, "a cat"),
        ({"prompt": "<lora:ink:1>"}, {"ink": 1}, ""),
        ({"prompt": "<lora:ink"}, {}, "<lora:ink"),
        ({}, {}, "a cat"),
    ],
)  # fmt: skip
def test_loras_and_weights_are_read(catalogue: Catalogue, values: dict[str, object], weights: dict[str, float], prompt: str) -> None:
    made = plan(catalogue, **values)
    assert {x.name: x.weight for x in made.loras} == weights
    assert made.prompt == prompt


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("lora", {"lora": "ink:heavy"}), ("lora", {"lora": "ink:"}), ("lora", {"lora": "ink:1:2"}), ("lora", {"lora": ":1"}), ("lora", {"lora": "ink,"}),
        ("lora", {"lora": "ink:nan"}), ("lora", {"lora": "ink:inf"}), ("lora", {"lora": "ink:10.5"}), ("lora", {"lora": "ink,ink:0.5"}), ("lora", {"lora": "inc"}),
        ("prompt", {"prompt": "<lora:>"}), ("prompt", {"prompt": "<lora:ink:x> y"}), ("prompt", {"prompt": "x <lora:ink>", "lora": "ink"}), ("prompt", {"prompt": "<lora:inc>"}),
        ("lora_scale", {"lora_scale": 0.5}), ("lora_scale", {"lora": "ink", "lora_scale": 11}),
        ("prompt", {"prompt": "<lora:pixels> x"}), ("lora", {"lora": "two"}), ("lora", {"lora": "ink", "model_id": "v2"}), ("lora", {"lora": "ink", "model_id": "s"}),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_field(catalogue: Catalogue, field: str, values: dict[str, object]) -> None:
    assert list(refusal(catalogue, **values)) == [field]


def test_the_number_of_loras_is_limited(catalogue: Catalogue) -> None:
    assert "at most 3" in refusal(catalogue, lora="ink,neon,two,large")["lora"]


def test_a_lora_of_another_family_is_refused_with_the_models_that_fit(catalogue: Catalogue) -> None:
    assert "it fits a, b; ['a', 'b']" in refusal(catalogue, lora="ink", model_id="xl")["lora"]
    for name, model in {"ink": "b", "two": "v2", "large": "xl", "pixels": "s"}.items():
        assert [x.name for x in plan(catalogue, lora=name, model_id=model).loras] == [name]
    assert {e: catalogue.fitting("lora", catalogue.find(e)) for e in "as"} == {"a": ["ink", "neon", "gone"], "s": ["pixels"]}


def test_missing_weights_are_a_503_that_says_what_to_do(catalogue: Catalogue) -> None:
    with pytest.raises(Problem, match="add it again") as caught:
        plan(catalogue, lora="gone")
    assert caught.value.details.status == 503


def test_trigger_words_are_added_only_when_asked_and_lacking(catalogue: Catalogue) -> None:
    assert plan(catalogue, lora="ink").prompt == "a cat"
    made = plan(catalogue, lora="ink", lora_triggers="auto", prompt="INK  wash of a cat, brushes")
    assert made.prompt == "INK  wash of a cat, brushes, sumi-e, Brush"
    assert "added to the prompt: sumi-e, Brush" in made.notes
    whole = plan(catalogue, lora="ink", lora_triggers="auto", prompt="brush, ink wash, sumi-e")
    assert (whole.prompt, whole.notes) == ("brush, ink wash, sumi-e", [])


def test_what_is_done_otherwise_than_a1111_is_noted(catalogue: Catalogue) -> None:
    made = plan(catalogue, prompt="<lora:ink:0.5:0.7> x", negative_prompt="<lora:neon>")
    assert made.loras[0].weight == 0.5
    assert any("only the first weight" in note for note in made.notes)
    assert any("plain text" in note for note in made.notes)
    assert any("no effect" in note for note in plan(catalogue, lora="ink:1", lora_scale=2).notes)


def test_commercial_use_is_refused_by_each_part_that_does_not_allow_it(catalogue: Catalogue) -> None:
    assert plan(catalogue, commercial=True, lora="ink").commercial
    assert "LoRA neon" in refusal(catalogue, commercial=True, lora="ink,neon")["commercial"]
    told = refusal(catalogue, commercial=True, lora="neon", model_id="b")["commercial"]
    assert "b (unknown) does not" in told
    assert "LoRA neon does not" in told


@given(st.text("<>lora:ink,.-0123456789 ne", max_size=60), st.text("inkeo:,.-19 ", max_size=20))
def test_any_text_gives_loras_or_errors(prompt: str, lora: str) -> None:
    read = adapters.read(GenerationRequest.model_construct(prompt=prompt, negative_prompt="", lora=lora, lora_scale=None), 8)
    assert all(-10 <= w.weight <= 10 for w in read.wanted)
    assert read.errors or "<lora:" not in read.prompt or ">" not in read.prompt.split("<lora:")[1]


NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(is_name)
WEIGHTS = st.none() | st.floats(-10, 10).map(lambda weight: float(f"{weight:g}"))


def named(name: str, weight: float | None) -> str:
    return name if weight is None else f"{name}:{weight:g}"


@given(st.dictionaries(NAMES, WEIGHTS, max_size=4), st.dictionaries(NAMES, WEIGHTS, max_size=4), st.text("a cat(:1.2),", max_size=20))
def test_every_name_and_weight_that_is_written_is_read_back(field: dict[str, float | None], tags: dict[str, float | None], words: str) -> None:
    tags = {name: weight for name, weight in tags.items() if name not in field}
    prompt = words.join(["", *(f"<lora:{named(*each)}>" for each in tags.items()), ""]) if tags else words
    lora = ",".join(named(*each) for each in field.items()) or None
    read = adapters.read(GenerationRequest.model_construct(prompt=prompt, negative_prompt="", lora=lora, lora_scale=None), 8)
    assert [(w.name, w.weight, w.field) for w in read.wanted] == [(name, 1 if weight is None else weight, where) for where, given in (("lora", field), ("prompt", tags)) for name, weight in given.items()]
    assert (read.prompt, read.errors) == ((words * (len(tags) + 1)).strip() if tags else words.strip(), [])


def test_a_tag_within_a_tag_is_refused_rather_than_left_in_the_prompt(catalogue: Catalogue) -> None:
    assert "a LoRA within a LoRA" in refusal(catalogue, prompt="<lora<lora:ink>:neon> a cat")["prompt"]


def test_headers_and_metadata_name_loras_rights_and_credit() -> None:
    loras = [
        AppliedLora(name="ink", weight=0.8, sha256="abcdef0123456789", layers=48, unmatched=0, commercial_use=True, credit=None),
        AppliedLora(name="neon", weight=1, sha256="0123456789abcdef", layers=12, unmatched=3, commercial_use=False, credit="Mina"),
    ]
    ran = Ran(
        model_id="a", family="sd15", scheduler="Euler", schedule=None, torch_dtype="float32", device="cpu", num_inference_steps=4, steps_run=4,
        guidance_scale=7, width=64, height=64, clip_skip=0, loras=loras, strength=None, prompt="a cat", negative_prompt="", prompt_tokens=2,
        prompt_tokens_cut=0, licence="L", commercial_use=False, credit=["Lab", "Mina"], notes=[], libraries={"easel": "0"}, timing=Timing(), model_sha256="f" * 64,
    )  # fmt: skip
    headers = answering.describe(ran, [1])
    assert headers["X-Easel-Loras"] == "ink:0.8;layers=48;unmatched=0, neon:1;layers=12;unmatched=3"
    assert (headers["X-Easel-Commercial-Use"], headers["X-Easel-Credit"]) == ("not allowed", "Lab, Mina")
    first, last = metadata.parameters(ran, 1).split("\n")
    assert first == "a cat <lora:ink:0.8> <lora:neon:1>"
    assert 'Lora hashes: "ink: abcdef0123, neon: 0123456789", Version' in last
    assert metadata.record(ran, 1)["loras"][1] == {  # type: ignore[index]
        "name": "neon", "weight": 1, "sha256": "0123456789abcdef", "layers": 12, "unmatched": 3, "commercial_use": False, "credit": "Mina",
    }  # fmt: skip
    plain = ran.model_copy(update={"loras": [], "credit": []})
    assert "Lora" not in metadata.parameters(plain, 1)
    assert answering.describe(plain, [1])["X-Easel-Credit"] == "not required"
