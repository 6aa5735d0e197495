"""From a picture back to its request, and from that to the same picture: Easel's own and A1111's."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin
from starlette.responses import JSONResponse

from api.a1111 import PngInfo
from core import images, infotext, metadata, replay, settings
from core.catalogue import Catalogue
from core.generation import Generation, Ran
from core.images import Description
from core.metadata import Record
from core.plans import Pixels
from core.problems import Problem
from core.replay import Replay
from core.requests import GenerationRequest
from core.settings import ROOT, Limits, Settings
from tests.conftest import Server, serving
from tests.test_images import saved
from tests.test_usage import drawn

http = pytest.mark.http
A1111 = """a (red:1.2) apple, <lora:pixel_art_style:0.6>, sharp
on a table
Negative prompt: blurry, bad
hands
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 64x96, Model hash: 45dee52b, Model: stable-diffusion, Clip skip: 2, Lora hashes: "pixel_art_style: 00ff00ff00ff", Version: v1.9.4"""


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(settings.load())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("replay"), {"loras": {"registry": str(ROOT / "lora_list.json")}}) as running:
        yield running


def read(text: str, catalogue: Catalogue, size: tuple[int, int] = (64, 96)) -> Replay:
    return replay.read(Description("PNG", *size, {"parameters": text}), catalogue)


# The text alone.

WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"], whitelist_characters="\n\t"), max_size=60).map(str.strip)
PROMPTS = WORDS.filter(lambda text: not any(line.lstrip().startswith("Negative prompt:") for line in text.split("\n")))
KEYS = st.from_regex(r"[A-Za-z][A-Za-z0-9 \-/]{0,20}[A-Za-z0-9]", fullmatch=True)
VALUES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30) | st.integers().map(str) | st.sampled_from(['"', '"a"', 'a, b: "c"', "\\", 'a\\"', " x "])


@given(PROMPTS, WORDS, st.dictionaries(KEYS, VALUES, min_size=3, max_size=12))
@hypothesis_settings(deadline=None)
def test_what_is_written_is_read_back(prompt: str, negative: str, pairs: dict[str, str]) -> None:
    read_back = infotext.parse(infotext.write(prompt, negative, pairs))
    assert (read_back.prompt, read_back.negative_prompt, read_back.settings) == (prompt, negative, pairs)


@given(st.text(max_size=300) | st.text(',:"\\ \nab', max_size=300))
@hypothesis_settings(deadline=None)
def test_any_text_is_read_as_something(text: str) -> None:
    infotext.parse(text)


@pytest.mark.parametrize("text", ["a" * 300_000, "a:" * 150_000, 'a: "x,' * 50_000, " " * 300_000 + "x", "a:\\" * 100_000 + '"'])
@pytest.mark.timeout(60)
def test_a_long_text_is_read_in_one_walk(text: str) -> None:
    infotext.parse(text)


def test_a_text_without_settings_is_a_prompt() -> None:
    assert infotext.parse("a cat, style: ink\nNegative prompt: dog") == infotext.Infotext("a cat, style: ink", "dog", {})


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@given(text=PROMPTS.filter(lambda text: "\ufffd" not in text))
@hypothesis_settings(deadline=None, max_examples=30)
def test_a_files_text_is_read_back(format: images.ImageFormat, text: str) -> None:
    text += "\nSteps: 1, Seed: 2, Size: 8x8"
    file = images.encode(Pixels(width=8, height=8, data=bytes(192)), format, 90, {"parameters": text})
    found = images.describe(file, Limits())
    assert (found.texts["parameters"], found.width, found.height, found.format.lower()) == (text, 8, 8, format)


@pytest.mark.parametrize("comment", [b"UNICODE\x00" + A1111.encode("utf-16-le"), b"UNICODE\x00" + A1111.encode("utf-16"), b"ASCII\x00\x00\x00" + A1111.encode(), bytes(8) + A1111.encode()])
def test_other_programs_user_comments_are_read(comment: bytes) -> None:
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    assert images.describe(saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif.tobytes()), Limits()).texts["parameters"] == A1111


# From A1111's text to a request.

ANY = Catalogue(Settings())
RAN = drawn(steps=4).ran.model_copy(update={"model_id": "starter/stable-diffusion", "width": 64, "height": 64, "prompt": "a cat", "libraries": {"easel": "0.1.0"}})


def test_a1111s_settings_get_the_names_they_have_here(catalogue: Catalogue) -> None:
    found = read(A1111, catalogue)
    assert found.request == {
        "model_id": "starter/stable-diffusion", "prompt": "a (red:1.2) apple, , sharp\non a table", "lora": "pixel_art_style:0.6", "negative_prompt": "blurry, bad\nhands",
        "width": 64, "height": 96, "scheduler": "DPM++ 2M Karras", "clip_skip": 1, "num_inference_steps": 20, "guidance_scale": 7, "seed": 965400086,
    }  # fmt: skip
    assert (found.source, found.needs, found.unmet) == ("a1111", [], [])
    assert "noise" in found.told[0]


@pytest.mark.parametrize(
    ("given", "expected", "unmet"),
    [
        ("Sampler: Euler a", {"scheduler": "Euler a"}, None),
        ("Sampler: DPM++ 2M SDE Karras", {"scheduler": "DPM++ 2M SDE Karras"}, None),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", {"scheduler": "DPM++ 2M Automatic"}, None),
        ("Sampler: Restart", {}, "there is no scheduler 'Restart' here; 'Heun' is the nearest"),
        ("CFG scale: 99", {}, "guidance_scale (99)"),
        ("Size: 65x64", {"height": 64}, "width (65) does not fit"),
        ("Model: dreamshaper_8", {}, "there is no model dreamshaper_8 here"),
        ("Face restoration: CodeFormer", {}, "Face restoration (CodeFormer) has no counterpart"),
        ("Variation seed: 5", {}, "Variation seed (5)"),
        ("Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent", {"hr_scale": 2, "hr_strength": 0.4, "hr_upscaler": "latent"}, None),
        ("Denoising strength: 0.4, Hires resize: 128x128, Size: 64x64", {"hr_scale": 2, "hr_strength": 0.4, "hr_upscaler": "latent", "width": 64, "height": 64}, None),
        ("Hires upscale: 2, Hires upscaler: 4x-UltraSharp, Hires steps: 0", {"hr_scale": 2}, "there is no upscaler '4x-UltraSharp'"),
        ("Clip skip: x", {}, "clip_skip (x)"),
        (f"Clip skip: {'9' * 5000}", {}, "clip_skip (999"),
    ],
)
def test_each_setting_is_honoured_or_told(catalogue: Catalogue, given: str, expected: dict, unmet: str | None) -> None:
    found = read(f"x\nSeed: 1, Batch size: 1, {given}, Version: v1.9.4", catalogue, (64, 64))
    assert found.request == {"prompt": "x", "seed": 1, **expected}
    assert (found.unmet == []) if unmet is None else (len(found.unmet) == 1 and unmet in found.unmet[0])


@pytest.mark.parametrize(
    ("given", "request_", "needs"),
    [
        ("Denoising strength: 0.5", {"strength": 0.5}, ["image"]),
        ("Denoising strength: 0.5, Mask blur: 8, Inpaint area: Only masked, Masked area padding: 16, Masked content: fill", {"strength": 0.5, "mask_blur": 8, "inpaint_full_res": True, "inpaint_full_res_padding": 16, "inpainting_fill": "fill"}, ["image", "mask"]),
        ("Denoising strength: 0.5, Mask blur: 4, Mask mode: Inpaint not masked", {"strength": 0.5, "mask_blur": 4, "inpainting_mask_invert": True}, ["image", "mask"]),
    ],
)  # fmt: skip
def test_what_an_input_picture_is_needed_for_is_told(catalogue: Catalogue, given: str, request_: dict, needs: list[str]) -> None:
    found = read(f"x\nSteps: 20, Seed: 1, {given}, Version: v1.9.4", catalogue)
    assert found.request == {"prompt": "x", "num_inference_steps": 20, "seed": 1, **request_}
    assert (found.needs, found.unmet) == (needs, [])


def test_loras_that_are_not_here_are_left_out_and_told(catalogue: Catalogue) -> None:
    found = read("<lora:pixel_art_style> <lora:add_detail:0.5> <hypernet:x:1>\nSteps: 4, Seed: 1, Version: v1.9.4", catalogue)
    assert found.request["prompt"] == "<lora:pixel_art_style:1>"
    assert found.unmet == ["there are no hypernetworks here (<hypernet:x:1>)", "there is no LoRA add_detail here"]


def told(picture: Description) -> None:
    """That a picture is replayed by an answer that can be sent, or refused."""
    try:
        made = replay.read(picture, ANY)
    except Problem as problem:
        assert problem.details.status == 422
        problem.body()
    else:
        JSONResponse([made.request, made.told])


@given(st.text(max_size=200) | st.text("Steps: ,x1<>lora\n\"", max_size=200))
@hypothesis_settings(deadline=None, max_examples=50)
def test_any_text_is_replayed_or_refused(text: str) -> None:
    told(Description("PNG", 64, 64, {"parameters": text + "\nSteps: 4, Seed: 1, Size: 64x64"}))


LONG = ["[" + ":" * 300_000, "[" + ":1" * 150_000, "[a:" * 100_000, "<lora:" * 50_000, "<lora:a:1>" * 30_000, "AND " * 75_000, f"x\nSteps: 4, Seed: 1, Model: a{' ' * 300_000}b", "x\nSteps: 4, Seed: 1, Model: " + "[a" * 150_000, f"x\nSteps: 4, Seed: 1, Sampler: a{' ' * 300_000}b", "x\nSteps: 4, Seed: 1, Size: " + "1" * 300_000]


@pytest.mark.parametrize("text", LONG, ids=[text[:32].split("\n")[-1][:24] for text in LONG])
def test_a_long_text_holds_nobody_up(text: str) -> None:
    began = time.process_time()
    told(Description("PNG", 64, 64, {"parameters": text if "\n" in text else f"{text}\nSteps: 4, Seed: 1, Size: 64x64"}))
    assert time.process_time() - began < 2


KNOWN = [*replay._PLAIN, *replay._MASK, "Model", "Size", "Sampler", "Schedule type", "Clip skip", "Hires upscaler", "Hires resize", "Denoising strength", "Mask mode", "Inpaint area", "Left", "ControlNet 0", "Version", "Foo"]
STRANGE = ["9" * 5000, "-1", "nan", "1e999", "0x0", "99999x1", "\u0663", '"\\ud800"', '"Latent (\\udc00)"', '"\\u0000"', '"' * 3, "None", "easel 0", "fill", "5", "0.5", "64x64"]


@given(st.text("ab <lora:x>[::]\n", max_size=20), st.dictionaries(st.sampled_from(KNOWN), st.sampled_from(STRANGE) | st.text(max_size=8), max_size=6))
@hypothesis_settings(deadline=None, max_examples=200)
def test_any_settings_are_replayed_or_refused(prompt: str, given: dict[str, str]) -> None:
    text = f"{prompt}\nSteps: 4, Seed: 1, Foo bar: 1, {', '.join(f'{key}: {value}' for key, value in given.items())}"
    told(Description("PNG", 64, 64, {"parameters": text}))
    PngInfo(info=text, items={}, parameters=infotext.parse(text).settings).model_dump_json()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@given(st.dictionaries(st.sampled_from([*Record.model_fields]), JSON | st.sampled_from(["\x00", "nan", "../x", "<lora:a>", -1, 10**30, {"first": [0, 0], "scale": 2, "steps": 1, "strength": 1, "upscaler": "x"}]), max_size=4))
@hypothesis_settings(deadline=None, max_examples=200)
def test_any_record_is_replayed_or_refused(forged: dict[str, object]) -> None:
    told(Description("PNG", 64, 64, {"easel": json.dumps(metadata.record(RAN, 1) | forged)}))


# What a request may say; a tag is no part of the prompt that is drawn.
ASKED = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufffd", whitelist_characters="\n\r\t") | st.sampled_from(',:"\\\n<>()[]'), min_size=1, max_size=80).map(str.strip).filter(lambda text: text and not replay._TAG.search(text))
DRAWN = {"seed": st.integers(0, 2**53 - 1), "num_inference_steps": st.integers(1, 150), "guidance_scale": st.floats(0, 30), "clip_skip": st.integers(0, 1), "torch_dtype": st.just("float32")}


def embedded(format: images.ImageFormat, ran: Ran, seed: int) -> Description:
    """What a file of a picture that `ran` made says of itself."""
    picture = Pixels(width=64, height=64, data=bytes(64 * 64 * 3))
    return images.describe(images.encode(picture, format, 90, metadata.texts(Generation(pictures=[picture], seeds=[seed], ran=ran), 0)), Limits())


@given(ASKED, ASKED | st.just(""), st.fixed_dictionaries(DRAWN), st.sampled_from([("Euler", None), ("DPM++ 2M", "Karras"), ("Euler a", None)]))
@hypothesis_settings(deadline=None, max_examples=100)
def test_a_pngs_request_is_read_back_equal(prompt: str, negative: str, asked: dict[str, Any], scheduler: tuple[str, str | None]) -> None:
    request = {"prompt": prompt, "negative_prompt": negative, **asked}
    assert GenerationRequest.model_validate(request).model_dump(include=set(request)) == request
    ran = RAN.model_copy(update=request | {"scheduler": scheduler[0], "schedule": scheduler[1]})
    found = replay.read(embedded("png", ran, asked["seed"]), ANY)
    wanted = request | {"model_id": RAN.model_id, "width": 64, "height": 64, "scheduler": " ".join(filter(None, scheduler))}
    assert found.request == {name: value for name, value in wanted.items() if value or name not in ("negative_prompt", "clip_skip")}
    assert found.told == []


@pytest.mark.parametrize("format", ["jpeg", "webp"])
@given(ASKED.filter(lambda text: not re.search(r"^\s*Negative prompt:", text, re.MULTILINE)), ASKED | st.just(""), st.fixed_dictionaries(DRAWN | {"guidance_scale": st.integers(0, 300).map(lambda tenths: tenths / 10)}))
@hypothesis_settings(deadline=None, max_examples=50)
def test_a_jpegs_and_a_webps_request_is_read_back_equal(format: images.ImageFormat, prompt: str, negative: str, asked: dict[str, Any]) -> None:
    found = replay.read(embedded(format, RAN.model_copy(update={"prompt": prompt, "negative_prompt": negative, **asked}), asked["seed"]), ANY)
    wanted = {"prompt": prompt, "negative_prompt": negative, "seed": asked["seed"], "num_inference_steps": asked["num_inference_steps"], "guidance_scale": asked["guidance_scale"], "clip_skip": asked["clip_skip"], "width": 64, "height": 64, "format": format}
    assert {name: found.request.get(name, 0 if name == "clip_skip" else "") for name in wanted} == wanted
    assert found.unmet == []


# Over HTTP.


def post(server: Server, file: bytes, **kwargs: object):
    return server.post("/replay", files={"image": ("picture", file)}, **kwargs)


REQUESTS = [
    {"prompt": "red apple, (green:1.2) leaf", "num_inference_steps": 5, "seed": 11},
    {"prompt": "cat face\nNegative prompt: no, a prompt", "negative_prompt": "blue", "scheduler": "DPM++ 2M Karras", "guidance_scale": 3.25, "width": 96, "num_inference_steps": 6, "clip_skip": 1, "seed": 2},
    {"prompt": "<lora:pixel_art_style:0.35>", "num_inference_steps": 4, "seed": 5, "torch_dtype": "float32"},
    {"prompt": "{red|green|blue} apple", "dynamic_prompts": "true", "lora": "pixel_art_style", "lora_scale": 0.7, "lora_triggers": "auto", "num_inference_steps": 4, "seed": 9},
    {"prompt": "star", "hr_scale": 1.5, "hr_steps": 3, "hr_strength": 0.6, "hr_upscaler": "lanczos", "num_inference_steps": 4, "seed": 1},
]


@http
@pytest.mark.parametrize("params", REQUESTS, ids=[str(i) for i in range(len(REQUESTS))])
def test_a_picture_is_drawn_again_to_the_last_byte(server: Server, params: dict) -> None:
    original = server.post("/post_config", params=params)
    found = post(server, original.content).json()
    assert (found["source"], found["notes"]) == ("easel", [])
    again = post(server, original.content, params={"run": "true"})
    assert (again.status_code, again.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(again.content)).tobytes() == Image.open(io.BytesIO(original.content)).tobytes()
    assert server.post("/post_config", params=found["request"]).content == again.content


@http
def test_each_picture_of_a_request_comes_back_alone(server: Server) -> None:
    answer = server.post("/post_config", params={"prompt": "heart", "count_returned": 2, "num_inference_steps": 4, "seed": 40}, headers={"Accept": "multipart/mixed"})
    second = [part.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n", 1)[0] for part in answer.content.split(b"--" + answer.headers["content-type"].split("boundary=")[1].encode())[1:-1]][1]
    assert post(server, second).json()["request"]["seed"] == 41
    sheet = server.post("/post_config", params={"prompt": "heart", "count_returned": 2, "num_inference_steps": 4, "seed": 40}).content
    found = post(server, sheet).json()
    assert found["request"]["seed"] == 40
    assert "holds several" in found["notes"][0]


@http
@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_jpeg_or_webp_is_replayed_from_its_exif(server: Server, format: str) -> None:
    params = {"prompt": "red apple", "negative_prompt": "blue", "scheduler": "Euler a", "lora": "pixel_art_style:0.5", "num_inference_steps": 4, "seed": 3, "format": format}
    original = server.post("/post_config", params=params)
    found = post(server, original.content).json()
    assert (found["source"], found["request"]["format"], len(found["notes"])) == ("easel", format, 1)
    again = post(server, original.content, params={"run": "true"})
    assert again.headers["content-type"] == f"image/{format}"
    assert again.content == original.content


@http
def test_a1111s_picture_is_drawn_with_a_note(server: Server) -> None:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", A1111)
    file = saved(Image.new("RGB", (64, 96)), "PNG", pnginfo=chunk)
    found = post(server, file).json()
    assert (found["source"], found["request"]["lora"]) == ("a1111", "pixel_art_style:0.6")
    again = post(server, file, params={"run": "true"})
    assert (again.status_code, again.headers["x-easel-seeds"], again.headers["x-easel-scheduler"]) == (200, "965400086", "DPM++ 2M Karras")
    assert "A1111 draws its noise" in again.headers["x-easel-notes"]


@http
def test_img2img_gives_the_request_and_says_what_is_needed(server: Server) -> None:
    cat = server.post("/post_config", params={"prompt": "cat face", "num_inference_steps": 4, "seed": 3}).content
    params = {"prompt": "dog face", "strength": 0.6, "num_inference_steps": 5, "seed": 4}
    files = {"image": ("cat.png", cat)}
    drawn = server.post("/post_config", params=params, files=files).content
    found = post(server, drawn).json()
    assert found["notes"] == ["it was made from files that it does not hold; send them along: image"]
    assert server.post("/post_config", params=found["request"], files=files).content == drawn
    refused = post(server, drawn, params={"run": "true"})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "image")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    files["mask"] = ("mask.png", saved(mask, "PNG"))
    painted = server.post("/post_config", params={**params, "mask_blur": 2, "inpainting_fill": "fill"}, files=files).content
    found = post(server, painted).json()
    assert (found["request"]["mask_blur"], found["request"]["inpainting_fill"]) == (2, "fill")
    assert server.post("/post_config", params=found["request"], files=files).content == painted


@http
@pytest.mark.parametrize(
    ("file", "status"),
    [(saved(Image.new("RGB", (8, 8)), "PNG"), 422), (saved(Image.new("RGB", (8, 8)), "GIF"), 422), (b"no picture", 415), (b"", 422)],
    ids=["without metadata", "gif", "no picture", "empty"],
)
def test_what_cannot_be_replayed_is_refused(server: Server, file: bytes, status: int) -> None:
    answer = post(server, file)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


@http
def test_bad_calls_are_named(server: Server) -> None:
    for answer, field in (
        (server.post("/replay"), "image"), (post(server, b"x", params={"runn": "true"}), "runn"), (post(server, b"x", params={"run": "perhaps"}), "run"),
        (server.post("/replay", files={"picture": ("x", b"x")}), "picture"), (server.post("/replay", data={"image": "http://x/y.png"}), "image"),
    ):  # fmt: skip
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_pictures_of_other_routes_are_refused_with_the_route(catalogue: Catalogue) -> None:
    for text, route in (("Postprocess upscale by: 4, Postprocess upscaler: x, Postprocess upscale to: 8x8", "/upscale"), ("Steps: 1, Seed: 1, Motion adapter: m, Version: easel 0.1.0", "/animate")):
        with pytest.raises(Problem) as caught:
            read(f"\n{text}", catalogue)
        assert route in caught.value.details.detail


def test_a_record_of_another_version_gives_way_to_the_text(catalogue: Catalogue) -> None:
    assert metadata.read_record('{"seed": 1}') is None
    found = replay.read(Description("PNG", 64, 96, {"parameters": A1111, "easel": '{"seed": 1}'}), catalogue)
    assert found.request["seed"] == 965400086
