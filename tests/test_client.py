"""Python clients against a real server: one that openapi-python-client makes of the document, and BentoML's own."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import pytest
from bentoml.exceptions import BentoMLException
from PIL import Image, ImageChops

from core.settings import ROOT
from tests.conftest import USER, Server
from tests.test_http import jpeg

pytestmark = pytest.mark.http
FAST = {"num_inference_steps": 4, "seed": 7}


class Made:
    """The package that was made. `made.api.typed.typed_txt2img` is imported when it is named."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self._path)
        return getattr(module, name) if hasattr(module, name) else Made(f"{self._path}.{name}")


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_text(json.dumps(server.get("/openapi.json").json()))
    tools = Path(sys.executable).parent
    command = [tools / "openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none", "--output-path", "easel_client", "--config", ROOT / "docs/openapi-client.yaml", "--fail-on-warning"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield Made("easel_client")
    sys.path.remove(str(folder))


@pytest.fixture
def client(made: Made, server: Server) -> Any:
    return made.AuthenticatedClient(base_url=server.url, token=USER, timeout=120)


def test_it_has_every_operation_and_imports(made: Made, server: Server) -> None:
    for path, methods in server.get("/openapi.json").json()["paths"].items():
        for operation in methods.values():
            module = importlib.import_module(f"easel_client.api.{operation['tags'][0]}.{operation['operationId']}")
            assert module.sync_detailed, path


def test_it_draws(made: Made, client: Any) -> None:
    drawn = made.api.typed.typed_txt2img.sync(client=client, body=made.models.GenerationRequest(prompt="red apple", count_returned=2, scheduler="DPM++ 2M Karras", **FAST))
    assert isinstance(drawn, made.models.GenerationResponse)
    assert (drawn.seeds, drawn.ran.model_id, drawn.ran.scheduler) == ([7, 8], "starter/stable-diffusion", "DPM++ 2M")
    assert Image.open(io.BytesIO(base64.b64decode(drawn.images[1]))).size == (64, 64)
    file = made.api.generation.generation_post_config.sync(client=client, prompt="red apple", scheduler="DPM++ 2M Karras", **FAST)
    difference = ImageChops.difference(Image.open(file.payload), Image.open(io.BytesIO(base64.b64decode(drawn.images[0]))))
    assert max(high for _, high in difference.getextrema()) <= 1  # alone, and in a batch of two


def test_it_sends_pictures_with_lists_and_numbers(made: Made, client: Any) -> None:
    picture = made.types.File(io.BytesIO(jpeg()), "in.jpg", "image/jpeg")
    captions = made.api.unidiffuser.unidiffuser_caption.sync(client=client, body=made.models.CaptionForm(image=[picture, picture], **FAST))
    assert len(captions.captions) == 2
    form = made.models.Img2ImgForm(prompt="red apple", image=picture, control_image=[picture], controlnet=["starter/controlnet-canny"], control_guidance_end=[0.5], strength=0.5, **FAST)
    drawn = made.api.typed.typed_img2img.sync(client=client, body=form)
    assert (drawn.ran.strength, drawn.ran.controls[0].id, drawn.ran.controls[0].end) == (0.5, "starter/controlnet-canny", 0.5)


def test_it_lists_loras_and_capabilities(made: Made, client: Any) -> None:
    assert made.api.loras.loras_get_available_loras.sync(client=client).warning is None
    offer = made.api.models.models_capabilities.sync(client=client)
    starter = next(model for model in offer.models if model.model_id == "starter/stable-diffusion")
    assert starter.num_inference_steps.max_ == 150
    assert "DPM++ 2M Karras" in starter.schedulers


def test_errors_are_typed(made: Made, client: Any, server: Server) -> None:
    refused = made.api.typed.typed_txt2img.sync_detailed(client=client, body=made.models.GenerationRequest(prompt="x", scheduler="Eulr"))
    assert refused.status_code == 422
    assert isinstance(refused.parsed, made.models.ProblemDetails)
    assert [error.field for error in refused.parsed.errors] == ["scheduler"]
    stranger = made.AuthenticatedClient(base_url=server.url, token="wrong")
    assert made.api.models.models_capabilities.sync(client=stranger).status == 401
    openai = made.api.openai.openai_generations.sync(client=client, body=made.models.ImagesRequest(prompt="x", model="no/such"))
    assert openai.error.code == "model_not_found"


TYPED_CALLS: dict[str, dict[str, Any]] = {
    "txt2img": {"prompt": "x", "controlnet": None, "guidance_scale": 3.5},
    "img2img": {"prompt": "x", "image": "picture", "strength": 0.9},
    "inpaint": {"prompt": "x", "image": "picture", "mask": "picture"},
    "outpaint": {"prompt": "x", "image": "picture", "outpaint_left": 16},
    "upscale": {"image": "picture", "scale": 2.0},
    "animate": {"prompt": "x", "num_frames": 2, "model_id": "stable-diffusion-v1-5/stable-diffusion-v1-5", "width": 128, "height": 128},
    "generate": {"prompt": "x"},
    "caption": {"image": ["picture", "picture"]},
    "embed": {"image": ["picture"]},
    "joint": {},
    "image": {},
    "text": {},
    "image_variation": {"image": "picture"},
    "text_variation": {"prompt": "x"},
    "list_loras": {},
}
ADDING = {"add_lora", "remove_lora"}  # tests/test_lora_http.py calls these, where there is a Civitai


def test_bentomls_client_calls_every_typed_api(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "in.jpg"
    path.write_bytes(jpeg((64, 64)))
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        assert {name for name, api in client.endpoints.items() if not api.route.startswith("/internal/")} == {*TYPED_CALLS, *ADDING}
        for name, values in TYPED_CALLS.items():
            given = {key: path if value == "picture" else [path] * len(value) if isinstance(value, list) else value for key, value in values.items()}
            more = {} if name in ("upscale", "embed", "list_loras") else {"num_inference_steps": 2, "seed": 1}
            assert getattr(client, name)(**given, **more) is not None, name


async def _asynchronously(url: str) -> Any:
    async with bentoml.AsyncHTTPClient(url, token=USER, timeout=120) as client:
        return await client.txt2img(prompt="red apple", **FAST)


def test_bentomls_clients_say_what_was_wrong_and_work_asynchronously(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url, token=USER, timeout=120) as client:
        with pytest.raises(BentoMLException, match="did you mean") as caught:
            client.txt2img(prompt="x", scheduler="Eulr")
        assert caught.value.error_code == 422
    with pytest.raises(BentoMLException, match="Failed to fetch schema"):
        bentoml.SyncHTTPClient(server.url, token="wrong")
    assert asyncio.run(_asynchronously(server.url))["seeds"] == [7]
