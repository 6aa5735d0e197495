"""Running the service: warm-up, idle unloading, public documents, single files, and a hub that fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from core.families import FAMILIES, Entry
from core.model_settings import Model
from runners import loading
from tests.conftest import Server, serving, wait_for
from tests.original_layout import original_layout
from tests.test_http import picture, problem

pytestmark = pytest.mark.http


class Hub(BaseHTTPRequestHandler):
    """A model hub on loopback that has nothing to give: each owner stands for one way to fail."""

    def do_GET(self) -> None:
        owner = (self.path.split("/") + [""] * 4)[3]
        status, code = {"gated": (403, "GatedRepo"), "token": (403, ""), "busy": (503, "")}.get(owner, (404, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


@pytest.fixture(scope="module")
def single_file(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD 1.5 miniature as one checkpoint file, in the layout of the original Stable Diffusion."""
    pipe = StableDiffusionPipeline.from_pretrained(miniatures["sd15"])
    path = tmp_path_factory.mktemp("single") / "checkpoint.safetensors"
    save_file(original_layout(pipe), path)
    return path


@pytest.fixture(scope="module")
def server(hub: str, single_file: Path, miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    entries = [
        {"id": "starter/stable-diffusion", "family": "starter", "idle_timeout_s": 1.5},
        {"id": "single", "family": "sd15", "source": str(single_file), "config": str(miniatures["sd15"])},
        *({"id": f"{owner}/model", "family": "sd15"} for owner in ("gated", "gone", "token", "busy")),
    ]
    overrides = {
        "models": {"catalogue": entries, "warm_up": ["single"]},
        "auth": {"public_docs": True, "public_metrics": True},
    }
    env = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_TOKEN": "hub-secret"}
    with serving(tmp_path_factory.mktemp("operations"), overrides, env=env) as running:
        yield running


def state(server: Server, model_id: str) -> str:
    return next(m["state"] for m in server.get("/buffer_status").json()["models"] if m["model_id"] == model_id)


def test_a_model_to_warm_up_is_in_memory_once_the_service_is_ready(server: Server) -> None:
    assert state(server, "single") == "warm"


def test_a_single_file_draws(server: Server) -> None:
    params = {"prompt": "x", "model_id": "single", "num_inference_steps": 2, "width": 128, "height": 128, "seed": 1}
    assert picture(server.post("/post_config", params=params)).size == (128, 128)


def test_an_idle_model_leaves_memory_and_comes_back(server: Server) -> None:
    params = {"prompt": "red apple", "num_inference_steps": 2, "seed": 1}
    first = server.post("/post_config", params=params)
    assert picture(first)
    wait_for(lambda: state(server, "starter/stable-diffusion") == "cold", 15)
    assert server.post("/post_config", params=params).content == first.content


def test_documents_and_metrics_are_public_where_configured(server: Server) -> None:
    for path in ("/docs", "/openapi.json", "/docs.json", "/metrics"):
        assert requests.get(server.url + path, timeout=10).status_code == 200
    problem(requests.get(server.url + "/capabilities", timeout=10), 401)


@pytest.mark.parametrize(
    ("owner", "kind", "advice"),
    [("gated", "model-gated", "accept its licence"), ("gone", "model-missing", "HF_TOKEN"), ("token", "model-gated", "without rights"), ("busy", "model-unreachable", "Check the network")],
)
def test_a_hub_that_refuses_is_told_with_what_to_do(server: Server, owner: str, kind: str, advice: str) -> None:
    body = problem(server.post("/post_config", params={"prompt": "x", "model_id": f"{owner}/model"}), 503)
    assert kind in body["type"]
    assert advice in body["detail"]
    assert "hub-secret" not in str(body) + server.log.read_text()
    assert picture(server.post("/post_config", params={"prompt": "red apple", "num_inference_steps": 2}))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "download", full)
    entry = Entry(Model(id="owner/model", family="sd15"), FAMILIES["sd15"])
    with pytest.raises(loading.Problem, match="disk is full") as caught:
        loading.fetch(entry, None)
    assert caught.value.details.status == 503
