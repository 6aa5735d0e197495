"""The safety checker with its real detectors, on harmless pictures that they flag: NudeNet takes the starter's
red apple for something else, and finds a face in a drawn one; diffusers' checker, in miniature with random
weights, has its thresholds set. And the prompt blocklist."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from pydantic import ValidationError
from transformers import CLIPConfig, CLIPImageProcessorPil

from core.blocklist import Blocklist
from core.catalogue import Catalogue
from core.generation import Generation
from core.images import to_pil
from core.model_settings import Model, Models, UniDiffuser
from core.plans import Inputs, Pixels, Plan
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Safety, Settings
from runners.device import Device
from tests.conftest import ADMIN, held, serving, unidiffuser
from tests.faces import face, pixels, png
from tests.test_http import picture, problem

APPLE = {"prompt": "red apple", "seed": 1, "num_inference_steps": 8}  # NudeNet: BUTTOCKS_EXPOSED, 0.58
TREE = {"prompt": "green tree", "seed": 1, "num_inference_steps": 6}  # nothing
FLAGS = ["BUTTOCKS_EXPOSED", "FACE_FEMALE"]


def mosaic(image: Image.Image) -> Image.Image:
    """What is left of a picture when it is blurred."""
    return image.resize((12, 12), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def black(image: Image.Image) -> bool:
    return image.getextrema() == ((0, 0),) * 3


def same(one: Image.Image, other: Image.Image) -> bool:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) <= 1


@pytest.mark.http
def test_no_route_passes_the_checker_by(tmp_path: Path, miniatures: dict[str, Path]) -> None:
    safety = {"mode": "on", "categories": FLAGS, "blocklist": ["forbidden fruit"]}
    overrides = {"safety": safety, "models": {"cpu_threads": 1}, "unidiffuser": unidiffuser(miniatures)}
    with serving(tmp_path, overrides) as server:
        # Drawn pictures: flagged ones are black, and it is said so in headers, metadata and JSON.
        answer = server.post("/post_config", params=APPLE)
        assert answer.headers["x-easel-flagged"] == "1"
        assert "1 of 1 pictures flagged" in answer.headers["x-easel-notes"]
        assert "safety;dur=" in answer.headers["server-timing"]
        assert black(picture(answer))
        assert json.loads(picture(answer).info["easel"])["flagged"] == [1]
        typed = server.post("/txt2img", json=APPLE).json()
        assert typed["ran"]["flagged"] == [1]
        assert black(Image.open(io.BytesIO(base64.b64decode(typed["images"][0]))))
        answer = server.post("/post_config", params=TREE)
        assert answer.headers["x-easel-flagged"] == "none"
        assert not black(picture(answer))
        assert server.post("/prompt2img", params={"prompt": "x", "num_inference_steps": 2}).headers["x-easel-flagged"] == "none"

        # Pictures sent: refused, whatever they are for.
        for path, params in (("/post_config", TREE), ("/img2img", TREE), ("/img2prompt", {}), ("/img2embed", {}), ("/caption", {}), ("/image_variation", {})):
            body = problem(server.post(path, params=params, files={"image": png(face())}), 422)
            assert body["type"].endswith(":image-flagged")
            assert body["errors"][0]["field"] == "image"
        assert server.post("/img2embed", files={"image": png(Image.new("RGB", (64, 64), "navy"))}).ok

        # Words.
        for path in ("/post_config", "/txt2img", "/prompt2img", "/generate", "/text_variation"):
            body = problem(server.post(path, params={"prompt": "a Förbidden  FRUIT, shiny"}), 422)
            assert body["errors"][0]["field"] == "prompt"
            assert "fruit" not in json.dumps(body).lower()

        # No request switches it off, and what it did is counted.
        problem(server.post("/post_config", params={**TREE, "safety": "off"}), 422)
        assert server.get("/capabilities").json()["safety"] == "on"
        counts = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in server.get("/metrics").text.splitlines() if line.startswith("easel_flagged_pictures_total")}
        assert counts == {'easel_flagged_pictures_total{where="output"}': 2.0, 'easel_flagged_pictures_total{where="input"}': 6.0}
        usage = {line["model"]: line["flagged"] for line in server.get("/admin/usage", key=ADMIN, params={"group_by": "model"}).json()["usage"]}
        assert usage == {"starter/stable-diffusion": 2, "mini/unidiffuser": 0}


# The device: what it does with plans that come together, and with a checker that is not there.


def device(safety: Safety) -> Device:
    models = Models(default="starter/stable-diffusion", catalogue=[Model(id="starter/stable-diffusion", family="starter")], device="cpu", cpu_threads=1)
    settings = Settings(models=models, safety=safety, unidiffuser=UniDiffuser(allow_unlisted=True))
    return Device(settings, Catalogue(settings))


def plan(made: Device, image: Pixels | None = None, client: str = "k", **values: object) -> Plan:
    return made.catalogue.plan(GenerationRequest.model_validate({**TREE, **values}), Inputs(image=image), client)


def run(made: Device, *plans: Plan) -> list[Generation]:
    path = made.fetch(made.catalogue.find(None))
    go = held(made)
    futures = [made.submit(each, path) for each in plans]
    go.set()
    return [future.result(60) for future in futures]


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' checker in miniature. Its first concept is near to every picture (a threshold below the
    cosine's least), the others to none."""
    folder = tmp_path_factory.mktemp("checker")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config={**small, "image_size": 32, "patch_size": 8}, text_config=small, projection_dim=24))
    with torch.no_grad():
        model.concept_embeds_weights.fill_(1.1)
        model.special_care_embeds_weights.fill_(1.1)
        model.concept_embeds_weights[0] = -1.1
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def lenient(checker: Path, folder: Path) -> Path:
    """The same in a pipeline's layout, with no concept near to anything."""
    model = StableDiffusionSafetyChecker.from_pretrained(checker)
    with torch.no_grad():
        model.concept_embeds_weights.fill_(1.1)
    model.save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil.from_pretrained(checker).save_pretrained(folder / "feature_extractor")
    return folder


def test_diffusers_checker_blanks_what_it_flags_and_nothing_else(checker: Path, tmp_path: Path) -> None:
    strict = device(Safety(mode="on", detector="stable_diffusion", source=str(checker)))
    (flagged,) = run(strict, plan(strict, count_returned=2))
    assert flagged.ran is not None
    assert flagged.ran.flagged == [1, 2]
    assert {p.data for p in flagged.pictures} == {bytes(64 * 64 * 3)}
    frames = strict.safety.censor(flagged.model_copy(update={"pictures": flagged.pictures * 3, "seeds": [9]}))
    assert frames.ran is not None
    assert (frames.ran.flagged, len(frames.pictures)) == ([9], 6)
    strict.queue.close()

    kind = device(Safety(mode="on", detector="stable_diffusion", source=str(lenient(checker, tmp_path))))
    off = device(Safety())
    blurring = device(Safety(mode="blur", detector="stable_diffusion", source=str(checker)))
    (passed,), (unchecked,), (blurred,) = (run(made, plan(made)) for made in (kind, off, blurring))
    assert [made.ran and made.ran.flagged for made in (passed, unchecked, blurred)] == [[], None, [1]]
    assert passed.pictures == unchecked.pictures
    assert same(to_pil(blurred.pictures[0]), mosaic(to_pil(passed.pictures[0])))
    for made in (kind, off, blurring):
        made.queue.close()


def test_a_flagged_input_fails_alone_in_its_batch() -> None:
    made = device(Safety(mode="on", categories=FLAGS))
    harmless = pixels(Image.new("RGB", (64, 64), "navy"))
    sent = [plan(made, pixels(face(64)), "a"), plan(made, harmless, "b"), plan(made, harmless, "c")]
    assert len({each.batch_key for each in sent}) == 1
    flagged, *others = run(made, *sent)
    assert flagged.problem is not None
    assert flagged.problem.type.endswith(":image-flagged")
    assert not flagged.pictures
    assert [len(other.pictures) for other in others] == [1, 1]
    assert same(*(to_pil(other.pictures[0]) for other in others))
    made.queue.close()


def test_nothing_is_drawn_without_the_checker(tmp_path: Path) -> None:
    made = device(Safety(mode="on", detector="stable_diffusion", source=str(tmp_path)))
    with pytest.raises(Problem) as raised:
        made.fetch(made.catalogue.find(None))
    assert raised.value.details.type.endswith(":safety-checker")
    with pytest.raises(Problem):
        made.submit(plan(made), Path("starter/stable-diffusion")).result(60)
    made.queue.close()


def test_pictures_are_found_in_every_field_of_a_plan() -> None:
    from runners.safety import _pictures

    made = Catalogue(Settings(models=Models(allow_unlisted=True)))
    one, two = pixels(Image.new("RGB", (64, 64), "red")), pixels(Image.new("RGB", (64, 64), "blue"))
    full = made.plan(GenerationRequest(prompt="x"), Inputs(image=one), "k").model_copy(update={"images": [two, one]})
    assert list(_pictures("image", full)) == [("image", one), ("images", two), ("images", one)]


# Settings and words.


@pytest.mark.parametrize("settings", [{"mode": "on", "categories": []}, {"mode": "on", "categories": ["FACE"]}, {"mode": "maybe"}, {"threshold": 0}, {"blocklist_file": "/no/such/file"}])
def test_a_checker_that_would_not_check_is_refused_at_start(settings: dict) -> None:
    with pytest.raises(ValidationError):
        Safety.model_validate(settings)


def test_bare_words_of_yaml_mean_what_they_say() -> None:
    assert [Safety.model_validate({"mode": mode}).mode for mode in (False, True, "off", "on")] == ["off", "on", "off", "on"]
    assert Settings.model_validate({"auth": {"mode": False}}).auth.mode == "off"


@pytest.mark.parametrize(
    ("prompt", "stopped"),
    [
        ("a gore scene", True), ("GORE", True), ("(gore:1.3), sky", True), ("gore_scene", True), ("góre", True), ("ｇｏｒｅ", True), ("go\u200bre", True),
        ("go\u00adre", True), ("gore's", True), ("gorey", False), ("Al Gorean", False), ("category", False), ("gor e", False), ("", False),
        ("red  wedding", True), ("red-wedding", True), ("red, wedding", True), ("a wedding in red", False), ("tortures", True), ("torture", True), ("tort", False),
        ("Straße", True), ("STRASSE", True), ("Straßen", False), ("кровь", True), ("КРОВЬ!", True), ("血", True), ("出血", False),
    ],
)  # fmt: skip
def test_a_term_is_found_as_a_word_however_it_is_written(prompt: str, stopped: bool) -> None:
    terms = ["gore", "Red Wedding", "tortur*", "straße", "кровь", "血", "  ", "*"]
    assert Blocklist(terms).stops(prompt) is stopped
    assert not Blocklist([]).stops(prompt)


@pytest.fixture
def listed(tmp_path: Path) -> Catalogue:
    file = tmp_path / "words.txt"
    file.write_text("# comment: apple\ngore\n\nblood bath\n", encoding="utf-8")
    return Catalogue(Settings(models=Models(allow_unlisted=True), safety=Safety(blocklist_file=file, blocklist=["pear"])))


@pytest.mark.parametrize("prompt", ["some gore", "blood bath", "a pear", "go<lora:none:1>re"])
def test_every_drawn_prompt_is_checked_as_it_is_drawn(listed: Catalogue, prompt: str) -> None:
    with pytest.raises(Problem) as raised:
        listed.plan(GenerationRequest(prompt=prompt), Inputs(), "k")
    assert ("prompt", "has words that are not allowed here", None) in [(e.field, e.message, e.given) for e in raised.value.details.errors]
    assert listed.plan(GenerationRequest(prompt="an apple", negative_prompt=prompt.replace("<lora:none:1>", "")), Inputs(), "k")


def test_counts_of_an_older_usage_log_go_on(tmp_path: Path) -> None:
    import sqlite3

    from core.database import in_file
    from core.usage import Ledger
    from tests.test_usage import FIRST, drawn
    from tests.test_usage import plan as asked

    path = tmp_path / "usage.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.executescript(FIRST)
    connection.close()
    made = drawn(2)
    assert made.ran is not None
    flagged = made.model_copy(update={"ran": made.ran.model_copy(update={"flagged": [0]})})
    for ledger in (Ledger(in_file(path)), Ledger(in_file(path))):
        ledger.append(asked(), flagged)
    assert [(line.pictures, line.flagged) for line in ledger.report(None, None, [])] == [(8, 2)]
