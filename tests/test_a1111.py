"""A1111's API, by the PyPI client webuiapi against a real server, and what its clients see when something is wrong."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator

import pytest
import requests
import webuiapi
from PIL import Image, ImageChops

from core import a1111, settings
from core.a1111 import ImageToImage, TextToImage
from core.auth import Keys
from core.catalogue import Catalogue
from core.problems import Problem
from core.settings import ROOT, Secrets, Settings
from tests.conftest import ADMIN, USER, Server, catalogue, serving, unidiffuser, wait_for
from tests.test_images import saved

http = pytest.mark.http
STARTER = "starter/stable-diffusion"
SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 7}
BIG = base64.b64encode(saved(Image.new("RGB", (3000, 1000)), "PNG")).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, miniatures: dict) -> Iterator[Server]:
    overrides = {"models": {"catalogue": catalogue(miniatures)}, "unidiffuser": unidiffuser(miniatures), "loras": {"registry": str(ROOT / "lora_list.json")}, "prompts": {"styles": str(ROOT / "styles.csv")}}
    with serving(tmp_path_factory.mktemp("a1111"), overrides) as running:
        yield running


def client_of(server: Server, key: str = USER) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", username="anyone", password=key)


@pytest.fixture(scope="module")
def client(server: Server) -> webuiapi.WebUIApi:
    return client_of(server)


def cat(server: Server) -> Image.Image:
    return Image.open(io.BytesIO(server.post("/post_config", params={"prompt": "cat face", "seed": 3, "num_inference_steps": 12}).content)).convert("RGB")


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


# webuiapi.


@http
def test_pictures_are_those_that_the_seed_contract_draws(server: Server, client: webuiapi.WebUIApi) -> None:
    answer = client.txt2img(prompt="red apple", negative_prompt="blue", sampler_name="DPM++ 2M", scheduler="Karras", cfg_scale=6, batch_size=2, n_iter=2, **SMALL)
    params = {"prompt": "red apple", "negative_prompt": "blue", "scheduler": "DPM++ 2M Karras", "guidance_scale": 6, "count_returned": 4, "num_inference_steps": 4, "seed": 7}
    same = server.post("/post_config", params=params, headers={"Accept": "application/json"}).json()["images"]
    assert answer.json["images"] == same
    info = answer.info
    assert (info["seed"], info["all_seeds"], info["sampler_name"], info["sd_model_name"]) == (7, [7, 8, 9, 10], "DPM++ 2M", STARTER)
    assert [text.split("Seed: ")[1].split(",")[0] for text in info["infotexts"]] == ["7", "8", "9", "10"]
    assert answer.images[1].info["parameters"] == info["infotexts"][1]
    assert answer.parameters["steps"] == 4


@http
def test_a_lora_tag_and_a_chosen_model(server: Server, client: webuiapi.WebUIApi) -> None:
    answer = client.txt2img(prompt="red apple <lora:pixel_art_style:0.8>", override_settings={"sd_model_checkpoint": "stable-diffusion", "CLIP_stop_at_last_layers": 2}, **SMALL)
    assert "pixel_art_style" in answer.info["infotexts"][0].rsplit("\n", 1)[1]
    assert answer.info["clip_skip"] == 2
    same = server.post("/post_config", params={"prompt": "red apple", "lora": "pixel_art_style:0.8", "clip_skip": 1, "scheduler": "Euler a", "guidance_scale": 7, "num_inference_steps": 4, "seed": 7})
    assert pixels(answer.image) == pixels(Image.open(io.BytesIO(same.content)))


@http
def test_hires_fix(client: webuiapi.WebUIApi) -> None:
    answer = client.txt2img(prompt="star", enable_hr=True, hr_scale=1.5, hr_upscaler=webuiapi.HiResUpscaler.Latent, hr_second_pass_steps=3, denoising_strength=0.6, **SMALL)
    assert (answer.image.size, answer.info["denoising_strength"]) == ((96, 96), 0.6)
    assert "Hires upscale: 1.5, Hires steps: 3, Hires upscaler: Latent" in answer.info["infotexts"][0]


@http
def test_img2img_and_a_mask(server: Server, client: webuiapi.WebUIApi) -> None:
    before = cat(server)
    whole = client.img2img(images=[before], prompt="dog face", denoising_strength=0.5, **SMALL)
    params = {"prompt": "dog face", "strength": 0.5, "scheduler": "Euler a", "guidance_scale": 7, "width": 64, "height": 64, "num_inference_steps": 4, "seed": 7}
    same = server.post("/post_config", params=params, files={"image": ("cat.png", saved(before, "PNG"))})
    assert pixels(whole.image) == pixels(Image.open(io.BytesIO(same.content)))
    assert "init_images" not in whole.parameters
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    painted = client.img2img(images=[before], mask_image=mask, prompt="dog face", inpainting_fill=1, inpaint_full_res=False, denoising_strength=0.9, **SMALL).image.convert("RGB")
    right, left = (32, 0, 64, 64), (0, 0, 26, 64)
    assert painted.crop(right).tobytes() == before.crop(right).tobytes()
    assert painted.crop(left).tobytes() != before.crop(left).tobytes()
    other = client.img2img(images=[before], mask_image=mask, prompt="dog face", inpainting_fill=1, inpaint_full_res=False, inpainting_mask_invert=1, denoising_strength=0.9, **SMALL).image.convert("RGB")
    assert other.crop((0, 0, 32, 64)).tobytes() == before.crop((0, 0, 32, 64)).tobytes()


@http
def test_progress_and_interrupt_are_about_the_callers_own_work(server: Server, client: webuiapi.WebUIApi) -> None:
    other = client_of(server, ADMIN)
    assert (client.get_progress()["progress"], client.get_progress()["state"]["job_count"]) == (0, 0)
    errors: list[Exception] = []
    drawn: list[object] = []

    def draw(who: webuiapi.WebUIApi, side: int, steps: int) -> None:
        try:
            drawn.append(who.txt2img(prompt="tree", width=side, height=side, steps=steps))
        except RuntimeError as error:
            errors.append(error)

    mine = threading.Thread(target=draw, args=(client, 256, 150))
    mine.start()
    wait_for(lambda: client.get_progress()["state"]["sampling_step"] > 0, 60, server)
    seen = client.get_progress()
    assert 0 < seen["progress"] < 1
    assert (seen["state"]["sampling_steps"], seen["state"]["job_count"]) == (150, 1)
    wait_for(lambda: client.get_progress()["current_image"] is not None, 60, server)
    assert Image.open(io.BytesIO(base64.b64decode(client.get_progress()["current_image"]))).format == "JPEG"
    assert other.get_progress()["state"]["job_count"] == 0
    assert other.interrupt() == {}
    assert mine.is_alive()
    theirs = threading.Thread(target=draw, args=(other, 64, 1))
    theirs.start()
    assert client.interrupt() == {}
    mine.join(120)
    theirs.join(120)
    assert (errors[0].args[0], len(errors), len(drawn)) == (499, 1, 1)
    assert client.get_progress()["state"]["job_count"] == 0


@http
def test_what_clients_ask_at_start(client: webuiapi.WebUIApi) -> None:
    assert STARTER in client.util_get_model_names()
    assert client.util_get_current_model() == STARTER
    assert {"Euler a", "DPM++ 2M", "UniPC"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(client.util_get_scheduler_names())
    assert [lora["name"] for lora in client.get_loras()] == ["pixel_art_style"]
    assert "starter/upscaler" in [one["name"] for one in client.get_upscalers()]
    assert [one["name"] for one in client.get_latent_upscale_modes()] == ["Latent", "Lanczos"]
    assert "washed_out" in client.get_embeddings()["loaded"]
    assert "emoji" in [style["name"] for style in client.get_prompt_styles()]
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    assert [client.get_sd_vae(), client.get_hypernetworks(), client.get_face_restorers(), client.get_realesrgan_models()] == [[], [], [], []]
    assert (client.refresh_checkpoints(), client.get_cmd_flags()) == ({}, {})
    client.util_wait_for_ready(check_interval=0.1)


@http
def test_every_sampler_and_schedule_of_the_lists_is_one(client: webuiapi.WebUIApi) -> None:
    known = Catalogue(settings.load())
    for sampler in client.get_samplers():
        for name in (sampler["name"], *sampler["aliases"]):
            assert known.plan(a1111.translated(TextToImage(prompt="x", sampler_name=name), known), None, "t").scheduler
    for schedule in client.get_schedulers():
        assert known.plan(a1111.translated(TextToImage(prompt="x", sampler_name="Euler", scheduler=schedule["name"]), known), None, "t").scheduler


@http
def test_options_are_read_and_not_set_for_everyone(server: Server, client: webuiapi.WebUIApi) -> None:
    assert client.set_options({"sd_model_checkpoint": STARTER}) == {}
    refused = client.set_options({"sd_model_checkpoint": "other"})
    assert (refused["status"], refused["errors"][0]["field"]) == (422, "sd_model_checkpoint")
    assert "override_settings" in refused["errors"][0]["allowed"]


@http
def test_png_info_extras_and_interrogate(server: Server, client: webuiapi.WebUIApi) -> None:
    drawn = client.txt2img(prompt="red apple", negative_prompt="blue", **SMALL)
    found = client.png_info(drawn.image)
    assert found.info == drawn.info["infotexts"][0]
    assert (found.parameters["Prompt"], found.parameters["Negative prompt"], found.parameters["Seed"]) == ("red apple", "blue", "7")
    larger = client.extra_single_image(drawn.image, upscaler_1="starter/upscaler", upscaling_resize=2)
    assert (larger.image.size, "Postprocess upscaler: starter/upscaler" in larger.info) == ((128, 128), True)
    plain = client.extra_single_image(drawn.image, upscaling_resize=3).image
    assert plain.size == (192, 192)
    assert max(high for _, high in ImageChops.difference(plain.resize((64, 64)), drawn.image).getextrema()) < 64  # the same picture
    shaped = client.extra_single_image(drawn.image, upscaler_1="Lanczos", resize_mode=1, upscaling_resize_w=90, upscaling_resize_h=60).image
    assert shaped.size == (90, 60)
    assert isinstance(client.interrogate(drawn.image).info, str)


# What is refused.


@http
@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("txt2img", {"prompt": "x", "tiling": True}, ["tiling"]),
        ("txt2img", {"prompt": "x", "restore_faces": True, "subseed_strength": 0.5}, ["restore_faces", "subseed_strength"]),
        ("txt2img", {"prompt": "x", "stepz": 3}, ["stepz"]),
        ("txt2img", {"prompt": "x", "steps": 0}, ["steps"]),
        ("txt2img", {"prompt": "x", "batch_size": 17}, ["batch_size"]),
        ("txt2img", {"prompt": "x", "sampler_name": "DPM fast"}, ["sampler_name"]),
        ("txt2img", {"prompt": "x", "sampler_name": "Euler", "scheduler": "align_your_steps"}, ["sampler_name"]),
        ("txt2img", {"prompt": "x", "enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, ["hr_upscaler"]),
        ("txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "nope", "sd_vae": "x"}}, ["override_settings.sd_model_checkpoint", "override_settings.sd_vae"]),
        ("txt2img", {"prompt": "x", "alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, ["alwayson_scripts.ControlNet"]),
        ("txt2img", {"prompt": "x <lora:none>"}, ["prompt"]),
        ("txt2img", {"prompt": ""}, ["prompt"]),
        ("txt2img", [], None),
        ("img2img", {"prompt": "x"}, ["init_images"]),
        ("img2img", {"prompt": "x", "init_images": ["http://127.0.0.1/x.png"]}, ["init_images"]),
        ("img2img", {"prompt": "x", "init_images": ["%%%"]}, ["init_images"]),
        ("extra-single-image", {"image": ""}, ["image"]),
        ("extra-single-image", {"image": BIG, "upscaling_resize": 9}, ["upscaling_resize"]),
        ("extra-single-image", {"image": "", "gfpgan_visibility": 1}, ["gfpgan_visibility"]),
        ("interrogate", {"image": "", "model": "deepdanbooru"}, ["model"]),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(server: Server, path: str, body: object, fields: list[str] | None) -> None:
    answer = server.post(f"/sdapi/v1/{path}", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422 if fields else 400, "application/problem+json")
    assert answer.json()["detail"]
    assert [error["field"] for error in answer.json()["errors"]] == (fields or [])


@http
def test_basic_holds_for_these_routes_alone(server: Server) -> None:
    def status(path: str, auth: tuple[str, str]) -> int:
        return requests.get(server.url + path, auth=auth, timeout=30).status_code

    assert [status("/sdapi/v1/samplers", ("me", key)) for key in (USER, "wrong", "")] == [200, 401, 401]
    assert status("/capabilities", ("me", USER)) == 401
    assert status("/sdapi/../capabilities", ("me", USER)) == 401
    assert "Basic" in requests.get(f"{server.url}/sdapi/v1/samplers", timeout=30).headers["www-authenticate"]
    assert "Basic" not in requests.get(f"{server.url}/capabilities", timeout=30).headers["www-authenticate"]


# Without a server.


def test_basic_reads_the_password() -> None:
    keys = Keys(Settings(), Secrets(api_key="a:b", admin_api_key="c"))

    def of(text: bytes, basic: bool = True) -> str | None:
        found = keys.caller({"authorization": "Basic " + base64.b64encode(text).decode()}, basic)
        return found and found.role

    assert [of(b"me:a:b"), of(b"me:c"), of(b"c"), of(b"c:"), of(b"me:a:b", basic=False)] == ["user", "admin", None, None, None]
    assert keys.caller({"authorization": "Basic %%"}, True) is None


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue(settings.load())


def test_defaults_of_a_whole_client_request_pass(known: Catalogue) -> None:
    body = {"prompt": "x", "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_noise": 1, "restore_faces": False, "subseed": 12, "subseed_strength": 0.0, "script_args": [], "script_name": None, "save_images": True, "do_not_save_grid": True, "refiner_checkpoint": "", "refiner_switch_at": 0.8, "hr_scale": 2, "denoising_strength": 0.7, "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}}  # fmt: skip
    made = a1111.translated(TextToImage.model_validate(body), known)
    assert made.model_dump(exclude_unset=True) == {"prompt": "x", "negative_prompt": "", "seed": -1, "count_returned": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sampler_name": "DPM++ 2M"}, "DPM++ 2M Karras"), ({"sampler_name": "DPM++ 2M Karras"}, "DPM++ 2M Karras"), ({"sampler_name": "Euler a", "scheduler": "Automatic"}, "Euler a"),
        ({"sampler_name": "Euler", "scheduler": "sgm_uniform"}, "Euler sgm_uniform"), ({"sampler_index": "Heun"}, "Heun"), ({}, None),
    ],
)  # fmt: skip
def test_sampler_and_schedule_become_one(known: Catalogue, given: dict, expected: str | None) -> None:
    assert a1111.translated(TextToImage.model_validate({"prompt": "x", **given}), known).scheduler == expected


def test_a_mask_s_settings_count_with_a_mask_alone(known: Catalogue) -> None:
    asked = {"prompt": "x", "init_images": ["AA=="], "inpainting_fill": 2, "mask_blur": 8, "styles": ['a "b"', "c"]}
    without = a1111.translated(ImageToImage.model_validate(asked), known)
    assert (without.mask_blur, without.inpainting_fill, without.strength, without.styles) == (None, None, 0.75, '"a ""b""","c"')
    made = a1111.translated(ImageToImage.model_validate({**asked, "mask": "AA=="}), known)
    assert (made.mask_blur, made.inpainting_fill, made.inpaint_full_res, made.inpaint_full_res_padding, made.inpainting_mask_invert) == (8, "latent noise", True, 0, False)
    with pytest.raises(Problem) as caught:
        a1111.translated(ImageToImage.model_validate({**asked, "mask": "AA==", "mask_blur": None, "mask_blur_x": 3}), known)
    assert caught.value.details.errors[0].field == "mask_blur_x"
    json.dumps(TextToImage.model_json_schema())
