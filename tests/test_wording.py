"""Styles and dynamic prompts: what they make of a request's prompts, by which seed, and where they end."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from api import reading
from core import metadata
from core.catalogue import Catalogue
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Plan
from core.problems import Problem
from core.settings import Loras, Prompts, Settings
from core.styles import Styles
from core.wildcards import MARKS, Refused, Wildcards
from runners.device import Device
from tests.conftest import Server
from tests.test_http import problem

STYLES = """name,prompt,negative_prompt
Film,"film still of {prompt}, grain",blurry
plain,bright,
"a, b",<lora:ink:0.5>,{prompt} and dull
----,,
"""
WILDCARDS = {
    "colour.txt": "# colours\nred\ngreen\n\nblue\n", "animals/cat.txt": "tabby __colour__\nlion {old|young}\n", "one.txt": "__two__\n", "two.txt": "x __one__\n",
    "more.yaml": "fruit:\n  - apple\n  - 1000000::pear\nnested:\n  deep: [plum]\n", "broken.yaml": "a: [\n", "notes.md": "nothing",
    "b0.txt": "__b1__ " * 9, "b1.txt": "__b2__ " * 9, "b2.txt": "__b3__ " * 9, "b3.txt": "__b4__ " * 9, "b4.txt": "word " * 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prompts")
    (made / "styles.csv").write_text("\ufeff" + STYLES)
    for name, text in WILDCARDS.items():
        (made / "wildcards" / name).parent.mkdir(parents=True, exist_ok=True)
        (made / "wildcards" / name).write_text(text)
    (made / "secret.txt").write_text("secret")
    (made / "wildcards" / "link.txt").symlink_to(made / "secret.txt")
    (made / "wildcards" / "loop").symlink_to(made / "wildcards")
    entries = {name: {"base_model": "starter", "family": "starter", "lora_path": f"{name}.safetensors"} for name in ("ink", "oil")}
    for name in entries:
        (made / f"{name}.safetensors").write_bytes(b"")
    (made / "lora_list.json").write_text(json.dumps(entries))
    return made


@pytest.fixture(scope="module")
def wildcards(folder: Path) -> Wildcards:
    return Wildcards(folder / "wildcards")


@pytest.fixture(scope="module")
def device(folder: Path) -> Iterator[Device]:
    configured = Settings(
        models=Models(default="starter", cpu_threads=1, catalogue=[Model(id="starter", family="starter", source="starter/stable-diffusion"), Model(id="f", family="flux")]),
        loras=Loras(registry=folder / "lora_list.json", folder=folder), prompts=Prompts(styles=folder / "styles.csv", wildcards=folder / "wildcards"),
    )  # fmt: skip
    made = Device(configured, Catalogue(configured))
    yield made
    made.queue.close()
    torch.set_num_threads(2)


def planned(device: Device, **values: object) -> Plan:
    return device.catalogue.plan(reading.parse({"prompt": "a cat", "seed": 5, "num_inference_steps": 2, **values}), None, "test")


def drawn(device: Device, **values: object) -> Generation:
    plan = planned(device, **values)
    return device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(120)


def refusal(device: Device, **values: object) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        planned(device, **values)
    assert caught.value.details.status == 422
    return {e.field: e.message for e in caught.value.details.errors}


@pytest.mark.parametrize(
    ("styles", "prompt", "negative"),
    [
        ("Film", "film still of a cat, grain", "bad, blurry"), ("plain", "a cat, bright", "bad"), ("Film, plain", "film still of a cat, grain, bright", "bad, blurry"),
        ("plain,Film", "film still of a cat, bright, grain", "bad, blurry"), ('"a, b"', "a cat,", "bad and dull"), ("----", "a cat", "bad"), ("", "a cat", "bad"), ("plain,plain", "a cat, bright", "bad"),
    ],
)  # fmt: skip
def test_styles_are_merged_as_a1111_merges_them(device: Device, styles: str, prompt: str, negative: str) -> None:
    plan = planned(device, negative_prompt="bad", styles=styles)
    assert (plan.prompt, plan.negative_prompt) == (prompt, negative)
    assert [lora.weight for lora in plan.loras] == ([0.5] if "b" in styles else [])
    assert bool(plan.notes) == bool(styles)
    assert "styles applied: Film, plain" in planned(device, styles="Film, plain").notes


def test_styles_that_cannot_be_applied_are_refused(device: Device) -> None:
    assert "did you mean 'film'" in refusal(device, styles="Filn")["styles"].lower()
    assert refusal(device, styles="plain,,Film") == {"styles": "has an empty name"}
    assert "takes no negative prompt" in refusal(device, styles="Film", model_id="f")["styles"]
    assert "too long" in refusal(device, styles="plain", prompt="x" * 10_000)["styles"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("name,text\na,b\n", "line 1: the header"), ("", "line 1: the header"), (STYLES + "x,a,b,c\n", "line 6: 'x' has 4 columns"), (STYLES + "Film,a,b\n", "line 6: 'Film' stands there a second"),
        (STYLES + ",a,b\n", "line 6: a style without a name"), (STYLES + 'x,"a', "line 6"),
    ],
)  # fmt: skip
def test_a_broken_file_of_styles_is_refused_with_its_line(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "styles.csv"
    styles = Styles(file)
    assert styles.entries() == {}
    assert styles.warning is None
    file.write_text(text)
    assert wrong in (styles.warning or "")
    with pytest.raises(Problem, match="is broken") as caught:
        styles.choose("Film", [])
    assert caught.value.details.status == 503
    file.write_text(STYLES)
    assert list(styles.entries()) == ["Film", "plain", "a, b", "----"]
    assert styles.warning is None
    file.write_bytes(STYLES.encode() + b"x,\xff,\n")
    assert "line 6: not UTF-8" in (styles.warning or "")
    assert styles.choose("Film", [])[0].negative_prompt == "blurry"  # what it had before stays in force


@pytest.mark.parametrize(
    ("template", "possible"),
    [
        ("a {red|green} apple", {"a red apple", "a green apple"}), ("{2$$ and $$a|b}", {"a and b", "b and a"}), ("__colour__ x", {"red x", "green x", "blue x"}),
        ("__animals/cat__", {"tabby red", "tabby green", "tabby blue", "lion old", "lion young"}), ("__fruit__ {{a|b}|c}", {"pear a", "pear b", "pear c"}), ("__nested/deep__", {"plum"}),
        ("${c=!{a|b}}${c}${c}", {"aa", "bb"}), ("(x:1.2) [y] <lora:ink:0.5>, __colou*__", {f"(x:1.2) [y] <lora:ink:0.5>, {c}" for c in ("red", "green", "blue")}), ("plain words", {"plain words"}),
    ],
)  # fmt: skip
def test_choices_are_made_by_the_seed_alone(wildcards: Wildcards, template: str, possible: set[str]) -> None:
    seeds = list(range(60))
    texts = wildcards.expand(template, seeds, 1000)
    assert set(texts) == possible
    assert wildcards.expand(template, seeds[::-1], 1000) == texts[::-1]
    assert wildcards.expand(template, [2**53], 1000) == wildcards.expand(template, [2**53], 1000)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("__colours__", "did you mean 'colour'"), ("__../secret__", "no wildcard"), ("__link__", "no wildcard"), ("__/etc/passwd__", "no wildcard"), ("__loop/colour__", "no wildcard"),
        ("__one__", "contain each other"), ("__b0__", "grows"), ("{" * 200, "nested too deeply"), ("{a|b} " * 300, "marks"), ("{a|b", "cannot be read"), ("${x}", "cannot be expanded"),
        ("{!a|b}", "only random"), ("{@a|b}", "only random"), ("${a=__colour____colour__}" + "".join(f"${{{c}={f'${{{p}}}' * 9}}}" for p, c in zip("abcd", "bcde", strict=True)) + "${e}", "grows"),
        ("{5$$" + "|".join(["x" * 300] * 5) + "}", "grows too long"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_honoured_are_refused_and_end(wildcards: Wildcards, template: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        wildcards.expand(template, range(16), 1000)


@given(st.text("{}|$_%!@#:.=0123ab colour__-~\\/", max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_template_gives_texts_or_is_refused(wildcards: Wildcards, template: str) -> None:
    try:
        texts = wildcards.expand(template, [1, 2], 500)
    except Refused:
        return
    assert len(texts) == 2
    assert all(len(text) <= 500 for text in texts)


def test_files_are_read_anew_and_broken_ones_are_told(tmp_path: Path) -> None:
    own = Wildcards(tmp_path)
    assert own.entries() == {}
    (tmp_path / "a.txt").write_text("x\n")
    assert own.expand("__a__", [1], 9) == ["x"]
    (tmp_path / "a.txt").write_text("yy\n")
    assert own.expand("__a__", [1], 9) == ["yy"]
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text("{a|b}" * MARKS)
    os.truncate(tmp_path / "a.txt", 2_000_000)
    assert [Path(w.split(" ")[0]).name for w in own.warnings] == ["a.txt", "b.json", "c.txt", "d.txt"]
    assert Wildcards(None).entries() == {}


def test_each_picture_of_a_plan_has_the_prompt_of_its_own_seed(device: Device) -> None:
    asked = {"prompt": "<lora:ink>a __colour__ {apple|book}", "negative_prompt": "{x|y}", "dynamic_prompts": True}
    plan = planned(device, **asked, count_returned=8)
    made = plan.expansion
    assert made.template == asked["prompt"]
    assert len(set(made.prompts)) > 3
    for i in range(8):
        alone = planned(device, **{**asked, "seed": 5 + i})
        assert (alone.prompt, alone.negative_prompt) == plan.words(i) == (made.prompts[i], made.negative_prompts[i])
    assert all(prompt.startswith("a ") for prompt in made.prompts)
    assert planned(device, prompt="a {red|green} apple").prompt == "a {red|green} apple"
    assert planned(device, prompt="a {red|green} apple").expansion is None
    assert planned(device, prompt="{x|x}", styles="Film", dynamic_prompts=True).prompt == "film still of x, grain"


def test_what_dynamic_prompts_cannot_do_is_refused_by_its_field(device: Device) -> None:
    assert "different LoRAs" in refusal(device, prompt="{<lora:ink>|<lora:oil>|} x", dynamic_prompts=True, count_returned=8)["prompt"]
    assert planned(device, prompt="{<lora:ink>|<lora:ink>} x", dynamic_prompts=True, count_returned=8).loras[0].name == "ink"
    assert list(refusal(device, prompt="__nope__", negative_prompt="__one__", dynamic_prompts=True)) == ["prompt", "negative_prompt"]
    with pytest.raises(Problem):
        reading.parse({"prompt": "x", "dynamic_prompts": "perhaps"})


def test_the_pictures_share_batches_and_are_those_of_their_prompts(device: Device) -> None:
    generation = drawn(device, prompt="__colour__ {apple|heart}", count_returned=4, dynamic_prompts=True)
    ran = generation.ran
    assert len(set(ran.expansion.prompts)) > 1
    for i, picture in enumerate(generation.pictures):
        alone = drawn(device, prompt=ran.expansion.prompts[i], seed=5 + i).pictures[0]
        assert np.abs(np.frombuffer(alone.data, np.uint8).astype(int) - np.frombuffer(picture.data, np.uint8)).max() <= 2
        texts = metadata.texts(generation, i)
        assert texts["parameters"].startswith(ran.expansion.prompts[i] + "\n")
        assert "Template: __colour__ {apple|heart}" in texts["parameters"]
        record = json.loads(texts["easel"])
        assert (record["prompt"], record["expansion"]["prompts"]) == (ran.expansion.prompts[i], [ran.expansion.prompts[i]])


@pytest.mark.http
def test_styles_and_dynamic_prompts_over_http(server: Server) -> None:
    beside = server.log.parent
    (beside / "styles.csv").write_text("name,prompt,negative_prompt\nshiny,\"{prompt}, shiny\",dull\n")
    (beside / "wildcards").mkdir()
    (beside / "wildcards" / "colour.txt").write_text("red\nblue\n")
    assert server.get("/styles").json() == {"styles": [{"name": "shiny", "prompt": "{prompt}, shiny", "negative_prompt": "dull"}], "warning": None}
    assert server.get("/wildcards").json() == {"wildcards": {"colour": 2}, "warnings": []}
    asked = {"prompt": "a __colour__ apple", "styles": "shiny", "dynamic_prompts": "true", "count_returned": 6, "seed": 1, "num_inference_steps": 1}
    body = server.post("/post_config", params=asked, headers={"Accept": "application/json"}).json()
    assert set(body["ran"]["expansion"]["prompts"]) == {"a red apple, shiny", "a blue apple, shiny"}
    one = server.post("/post_config", params={**asked, "count_returned": 1, "seed": 4})
    assert one.status_code == 200, one.text
    assert Image.open(io.BytesIO(one.content)).info["parameters"].startswith(body["ran"]["expansion"]["prompts"][3] + "\nNegative prompt: dull\n")
    assert "styles applied: shiny" in one.headers["x-easel-notes"]
    assert "did you mean 'colour'" in problem(server.post("/txt2img", json={"prompt": "__color__", "dynamic_prompts": True}), 422)["detail"]
    (beside / "styles.csv").write_text("name\nshiny\n")
    assert "line 1: the header" in server.get("/styles").json()["warning"]
