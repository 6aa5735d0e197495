"""The calls that README.md and docs/ show run as they are written: each page's, one after another, against a real server.

Left out is what needs other hosts (Civitai, a language model) or another configuration; the big models are miniatures.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from core.settings import ROOT
from tests import miniatures as made
from tests.conftest import ADMIN, USER, Server, serving

pytestmark = pytest.mark.http
# Blocks with these words are not run, and why.
LEFT_OUT = {
    "add_new_lora": "asks Civitai",
    "llm_prompt_assistance": "asks a language model",
    "x-easel-flagged": "needs safety.mode",
    "make serve": "serves",
    "bentoml serve": "serves",
    "docker run": "needs an engine",
    "kubectl": "needs a cluster",
}


def blocks(page: Path) -> list[str]:
    """A page's bash blocks with calls, but for those that are left out."""
    found = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if "curl" in block and not any(word in block for word in LEFT_OUT)]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


@pytest.fixture(scope="module")
def server(miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("documented")
    torch.manual_seed(0)
    made.save_ip_adapter(UNet2DConditionModel.from_pretrained(miniatures["sd15"] / "unet"), folder / "ip")
    registry = Path(shutil.copy(ROOT / "lora_list.json", folder))
    small = {"family": "sd15", "source": str(miniatures["sd15"]), "size": 128, "num_inference_steps": 2}
    adapter = {"id": "ip-adapter_sd15", "family": "sd15", "source": str(folder / "ip"), "subfolder": "models", "weight_name": "ip-adapter.safetensors", "image_encoder": "models/image_encoder"}
    catalogue = [{"id": "starter/stable-diffusion", "family": "starter", "num_inference_steps": 4}, {"id": "stable-diffusion-v1-5/stable-diffusion-v1-5", **small}, {"id": "starter/upscaler", "family": "upscaler"}]
    overrides = {
        "models": {"catalogue": catalogue, "ip_adapters": [adapter], "cpu_threads": 1},
        "animation": {"motion_adapters": [{"id": "mini/motion", "source": str(miniatures["motion"])}]},
        "prompts": {"styles": str(ROOT / "styles.csv"), "wildcards": str(ROOT / "wildcards")},
        "loras": {"registry": str(registry)},
    }
    with serving(folder, overrides) as running:
        yield running


def with_inputs(server: Server, folder: Path) -> None:
    """The files that the calls send or name, and `.env`."""
    (folder / ".env").write_text(f"API_KEY={USER}\nADMIN_API_KEY={ADMIN}\n")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "apple.png").write_bytes(server.post("/post_config", params={"prompt": "red apple", "seed": 1}).content)
    shutil.copy(folder / "apple.png", folder / "style.png")
    shutil.copy(next((ROOT / "starter/loras").glob("*.safetensors")), folder / "mine.safetensors")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_calls_run_as_they_are_written(server: Server, page: Path, tmp_path: Path) -> None:
    with_inputs(server, tmp_path)
    if page.name == "embeddings.md":
        shutil.copy(next((ROOT / "starter/embeddings").glob("*.safetensors")), tmp_path / "mine.safetensors")
    script = "\n".join(blocks(page)).replace("http://127.0.0.1:3000", server.url).replace("localhost:3000", server.url.removeprefix("http://"))
    script = script.replace("loras/NAME", "loras/mine")
    before = {path.name for path in tmp_path.iterdir()}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "API_KEY": USER, "KEY": USER, "ADMIN_API_KEY": ADMIN, "ADMIN": ADMIN}
    fails = 'set -eo pipefail; curl() { command curl --fail-with-body --show-error "$@"; }\n'
    done = subprocess.run(["bash", "-c", fails + script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    written = [path for path in tmp_path.iterdir() if path.name not in before]
    for path in written:
        if path.suffix in (".png", ".gif"):
            Image.open(path).load()
    if page.name == "animate.md":
        assert Image.open(tmp_path / "waves.gif").n_frames == 16


def test_the_words_that_leave_a_block_out_are_those_of_a_page() -> None:
    text = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert not [word for word in LEFT_OUT if word not in text]
