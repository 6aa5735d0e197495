"""GET /metrics of real servers: every process's counts at one scrape, labels that do not grow, and what a killed process leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client import REGISTRY, Metric
from prometheus_client.parser import text_string_to_metric_families

import core.metrics as named
from core.catalogue import Catalogue
from core.model_settings import Model, Models
from core.settings import ROOT, Settings
from tests.conftest import ADMIN, Server, serving, wait_for
from tests.test_http import jpeg, picture, problem
from tests.test_shutdown import runner_of

pytestmark = pytest.mark.http
STARTER = "starter/stable-diffusion"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    broken = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(ROOT / STARTER, broken)
    (broken / "unet/config.json").write_text("{}")
    entries = [{"id": STARTER, "family": "starter"}, {"id": "broken/model", "family": "sd15", "source": str(broken)}]
    with serving(tmp_path_factory.mktemp("metrics"), {"models": {"catalogue": entries, "controlnets": [], "ip_adapters": []}}) as running:
        yield running


def scrape(server: Server) -> dict[str, Metric]:
    answer = server.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(server: Server, name: str, **labels: str) -> float | None:
    found = [s.value for family in scrape(server).values() for s in family.samples if s.name == name and s.labels == labels]
    return found[0] if found else None


def names() -> set[str]:
    return {family.name for family in REGISTRY.collect() if family.name.startswith("easel_")}


def test_all_processes_counts_come_at_one_scrape(server: Server) -> None:
    assert picture(server.post("/post_config", params={"prompt": "red apple", "num_inference_steps": 4, "count_returned": 2}))
    assert server.post("/img2prompt", files={"image": jpeg()}).ok
    assert server.post("/img2embed", files={"image": jpeg()}).ok
    problem(server.post("/post_config", params={"prompt": "x", "model_id": "broken/model"}), 503)
    problem(server.post("/post_config", params={"prompt": "x", "width": 7}), 422)
    assert server.post("/admin/unload", params={"model_id": STARTER}, key=ADMIN).ok

    # On a machine under load a runner may be late to say how it is, and be told as down once.
    wait_for(lambda: {s.value for s in scrape(server)["easel_runner_up"].samples} == {1}, 60)
    found = scrape(server)

    def of(name: str, **labels: str) -> float:
        return next(s.value for family in found.values() for s in family.samples if s.name == name and s.labels == labels)

    drawing, reading = {"runner": "StableDiffusion"}, {"runner": "UniDiffuser"}
    assert of("easel_results_total", kind="picture", model=STARTER, **drawing) == 2
    assert of("easel_results_total", kind="text", model="starter/unidiffuser", **reading) == 1
    assert of("easel_results_total", kind="embedding", model="starter/unidiffuser", **reading) == 1
    assert of("easel_steps_total", model=STARTER, **drawing) == 4
    assert of("easel_batch_rows_count", **drawing) == 4
    assert of("easel_batch_rows_sum", **drawing) == 8
    assert of("easel_model_load_seconds_count", model=STARTER, **drawing) == 1
    assert of("easel_model_load_seconds_sum", model=STARTER, **drawing) > 0
    assert of("easel_model_unload_seconds_count", model=STARTER, reason="asked", **drawing) == 1
    assert of("easel_resident_bytes", model=STARTER, **drawing) == 0
    assert of("easel_resident_bytes", model="starter/unidiffuser", **reading) > 0
    assert of("easel_queue_wait_seconds_count", **reading) >= 2  # unloading may wait for its turn too
    assert of("easel_queue_depth", **drawing) == 0
    assert of("easel_queue_limit", **drawing) == 64
    assert of("easel_stage_seconds_count", stage="denoise", **drawing) == 1
    assert of("easel_problems_total", kind="invalid-parameters", service="ImageGeneration") == 1
    assert of("easel_http_requests_total", service="ImageGeneration", route="/post_config", method="POST", status="422") == 1
    assert of("easel_http_request_seconds_count", service="ImageGeneration", route="/img2prompt") == 1
    assert of("easel_model_load_failures_total", model="broken/model", kind="model-broken", **drawing) == 1
    assert set(found) == names()


def test_what_callers_make_up_is_no_label(server: Server) -> None:
    """Nor does it need a key to try, so that it would fill memory and disk."""
    before = len(server.get("/metrics").text.splitlines())
    for i in range(50):
        requests.get(f"{server.url}/made/up/{i}", timeout=10)
        requests.request(f"MADE{i}", server.url + "/post_config", timeout=10)
        server.get(f"/admin/loras/jobs/{i}", key=ADMIN)
        server.post("/post_config", params={"prompt": f"secret{i}", "model_id": f"made/up{i}", "scheduler": f"none{i}"})
    text = server.get("/metrics").text
    assert len(text.splitlines()) < before + 100
    assert not re.search(r"made/up|MADE|secret|none\d|your-api-key|admin-key", text)
    assert value(server, "easel_http_requests_total", service="ImageGeneration", route="other", method="GET", status="401") == 50
    assert value(server, "easel_http_requests_total", service="ImageGeneration", route="/admin/loras/jobs/{id}", method="GET", status="404") == 50


def test_a_model_that_is_not_listed_is_no_label() -> None:
    catalogue = Catalogue(Settings(models=Models(allow_unlisted=True, default="a", catalogue=[Model(id="a", family="starter")])))
    assert [named.model(catalogue.find(id)) for id in ("a", "someone/dreamy-xl")] == ["a", named.UNLISTED]


def test_a_runner_alone_has_its_own_and_no_server_clears_anothers(server: Server, tmp_path: Path) -> None:
    drawn = value(server, "easel_results_total", kind="picture", model=STARTER, runner="StableDiffusion")
    with serving(tmp_path, {}, target="service:UniDiffuser") as alone:
        assert alone.post("/img2prompt", files={"image": jpeg()}).ok
        assert value(alone, "easel_results_total", kind="text", model="starter/unidiffuser", runner="UniDiffuser") == 1
        assert value(alone, "easel_http_requests_total", service="UniDiffuser", route="/img2prompt", method="POST", status="200") == 1
        assert value(alone, "easel_results_total", kind="picture", model=STARTER, runner="StableDiffusion") is None
        assert value(server, "easel_results_total", kind="picture", model=STARTER, runner="StableDiffusion") == drawn


def test_a_killed_runner_is_down_and_holds_no_memory_but_its_counts_stay(server: Server) -> None:
    assert picture(server.post("/post_config", params={"prompt": "red apple", "num_inference_steps": 1}))
    resident = {"model": STARTER, "runner": "StableDiffusion"}
    drawn = value(server, "easel_results_total", kind="picture", **resident)
    assert value(server, "easel_resident_bytes", **resident)
    runner_of(server).kill()
    found = scrape(server)
    assert [s.value for s in found["easel_runner_up"].samples if s.labels["runner"] == "StableDiffusion"] == [0]
    assert not [s for s in found["easel_resident_bytes"].samples if s.labels["runner"] == "StableDiffusion"]
    assert drawn in [s.value for s in found["easel_results"].samples if s.labels == {"kind": "picture", **resident}]


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    ours = {name for m in vars(named).values() if (name := getattr(m, "_name", "")).startswith("easel_")}
    assert ours == names()
    assert {re.sub("_total$", "", n) for n in re.findall(r"^\| (easel_[a-z_]+)", text, re.M)} == ours
