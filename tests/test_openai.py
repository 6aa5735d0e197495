"""OpenAI's own Python package against a real server, and what its clients see when something is wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
import requests
from PIL import Image

from core.links import Links
from core.problems import Problem
from tests.conftest import USER, Server, wait_for
from tests.test_http import jpeg
from tests.test_images import saved

STARTER = "starter/stable-diffusion"
FAST = {"num_inference_steps": 4, "seed": 7}
http = pytest.mark.http


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0, timeout=120) as made:
        yield made


def opened(b64: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64 or "")))


def cat(server: Server) -> bytes:
    return server.post("/post_config", params={"prompt": "cat face", "seed": 3, "num_inference_steps": 12}).content


@http
def test_a_picture_is_the_one_that_the_seed_contract_draws(server: Server, client: openai.OpenAI) -> None:
    body = {**FAST, "negative_prompt": "blue", "scheduler": "DPM++ 2M Karras"}
    answer = client.images.generate(model=STARTER, prompt="red apple", n=2, size="64x96", extra_body=body)
    assert (answer.size, answer.output_format, answer.quality, answer.background) == ("64x96", "png", "medium", "opaque")
    assert answer.created > 1.7e9
    assert [one.seed for one in answer.data] == [7, 8]
    params = {**body, "prompt": "red apple", "width": 64, "height": 96, "count_returned": 2}
    same = server.post("/post_config", params=params, headers={"Accept": "application/json"}).json()["images"]
    assert [one.b64_json for one in answer.data] == same
    assert "Seed: 8" in opened(answer.data[1].b64_json).info["parameters"]


@http
def test_formats_and_compression(client: openai.OpenAI) -> None:
    sizes = {}
    for compression in (10, 100):
        answer = client.images.generate(prompt="star", output_format="webp", output_compression=compression, extra_body=FAST)
        assert opened(answer.data[0].b64_json).format == "WEBP"
        sizes[compression] = len(answer.data[0].b64_json)
    assert sizes[10] < sizes[100]


@http
def test_quality_is_the_number_of_steps(client: openai.OpenAI) -> None:
    for quality, steps in (("low", 12), ("high", 38)):
        answer = client.images.with_raw_response.generate(prompt="star", quality=quality, extra_body={"seed": 1})
        assert answer.headers["x-easel-steps"] == str(steps)
        assert answer.parse().quality == quality
    answer = client.images.with_raw_response.generate(prompt="star", quality="low", extra_body=FAST)
    assert answer.headers["x-easel-steps"] == "4"


@http
def test_a_url_serves_the_picture_without_a_key_and_cannot_be_guessed(server: Server, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="red apple", response_format="url", extra_body=FAST)
    url = answer.data[0].url
    assert url.startswith(f"{server.url}/v1/images/files/")
    assert answer.data[0].b64_json is None
    served = requests.get(url, timeout=10)
    assert (served.status_code, served.headers["content-type"]) == (200, "image/png")
    same = client.images.generate(prompt="red apple", extra_body=FAST)
    assert served.content == base64.b64decode(same.data[0].b64_json)
    for wrong in (url[:-1] + ("a" if url[-1] != "a" else "b"), f"{server.url}/v1/images/files/", f"{server.url}/v1/images/files/x/../../../models"):
        assert requests.get(wrong, timeout=10).status_code == 401
    assert server.get("/v1/images/files/unknown").status_code == 404


@http
def test_an_edit_repaints_what_is_transparent_in_the_mask_and_keeps_the_rest(server: Server, client: openai.OpenAI) -> None:
    before = cat(server)
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(image=("cat.png", before), mask=("mask.png", saved(mask, "PNG")), prompt="dog face", extra_body=FAST)
    old, new = (picture.convert("RGB") for picture in (Image.open(io.BytesIO(before)), opened(answer.data[0].b64_json)))
    assert new.crop((32, 0, 64, 64)).tobytes() == old.crop((32, 0, 64, 64)).tobytes()
    assert new.crop((0, 0, 28, 64)).tobytes() != old.crop((0, 0, 28, 64)).tobytes()
    assert "Denoising strength: 1" in opened(answer.data[0].b64_json).info["parameters"]


@http
def test_an_edit_without_a_mask_takes_the_pictures_own_transparency_or_redraws_all(client: openai.OpenAI) -> None:
    clear = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    clear.paste((0, 0, 0, 0), (32, 0, 64, 64))
    answer = client.images.edit(image=[("in.png", saved(clear, "PNG"))], prompt="red apple", extra_body=FAST)
    kept = opened(answer.data[0].b64_json).convert("RGB").crop((0, 0, 32, 64))
    assert kept.getextrema() == ((200, 200), (30, 30), (30, 30))
    answer = client.images.edit(image=("in.jpg", jpeg((64, 64))), prompt="red apple", extra_body={**FAST, "strength": 0.5})
    assert "Denoising strength: 0.5" in opened(answer.data[0].b64_json).info["parameters"]


@http
def test_a_stream_shows_the_picture_in_the_making_and_ends_with_the_pictures(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="red apple", n=2, stream=True, partial_images=2, extra_body={"num_inference_steps": 150, "seed": 7}))
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    done = [event for event in events if event.type == "image_generation.completed"]
    assert events == [*partial, *done]
    assert [event.partial_image_index for event in partial] in ([0], [0, 1])  # as many as there was time for
    assert (opened(partial[0].b64_json).format, partial[0].size, partial[0].background) == ("PNG", "64x64", "opaque")
    assert opened(partial[0].b64_json).convert("L").getextrema()[1] > 0
    assert [event.seed for event in done] == [7, 8]
    assert (done[0].output_format, done[0].quality, done[0].size) == ("png", "medium", "64x64")
    assert done[0].usage.total_tokens == done[0].usage.input_tokens_details.text_tokens > 0
    assert "Seed: 8" in opened(done[1].b64_json).info["parameters"]


@http
def test_a_stream_has_the_pictures_of_the_plain_answer(server: Server, client: openai.OpenAI) -> None:
    plain = client.images.generate(prompt="star", n=2, extra_body=FAST)
    events = list(client.images.generate(prompt="star", n=2, stream=True, extra_body=FAST))
    assert [(event.type, event.b64_json) for event in events] == [("image_generation.completed", one.b64_json) for one in plain.data]
    edited = list(client.images.edit(image=("in.jpg", jpeg((64, 64))), prompt="red apple", stream=True, output_format="webp", extra_body={**FAST, "strength": 0.5}))
    assert [event.type for event in edited] == ["image_edit.completed"]
    assert opened(edited[0].b64_json).format == "WEBP"


@http
def test_a_stream_is_refused_by_its_status_and_ends_when_its_client_goes(server: Server, client: openai.OpenAI) -> None:
    for given, param in (({"partial_images": 1}, "partial_images"), ({"stream": True, "partial_images": 4}, "partial_images"), ({"stream": True, "response_format": "url"}, "response_format"), ({"stream": True, "n": 0}, "n")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="x", **given)
        assert caught.value.param == param
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="x", model="missing/model", stream=True)
    with client.images.generate(prompt="x", n=10, stream=True, partial_images=3, extra_body={"num_inference_steps": 150}) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
        assert server.get("/buffer_status").json()["queue"]["running"] == 1
    wait_for(lambda: server.get("/buffer_status").json()["queue"]["running"] == 0, 5)


@http
def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert STARTER in [model.id for model in listed]
    assert not any("upscaler" in model.id for model in listed)
    found = client.models.retrieve(STARTER)
    assert (found.id, found.object, found.owned_by) == (STARTER, "model", "starter")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model_not_found"


@http
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"n": 0}, "n"), ({"n": 11}, "n"), ({"size": "64"}, "size"), ({"size": "65x64"}, "size"), ({"size": "99999x64"}, "size"),
        ({"background": "transparent"}, "background"), ({"style": "vivid"}, "style"), ({"output_format": "gif"}, "output_format"), ({"response_format": "file"}, "response_format"),
        ({"output_compression": 50}, "output_compression"), ({"quality": "best"}, "quality"), ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"scheduler": "Eulr"}}, "scheduler"), ({"extra_body": {"lora": "no_such_lora"}}, "lora"), ({"extra_body": {"count_returned": 2}}, "count_returned"),
        ({"extra_body": {"strength": 0.5}}, "strength"), ({"extra_body": {"seed": "x"}}, "seed"), ({"extra_body": {"negativ_prompt": "x"}}, "negativ_prompt"),
        ({"extra_body": {"n": True}}, "n"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named_in_openais_shape(client: openai.OpenAI, given: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "x", **given})
    assert (caught.value.param, caught.value.type, caught.value.code) == (param, "invalid_request_error", "invalid_value")


@http
def test_every_refusal_has_openais_shape(server: Server, client: openai.OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], who: openai.OpenAI = client, **given: object) -> openai.APIStatusError:
        with pytest.raises(kind) as caught:
            (who.images.edit if "image" in given else who.images.generate)(prompt="x", **given)
        assert caught.value.body["message"]
        return caught.value

    stranger = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, stranger).code == "invalid_api_key"
    assert refused(openai.NotFoundError, model="no/such").code == "model_not_found"
    large = refused(openai.APIStatusError, image=("x.png", bytes(25 * 1024 * 1024)))
    assert (large.status_code, large.code) == (413, "request_too_large")
    assert refused(openai.APIStatusError, image=("x.png", b"no picture")).status_code == 415
    assert refused(openai.BadRequestError, image=("x.png", jpeg()), mask=("m.png", jpeg())).param == "mask"
    assert refused(openai.BadRequestError, image=[jpeg(), jpeg()]).param in ("image", "image[]")
    assert refused(openai.InternalServerError, model="missing/model").type == "server_error"
    for answer, status in (
        (server.get("/v1/nothing"), 404), (server.get("/v1/images/generations"), 405), (server.post("/v1/images/generations", data=b"{", headers={"Content-Type": "application/json"}), 400),
    ):  # fmt: skip
        assert (answer.status_code, answer.headers["content-type"], set(answer.json()["error"])) == (status, "application/json", {"message", "type", "param", "code"})


def test_a_link_expires_and_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("core.links.time.monotonic", lambda: now)
    links = Links(retention_s=10, most_bytes=5)
    first, second = links.keep(b"abc", "image/png"), links.keep(b"de", "image/webp")
    assert [links.find(name).data for name in (first, second)] == [b"abc", b"de"]
    third = links.keep(b"f", "image/png")
    assert (links.find(first), links.find(second).media_type, links.find(third).data) == (None, "image/webp", b"f")
    with pytest.raises(Problem) as caught:
        links.keep(b"123456", "image/png")
    assert caught.value.details.status == 507
    now = 110.0
    assert links.find(third) is None
