"""LoRAs over HTTP: the seed's example, both modes, headers and metadata, rights, usage; and that
`pixel_art_style` draws pixels."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from diffusers import DiffusionPipeline

from api import reading
from core.catalogue import Catalogue
from core.model_settings import Model, Models
from core.settings import ROOT, Loras, Settings
from runners.device import Device
from tests import lora_files
from tests.conftest import ADMIN, SEED_MODELS, USER, Server, serving
from tests.test_http import jpeg, picture, problem
from tests.test_meaning import array

SHIPPED = json.loads((ROOT / "lora_list.json").read_text())
SDXL, SD15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALL = {"model_id": SD15, "width": 128, "height": 128, "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, miniatures: dict[str, Path]) -> Path:
    """A registry: the shipped LoRA, and some made for the miniature of SD 1.5."""
    made = tmp_path_factory.mktemp("loras")
    shutil.copy(ROOT / SHIPPED["pixel_art_style"]["lora_path"], made / "pixel_art_style.safetensors")
    entries = {"pixel_art_style": {**SHIPPED["pixel_art_style"], "file_name": "pixel_art_style.safetensors"}}
    pipe = DiffusionPipeline.from_pretrained(miniatures["sd15"], safety_checker=None, requires_safety_checker=False)
    for seed, (name, rights) in enumerate({"free": "AllowCommercialUse", "private": "None", "broken": "None"}.items()):
        lora_files.write(made / f"{name}.safetensors", lora_files.kohya_layout(lora_files.matrices(pipe, seed)))
        entries[name] = {
            "model_id": None, "base_model": SD15, "lora_path": f"https://example.org/{name}", "trigger words": [f"{name} style"],
            "allow_no_mention": name == "free", "usage_rights": rights, "creator": "Mina", "file_name": f"{name}.safetensors",
        }  # fmt: skip
    (made / "broken.safetensors").write_bytes(b"<html></html>")
    (made / "lora_list.json").write_text(json.dumps(entries))
    return made


@pytest.fixture(scope="module")
def served(folder: Path, miniatures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server where the seed's SDXL id leads to the starter, as on a machine without the real one."""
    models = [{"id": "starter/stable-diffusion", "family": "starter", "commercial_use": True}]
    models += [{"id": SDXL, "family": "starter", "source": "starter/stable-diffusion", "licence": "Apache-2.0", "commercial_use": True}]
    models += [{"id": SD15, "family": SEED_MODELS[SD15], "source": str(miniatures["sd15"]), "commercial_use": True}]
    overrides = {"models": {"catalogue": models}, "loras": {"registry": str(folder / "lora_list.json"), "folder": str(folder)}}
    with serving(tmp_path_factory.mktemp("lora-server"), overrides) as running:
        yield running


@pytest.mark.http
def test_the_seeds_lora_example_runs_as_written(served: Server) -> None:
    response = requests.post(
        served.url + "/post_config",
        headers={"X-API-Key": USER},
        params={"prompt": "pixel_art_style, a cat wearing sunglasses", "lora": "pixel_art_style", "model_id": SDXL},
        timeout=280,
    )
    assert picture(response).size == (64, 64)
    assert response.headers["x-easel-loras"].startswith("pixel_art_style:1;layers=")
    assert response.headers["x-easel-loras"].endswith("unmatched=0")
    assert response.headers["x-easel-commercial-use"] == "allowed"


@pytest.mark.http
@pytest.mark.parametrize("files", [{}, {"image": jpeg()}], ids=["txt2img", "img2img"])
def test_a_lora_acts_in_both_modes_and_leaves_nothing_behind(served: Server, files: dict[str, bytes]) -> None:
    def draw(**values: object) -> bytes:
        response = served.post("/post_config", params={"prompt": "a cat", **SMALL, **values}, files=files or None)
        return picture(response).tobytes()

    plain = draw()
    changed = draw(lora="free:0.7")
    assert changed != plain
    assert draw() == plain
    assert draw(prompt="<lora:free:0.7>a cat") == changed
    assert draw(lora="free:0.7,private:0.5") not in (plain, changed)
    assert draw(lora="free", lora_scale=0.7) == changed
    assert draw() == plain


@pytest.mark.http
def test_headers_metadata_and_status_tell_of_loras(served: Server) -> None:
    response = served.post("/post_config", params={"prompt": "a cat", "lora": "private:0.5", "lora_triggers": "auto", **SMALL})
    info = picture(response).info
    assert response.headers["x-easel-loras"] == "private:0.5;layers=48;unmatched=0"
    assert (response.headers["x-easel-commercial-use"], response.headers["x-easel-credit"]) == ("not allowed", "Mina")
    assert "added to the prompt: private style" in response.headers["x-easel-notes"]
    record = json.loads(info["easel"])
    assert record["prompt"] == "a cat, private style"
    assert {k: record["loras"][0][k] for k in ("name", "weight", "credit", "commercial_use")} == {"name": "private", "weight": 0.5, "credit": "Mina", "commercial_use": False}
    assert info["parameters"].startswith("a cat, private style <lora:private:0.5>\n")
    assert f'Lora hashes: "private: {record["loras"][0]["sha256"][:10]}"' in info["parameters"]
    model = next(m for m in served.get("/buffer_status").json()["models"] if m["model_id"] == SD15)
    sizes = {x["name"]: x["resident_bytes"] for x in model["loras"]}
    assert sizes["private"] > 10_000
    assert model["resident_bytes"] > sum(sizes.values())


@pytest.mark.http
def test_capabilities_name_the_loras_that_fit(served: Server) -> None:
    body = served.get("/capabilities").json()
    assert body["loras"] == {"max": 8, "weight": {"default": 1, "min": -10, "max": 10}}
    assert {m["model_id"]: m["loras"] for m in body["models"]} == {
        "starter/stable-diffusion": ["pixel_art_style"], SDXL: ["pixel_art_style"], SD15: ["free", "private", "broken"],
    }  # fmt: skip


@pytest.mark.http
def test_what_cannot_be_done_is_refused_and_the_next_request_works(served: Server) -> None:
    def refused(status: int, **values: object) -> str:
        body = problem(served.post("/post_config", params={"prompt": "x", **SMALL, **values}), status)
        picture(served.post("/post_config", params={"prompt": "x", "lora": "free", **SMALL}))
        return body["detail"]

    assert "starter/stable-diffusion" in refused(422, lora="pixel_art_style")
    assert "LoRA private does not allow commercial use" in refused(422, lora="private", commercial=True)
    assert "broken" in refused(503, lora="broken")
    assert "did you mean 'free'" in refused(422, prompt="<lora:fre:1> x")


@pytest.mark.http
def test_the_usage_report_counts_pictures_as_json_and_csv(served: Server) -> None:
    def report(**values: object) -> list[dict[str, object]]:
        return served.get("/admin/usage", key=ADMIN, params=values).json()["usage"]

    before = sum(r["pictures"] for r in report(group_by="lora") if r["lora"] == "free")
    ran = served.post("/post_config", params={"prompt": "x", "lora": "free", "count_returned": 3, "commercial": True, **SMALL})
    assert sum(r["pictures"] for r in report(group_by="lora") if r["lora"] == "free") == before + 3
    rows = report(group_by="key,model,lora,commercial")
    line = next(r for r in rows if r["lora"] == "free" and r["commercial"] == "true")
    assert (line["model"], line["pictures"], line["picture_steps"]) == (SD15, 3, 3 * int(ran.headers["x-easel-steps"]))
    assert line["key"] not in (USER, None)
    text = served.get("/admin/usage", key=ADMIN, params={"group_by": "model", "format": "csv"})
    assert text.headers["content-type"].startswith("text/csv")
    assert {row["model"]: row["pictures"] for row in csv.DictReader(io.StringIO(text.text))} == {r["model"]: str(r["pictures"]) for r in report(group_by="model")}
    by_accept = requests.get(served.url + "/admin/usage", headers={"X-API-Key": ADMIN, "Accept": "text/csv"}, timeout=10)
    assert by_accept.text.startswith("key,model,lora,requests,pictures,picture_steps")
    assert report(until="2020-01-01") == []
    problem(served.get("/admin/usage", key=USER), 403)
    assert "did you mean 'lora'" in problem(served.get("/admin/usage", key=ADMIN, params={"group_by": "loras"}), 422)["detail"]
    problem(served.get("/admin/usage", key=ADMIN, params={"since": "yesterday"}), 422)


@pytest.mark.http
def test_unloading_a_model_drops_its_loras(served: Server) -> None:
    plain = picture(served.post("/post_config", params={"prompt": "x", **SMALL})).tobytes()
    served.post("/post_config", params={"prompt": "x", "lora": "free", **SMALL})
    assert served.post("/admin/unload", key=ADMIN, params={"model_id": SD15}).json() == {"unloaded": 1}
    assert picture(served.post("/post_config", params={"prompt": "x", **SMALL})).tobytes() == plain
    assert next(m for m in served.get("/buffer_status").json()["models"] if m["model_id"] == SD15)["loras"] == []


def unevenness(pixels: np.ndarray) -> float:
    """The mean variance of colours within squares of 4x4 pixels: 0 for pixel art of that grain."""
    height, width, _ = pixels.shape
    return float(pixels.reshape(height // 4, 4, width // 4, 4, 3).var(axis=(1, 3)).mean())


def test_pixel_art_style_draws_pixels() -> None:
    settings = Settings(
        models=Models(default="starter/stable-diffusion", catalogue=[Model(id="starter/stable-diffusion", family="starter")]),
        loras=Loras(registry=ROOT / "lora_list.json"),
    )
    device = Device(settings, Catalogue(settings))

    def drawn(**values: object) -> float:
        request = reading.parse({"prompt": "pixel_art_style, a cat wearing sunglasses", "seed": 1, "count_returned": 4, **values})
        plan = device.catalogue.plan(request, None, "test")
        generation = device.submit(plan, device.fetch(device.catalogue.find(plan.model_id))).result(250)
        return float(np.mean([unevenness(array(p)) for p in generation.pictures]))

    threads = torch.get_num_threads()
    try:
        assert drawn(lora="pixel_art_style") < 0.5 * drawn()
        assert (ROOT / SHIPPED["pixel_art_style"]["lora_path"]).stat().st_size <= 2 * 2**20
    finally:
        device.queue.close()
        torch.set_num_threads(threads)
