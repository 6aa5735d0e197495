"""Bad uploads and bodies over HTTP: a picture or a 4xx problem, never a 5xx, and the next request works."""

from __future__ import annotations

import json

import pytest
import requests
from PIL import Image

from tests.conftest import USER, Server
from tests.test_http import FAST, jpeg, picture, problem
from tests.test_images import png_bomb, saved

pytestmark = pytest.mark.http


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = {
    "cmyk": saved(Image.new("CMYK", (40, 30), (0, 200, 200, 0)), "JPEG"),
    "alpha": saved(Image.new("RGBA", (40, 30), (255, 0, 0, 90)), "PNG"),
    "palette": saved(Image.new("P", (40, 30)), "GIF"),
    "16-bit": saved(Image.new("I;16", (40, 30), 30000), "PNG"),
    "animated": saved(Image.new("RGB", (40, 30)), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]),
    "turned by EXIF": saved(Image.new("RGB", (40, 30)), "JPEG", exif=turned().tobytes()),
    "tiff": saved(Image.new("RGB", (40, 30)), "TIFF"),
}
REFUSED = {
    "empty": (b"", 422),
    "truncated": (jpeg()[:400], 422),
    "no pixels": (png_bomb(0), 415),
    "bomb": (png_bomb(60_000), 413),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>", 415),
    "html": (b"<html></html>", 415),
    "noise": (bytes(range(256)) * 40, 415),
    "a narrow strip": (saved(Image.new("L", (3, 3000)), "PNG"), 422),
    "21 MiB": (bytes(21 * 1024 * 1024), 413),
    "30 MiB": (bytes(30 * 1024 * 1024), 413),
}


@pytest.fixture(autouse=True)
def the_next_request_works(server: Server):
    yield
    assert picture(server.post("/post_config", params={"prompt": "x", "num_inference_steps": 2, "seed": 1})).size == (64, 64)


@pytest.mark.parametrize("route", ["/post_config", "/img2img"])
@pytest.mark.parametrize("name", PICTURES)
def test_unusual_pictures_are_taken(server: Server, route: str, name: str) -> None:
    fields = {"params": {"prompt": "x", **FAST}} if route == "/post_config" else {"data": {"prompt": "x", **FAST}}
    assert server.post(route, files={"image": ("p", PICTURES[name])}, **fields).status_code == 200


@pytest.mark.parametrize("route", ["/post_config", "/img2img"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused(server: Server, route: str, name: str) -> None:
    data, status = REFUSED[name]
    problem(server.post(route, data={"prompt": "x"}, files={"image": ("p.png", data, "image/png")}), status)


@pytest.mark.parametrize("route", ["/post_config", "/img2img"])
@pytest.mark.parametrize("value", ["http://127.0.0.1:1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", ""])
def test_a_string_for_a_file_is_refused_and_never_fetched(server: Server, route: str, value: str) -> None:
    assert "image" in problem(server.post(route, files={"prompt": (None, "x"), "image": (None, value)}), 422)["detail"]
    assert "image" in problem(server.post(route, json={"prompt": "x", "image": value}), 422)["detail"]


def test_files_under_unknown_names_or_twice_are_refused(server: Server) -> None:
    problem(server.post("/post_config", params={"prompt": "x"}, files={"imgae": jpeg()}), 422)
    problem(server.post("/post_config", params={"prompt": "x"}, files=[("image", jpeg()), ("image", jpeg())]), 422)
    problem(server.post("/txt2img", data={"prompt": "x"}, files={"image": jpeg()}), 422)
    problem(server.post("/img2img", data={"prompt": "x"}), 422)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"prompt": "x", "prompt": "y"}', "application/json", 422),
        (b'{"prompt": "x", "seed": true}', "application/json", 422),
        (b'{"prompt": "x", "width": {"a": [1]}}', "application/json", 422),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (json.dumps({"prompt": "x", "guidance_scale": float("nan")}).encode(), "application/json", 422),
        (b"no boundary", "multipart/form-data", 400),
        (b"--b\r\nbroken", "multipart/form-data; boundary=b", 422),
        (b"x", "application/vnd.bentoml+pickle", 415),
        (b"x", "text/plain", 415),
    ],
)
@pytest.mark.parametrize("route", ["/post_config", "/txt2img", "/img2img"])
def test_broken_bodies_are_problems(server: Server, route: str, body: bytes, kind: str, status: int) -> None:
    problem(server.post(route, data=body, headers={"Content-Type": kind}), status)


def test_parameters_in_the_query_are_checked(server: Server) -> None:
    for params, field in (({"prompt": "x", "guidance_scale": "nan"}, "guidance_scale"), ({"prompt": "x", "stepz": 3}, "stepz"), ({}, "prompt"), ({"prompt": "x", "width": "1e9"}, "width")):
        errors = problem(server.post("/post_config", params=params), 422)["errors"]
        assert [e["field"] for e in errors] == [field]
    problem(server.post("/post_config?prompt=a&prompt=b"), 422)
    problem(server.post("/post_config?prompt=%ff%fe"), 422)
    problem(server.post("/post_config?prompt=x&%00=1"), 422)
    problem(server.post("/post_config?prompt=" + "x" * 50_000), 422)
    problem(server.post("/post_config", json={"prompt": "x" * 100_000}), 422)


@pytest.mark.parametrize("route", ["/post_config", "/txt2img"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", "x" * 100_000), ("prompt", "a\x1bb"), ("guidance_scale", float("inf")), ("guidance_scale", -1), ("num_inference_steps", -5),
        ("num_inference_steps", 10**30), ("num_inference_steps", "many"), ("width", 2**40), ("scheduler", "Restart"), ("model_id", "nobody/nothing"), ("promt", "x"),
    ],
)  # fmt: skip
def test_bad_values_are_named_on_every_route(server: Server, route: str, field: str, value: object) -> None:
    body = json.dumps({"prompt": "x", field: value}).encode()
    errors = problem(server.post(route, data=body, headers={"Content-Type": "application/json"}), 422)["errors"]
    assert [e["field"] for e in errors] == [field]


def test_a_body_that_never_says_its_length_is_still_bounded(server: Server) -> None:
    def endless():
        for _ in range(40):
            yield bytes(1024 * 1024)

    try:
        response = requests.post(server.url + "/post_config?prompt=x", data=endless(), headers={"X-API-Key": USER, "Content-Type": "application/json"}, timeout=60)
        problem(response, 413)
    except requests.ConnectionError:  # the server may close before it has read all
        pass


def test_headers_never_carry_the_prompt(server: Server) -> None:
    response = server.post("/post_config", params={"prompt": "evil\r\nX-Injected: yes", **FAST})
    assert picture(response)
    assert "x-injected" not in response.headers
    assert not any("evil" in v for v in response.headers.values())
