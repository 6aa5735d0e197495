"""The OpenAPI document is valid and true: every route is in it, and answers as it says, from the entry and from each runner alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import requests
from fastapi.routing import APIRoute, iter_route_contexts
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image, PngImagePlugin

from api import answering, app, gate
from core import settings
from core.plans import Task
from tests.civitai import KEY, FakeCivitai, weights
from tests.conftest import ADMIN, Server, catalogue, serving, unidiffuser
from tests.llm import FakeLlm
from tests.test_http import jpeg
from tests.test_images import saved

pytestmark = pytest.mark.http
APPLICATION = app.build(settings.load())
DOCUMENT = APPLICATION.openapi()
SERVICES = ("ImageGeneration", "StableDiffusion", "UniDiffuser")
OF_UNIDIFFUSER = {"/sdapi/v1/interrogate", "/prompt2img", "/img2prompt", "/img2embed", *(f"/{task}" for task in get_args(Task))}
OF_STABLE_DIFFUSION = {"/post_config", "/txt2img", "/img2img", "/inpaint", "/outpaint", "/animate", "/upscale", "/v1/images/generations", "/v1/images/edits", "/v1/images/files/{name}",
    "/jobs", "/jobs/{id}", "/jobs/{id}/events", "/jobs/{id}/result", "/jobs/{id}/outputs/{index}",
    *(f"/sdapi/v1/{path}" for path in ("txt2img", "img2img", "extra-single-image")),
}  # fmt: skip
FAST = {"num_inference_steps": 2, "seed": 1}
MADE = PngImagePlugin.PngInfo()
MADE.add_text("parameters", "red apple\nSteps: 2, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64, Model: starter/stable-diffusion")
DRAW = {"prompt": "red apple", **FAST}
PICTURE = {"image": ("in.jpg", jpeg((64, 64)), "image/jpeg")}
ENCODED = base64.b64encode(jpeg((64, 64))).decode()
EXPERIMENT = {"id": "hats", "variants": [{"name": "a"}, {"name": "b"}], "metrics": [{"name": "liked", "kind": "boolean"}]}


@dataclass
class Call:
    """One way to call a route, with which it answers `status`; by default with each of the media types that it has."""

    method: str
    path: str
    more: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    names: dict[str, str] = field(default_factory=dict)

    @property
    def operation(self) -> dict[str, Any]:
        return DOCUMENT["paths"][self.path][self.method]


def post(path: str, status: int = 200, names: dict[str, str] | None = None, **more: Any) -> Call:
    return Call("post", path, more, status, names or {})


def get(path: str, names: dict[str, str] | None = None, **more: Any) -> Call:
    return Call("get", path, more, 200, names or {})


LORA = {"name": "ink", "base_model": "starter/stable-diffusion", "trigger_words": "ink, pen"}
CALLS = [
    post("/post_config", params=DRAW),
    post("/post_config", params=DRAW, files=PICTURE),
    post("/replay", params={"run": "true"}, files={"image": saved(Image.new("RGB", (64, 64)), "PNG", pnginfo=MADE)}),
    post("/txt2img", json=DRAW),
    post("/img2img", data=DRAW, files=PICTURE),
    post("/inpaint", data=DRAW, files=PICTURE | {"mask": PICTURE["image"]}),
    post("/outpaint", data=DRAW | {"outpaint_left": 16}, files=PICTURE),
    post("/animate", params=DRAW | {"num_frames": 2, "model_id": "stable-diffusion-v1-5/stable-diffusion-v1-5", "width": 128, "height": 128}),
    post("/upscale", params={"scale": 2}, files=PICTURE),
    post("/preprocess", data={"preprocessor": "canny"}, files=PICTURE),
    post("/v1/images/generations", json=DRAW),
    post("/v1/images/edits", data=DRAW, files=PICTURE),
    get("/v1/models"),
    get("/v1/models/{id}", {"id": "starter/stable-diffusion"}),
    post("/sdapi/v1/txt2img", json={"prompt": "red apple", "steps": 2}),
    post("/sdapi/v1/img2img", json={"prompt": "red apple", "steps": 2, "init_images": [ENCODED]}),
    post("/sdapi/v1/extra-single-image", json={"image": ENCODED, "upscaler_1": "starter/upscaler"}),
    post("/sdapi/v1/png-info", json={"image": ENCODED}),
    post("/sdapi/v1/interrogate", json={"image": ENCODED}),
    post("/sdapi/v1/options", json={"sd_vae": "Automatic"}),
    *(post(f"/sdapi/v1/{path}") for path in ("interrupt", "skip", "refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings")),
    *(get(f"/sdapi/v1/{path}") for path in ("progress", "options", "sd-models", "samplers", "schedulers", "loras", "embeddings", "upscalers", "latent-upscale-modes", "prompt-styles", "cmd-flags")),
    *(get(f"/sdapi/v1/{path}") for path in ("scripts", "sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models", "script-info", "extensions")),
    post("/prompt2img", params=DRAW),
    post("/img2prompt", params=FAST, files=PICTURE),
    post("/img2embed", files=PICTURE),
    post("/generate", json=DRAW),
    post("/caption", data=FAST, files=[("image", jpeg()), ("image", jpeg())]),
    post("/embed", data={"encoding": "base64"}, files=PICTURE),
    post("/joint", json=FAST),
    post("/image", json=FAST),
    post("/text"),
    post("/image_variation", data=FAST, files=PICTURE),
    post("/text_variation", json=DRAW),
    *(get(path) for path in ("/get_available_stable_diffs", "/capabilities", "/styles", "/wildcards", "/buffer_status", "/get_available_embeddings", "/livez", "/healthz", "/readyz", "/metrics")),
    get("/llm_prompt_assistance", params={"text": "red apple"}),
    get("/llm_interface", params={"text": "why?"}),
    post("/admin/loras/upload", data=LORA, files={"file": ("ink.safetensors", weights(1))}),
    get("/get_available_loras"),
    post("/list_loras"),
    post("/admin/loras/{name}/verify", names={"name": "ink"}),
    Call("patch", "/admin/loras/{name}", {"json": {"creator": "Mina"}}, names={"name": "ink"}),
    Call("delete", "/admin/loras/{name}", names={"name": "ink"}),
    post("/add_new_lora", params={"name": "1"}),
    get("/add_new_lora", params={"name": "1"}),
    post("/remove_lora", json={"name": "Style 1"}),
    post("/add_lora", json={"source": {"model_id": 2}}),
    post("/admin/loras", json={"source": "3"}),
    post("/admin/loras", 202, json={"source": "4"}, headers={"Prefer": "respond-async"}),
    post("/add_new_lora", 202, params={"name": "5", "wait": "false"}),
    Call("get", "/add_new_lora", {"params": {"name": "5", "wait": "false"}}, 202),
    get("/admin/loras/jobs"),
    get("/admin/loras/jobs/{id}", {"id": "the last"}),
    Call("delete", "/admin/loras/jobs/{id}", names={"id": "the last"}),
    post("/admin/experiments", 201, json=EXPERIMENT),
    get("/admin/experiments"),
    get("/admin/experiments/{id}", {"id": "hats"}),
    post("/post_config", params=DRAW | {"experiment": "hats", "subject": "me"}),
    post("/prompt2img", params=DRAW | {"experiment": "hats", "subject": "me"}),
    post("/experiments/{id}/outcomes", names={"id": "hats"}, json={"metric": "liked", "value": True, "subject": "me"}),
    post("/admin/experiments/{id}/stop", names={"id": "hats"}),
    get("/admin/usage"),
    get("/v1/images/files/{name}", {"name": "the last"}),
    post("/jobs", 202, params=DRAW),
    get("/jobs"),
    get("/jobs/{id}", {"id": "the last"}),
    get("/jobs/{id}/events", {"id": "the last"}),
    get("/jobs/{id}/result", {"id": "the last"}),
    get("/jobs/{id}/outputs/{index}", {"id": "the last", "index": "0"}),
    Call("delete", "/jobs/{id}", names={"id": "the last"}),
    post("/admin/unload", params={"model_id": "starter/stable-diffusion"}),
]
# The same of all that can be left as a job.
CALLS += [
    replace(call, status=202, more=call.more | {"headers": {"Prefer": "respond-async", "Accept": "*/*"}})
    for call in {call.path: call for call in CALLS if call.status == 200 and "Preference-Applied" in call.operation["responses"].get("202", {}).get("headers", {}) and "experiment" not in str(call.more)}.values()
    if not call.path.startswith(("/add_new_lora", "/admin/loras"))
]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_it_is_valid() -> None:
    assert list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []


def test_it_has_every_route() -> None:
    found = [route for route in iter_route_contexts(APPLICATION.routes) if isinstance(route.original_route, APIRoute) and route.original_route.include_in_schema]
    mounted = {(route.path_format, method.lower()) for route in found for method in route.methods or ()}
    assert {(path, method) for path, method, _ in operations() if path not in ("/livez", "/healthz", "/readyz")} == mounted


def test_it_names_each_operation_and_schema_once_and_says_what_each_is() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)
    assert not [name for name in DOCUMENT["components"]["schemas"] if "__" in name or "-" in name]
    assert not [path for path, _, operation in operations() if not operation.get("description")]
    assert not [(path, p["name"]) for path, _, o in operations() for p in o.get("parameters", ()) if p["in"] == "query" and not p.get("description")]


def test_both_ways_to_send_a_key_are_in_it() -> None:
    assert {(s["type"], s.get("name") or s.get("scheme")) for s in DOCUMENT["components"]["securitySchemes"].values()} == {("apiKey", "X-API-Key"), ("http", "bearer")}
    open_to_all = {path for path, _, operation in operations() if not operation.get("security") or {} in operation["security"]}
    assert open_to_all == {"/livez", "/healthz", "/readyz", "/v1/images/files/{name}"}


def test_every_error_is_a_problem_or_openais() -> None:
    for path, _, operation in operations():
        expected = ("application/json", "OpenAIError") if path.startswith("/v1/") else ("application/problem+json", "ProblemDetails")
        for status, answer in operation["responses"].items():
            if status >= "4":
                assert [(kind, body["schema"]["$ref"].split("/")[-1]) for kind, body in answer["content"].items()] == [expected], (path, status)


@pytest.fixture(params=SERVICES)
def served(request: pytest.FixtureRequest, tmp_path: Path, miniatures: dict[str, Path]) -> Iterator[tuple[str, Server]]:
    """The entry, and each runner alone."""
    with FakeCivitai() as civitai, FakeLlm() as llm:
        for i in range(1, 6):
            civitai.add(i, f"Style {i}")
        overrides = {
            "models": {"catalogue": catalogue(miniatures)},
            "unidiffuser": unidiffuser(miniatures),
            "animation": {"motion_adapters": [{"id": "mini/motion", "source": str(miniatures["motion"])}]},
            "loras": civitai.settings(),
            "llm": {"url": llm.url, "model": "tiny"},
        }
        with serving(tmp_path, overrides, f"service:{request.param}", env={"CIVIT_KEY": KEY, "LLM_API_KEY": "x"}) as server:
            yield request.param, server


def test_every_route_answers_as_it_says(served: tuple[str, Server]) -> None:
    name, server = served
    assert server.get("/openapi.json", key=ADMIN).json() == json.loads(json.dumps(DOCUMENT))
    declared = {api["route"] for api in server.get("/schema.json", key=ADMIN).json()["routes"]}
    assert {path for path in declared if not path.startswith("/internal/")} <= set(gate.TYPED) <= set(DOCUMENT["paths"])
    last: dict[str, str] = {}
    seen: set[tuple[str, str, int, str]] = set()
    elsewhere = OF_UNIDIFFUSER if name == "StableDiffusion" else OF_STABLE_DIFFUSION if name == "UniDiffuser" else set()
    for call in CALLS:
        kinds = list(call.operation["responses"][str(call.status)]["content"])
        for kind in kinds[:1] if (call.path, call.method, call.status, kinds[0]) in seen else kinds:
            response = answer(server, call, kind, last)
            where = f"{call.method} {call.path} as {kind} by {name}: {response.status_code} {response.text[:500]}"
            alone = name == "UniDiffuser" and call.path == "/replay" and "params" in call.more
            if alone or (call.path in elsewhere and (call.method, call.path) != ("get", "/jobs")):
                assert response.status_code == 404, where
            else:
                assert (response.status_code, response.headers["content-type"].split(";")[0]) == (call.status, kind), where
            check(call, response, where)
            seen.add((call.path, call.method, call.status, kind))
    documented = {(path, method, int(status), kind) for path, method, o in operations() for status, a in o["responses"].items() if status < "4" for kind in a["content"]}
    assert documented == seen, "add a call to CALLS for each route and answer that is new"


def answer(server: Server, call: Call, kind: str, last: dict[str, str]) -> requests.Response:
    if call.path == "/v1/images/files/{name}":
        body = DRAW | {"response_format": "url", "output_format": kind.removeprefix("image/")}
        drawn = server.post("/v1/images/generations", key=ADMIN, json=body).json()
        last[call.path] = drawn["data"][0]["url"].rpartition("/")[2] if "data" in drawn else "none"
    names = {name: last.get("/jobs" if call.path.startswith("/jobs/") else call.path, value) if value == "the last" else value for name, value in call.names.items()}
    headers = {"X-API-Key": ADMIN, "Accept": kind, **call.more.get("headers", {})}
    more = call.more
    if call.path.startswith("/v1/images/") and kind == "text/event-stream":  # which OpenAI's clients ask for in the body
        more = {name: {**given, "stream": "true" if name == "data" else True} if name in ("json", "data") else given for name, given in more.items()}
    response = requests.request(call.method, server.url + call.path.format(**names), timeout=120, **{**more, "headers": headers})
    if call.path == "/admin/loras/jobs" and response.ok:
        last["/admin/loras/jobs/{id}"] = response.json()[0]["id"]
    if response.headers.get("Location", "").startswith("/jobs/") and call.path != "/jobs":
        requests.delete(server.url + response.headers["Location"], headers={"X-API-Key": ADMIN}, timeout=60)  # one is done, below
    if call.path == "/jobs" and response.status_code == 202:
        last["/jobs"] = response.json()["id"]
    return response


def check(call: Call, response: requests.Response, where: str) -> None:
    """Body and headers are as the document says."""
    told = call.operation["responses"][str(response.status_code)]
    kind = response.headers["content-type"].split(";")[0]
    assert kind in told["content"], where
    if kind.endswith("json"):
        schema = {**told["content"][kind]["schema"], "components": DOCUMENT["components"]}
        assert not [e.message[:300] for e in Draft202012Validator(schema).iter_errors(response.json())], where
    own = {name for name in response.headers if name.lower().startswith("x-easel-") or name.lower() == "server-timing"}
    assert {name.lower() for name in own} <= {name.lower() for name in told["headers"]}, where
    assert "X-Request-Id" in response.headers or call.path in ("/livez", "/healthz", "/readyz")


def test_what_a_route_says_itself_about_its_refusals_stays() -> None:
    assert "422" in DOCUMENT["paths"]["/jobs/{id}/outputs/{index}"]["get"]["responses"]
    assert "422" not in DOCUMENT["paths"]["/jobs/{id}"]["get"]["responses"]  # any text is an id, and FastAPI's own 422 does not stay


def test_the_headers_of_answers_are_those_that_are_written() -> None:
    written = [line.split('"')[1] for line in Path(answering.__file__).read_text().splitlines() if line.strip().startswith('headers["X-Easel')]
    assert {*written} <= set(answering.HEADERS)
