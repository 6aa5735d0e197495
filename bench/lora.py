"""LoRAs: what switching costs, and pictures per second of clients with different ones.

`.venv/bin/python bench/lora.py` makes random LoRAs for the starter model and measures, first in this
process: switching between two loaded ones against one denoising step and against loading the model
anew; then over HTTP: 8 clients with 4 LoRAs, in turns with a plain diffusers loop that draws the same
pictures and loads and unloads a LoRA for each. It writes its table into bench/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scenarios import STARTER
from turns import REPLY_S, ROOT, Server, processor, spread, write

sys.path.insert(0, str(ROOT))
import torch
from diffusers import StableDiffusionPipeline

from core import settings
from core.catalogue import Catalogue
from core.generation import Timing
from core.plans import PlannedLora
from core.requests import GenerationRequest
from runners import denoise, loading
from runners.guides import Guided
from runners.residency import Residency
from tests import lora_files

SECTION = "## LoRAs"
PROMPT = "red apple on a table"
ASKED = {"prompt": PROMPT, "model_id": STARTER, "guidance_scale": 5.0}
CLIENTS, LORAS = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="per client and round")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--limit-s", type=float, default=600, help="start no further round after so long")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = make_loras(Path(folder))
        os.environ |= {"EASEL_LORAS__REGISTRY": f"{folder}/lora_list.json", "EASEL_LORAS__FOLDER": folder, "EASEL_USAGE__PATH": f"{folder}/usage.sqlite3"}
        switching = measure_switching(paths, options.steps, options.switches)
        serving = measure_serving(paths, options)
    section = report(switching, serving, paths, options, load)
    write(options.results, SECTION, section)
    print(section)


def make_loras(folder: Path) -> list[str]:
    """Random LoRAs for the denoiser's and the text encoder's attention, and a registry of them."""
    pipe = plain_pipeline()
    entries, paths = {}, []
    for i in range(LORAS):
        tensors = lora_files.diffusers_layout(lora_files.matrices(pipe, seed=i, size=0.05))
        paths.append(str(lora_files.write(folder / f"random{i}.safetensors", tensors)))
        entries[f"random{i}"] = {
            "model_id": None, "base_model": STARTER, "lora_path": "made by bench/lora.py", "trigger words": [],
            "allow_no_mention": True, "usage_rights": "None", "file_name": f"random{i}.safetensors",
        }  # fmt: skip
    (folder / "lora_list.json").write_text(json.dumps(entries))
    return paths


def plain_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / STARTER, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_switching(paths: list[str], steps: int, switches: int) -> dict[str, list[float]]:
    """Milliseconds of each kind, again and again: a switch, a denoising step, a LoRA's and the model's loading."""
    configured = settings.load()
    catalogue = Catalogue(configured)
    entry = catalogue.find(STARTER)
    home = Residency(configured.models, loading.device_for(configured.models.device))
    path, dtype = loading.fetch(entry, None), torch.float32
    loras = [PlannedLora(name=Path(p).stem, weight=1, path=p, sha256=None, commercial_use=False, credit=None) for p in paths]
    plan = catalogue.plan(GenerationRequest(prompt=PROMPT, seed=0, num_inference_steps=steps, model_id=entry.id), None, "bench")
    plan = plan.model_copy(update={"loras": loras[:1]})
    taken: dict[str, list[float]] = {kind: [] for kind in ("switch", "step", "lora", "reload")}

    def timed(kind: str, work: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        outcome = work(*arguments)
        taken[kind].append(1000 * (time.perf_counter() - began))
        return outcome

    for _ in range(3):
        home.unload(None)
        resident = timed("reload", home.acquire, entry, path, dtype)
        for lora in loras[:2]:
            timed("lora", home.adapt, resident, [lora])
        for i in range(switches):
            timed("switch", home.adapt, resident, [loras[i % 2]])
        timing = Timing()
        denoise.generate(resident, [plan], home.adapt(resident, plan.loras), Guided(), lambda **_: None, 1, [timing])
        taken["step"].append(timing.denoise / steps)
    home.unload(None)
    return taken


def measure_serving(paths: list[str], options: argparse.Namespace) -> list[tuple[float, float]]:
    """Pictures per second over HTTP and of the plain loop, in turns."""
    pipe, end, rates = plain_pipeline(), time.monotonic() + options.limit_s, []
    asked = {**ASKED, "num_inference_steps": options.steps}
    with Server() as server:

        def client(number: int) -> None:
            with server.session() as session:
                for i in range(options.pictures):
                    params = {**asked, "lora": f"random{number % LORAS}", "seed": number * options.pictures + i}
                    answer = session.post(server.url + "/post_config", params=params, timeout=REPLY_S)
                    if answer.status_code != 200 or "x-easel-loras" not in answer.headers:
                        raise RuntimeError(f"no picture with a LoRA: {answer.status_code} {answer.text[:500]}")

        def over_http(clients: int) -> float:
            began = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(client, range(clients)))
            return clients * options.pictures / (time.perf_counter() - began)

        def plain() -> float:
            began = time.perf_counter()
            for number in range(CLIENTS * options.pictures):
                pipe.load_lora_weights(paths[number % LORAS], adapter_name="one")
                generator = torch.Generator("cpu").manual_seed(number)
                pipe(PROMPT, num_inference_steps=options.steps, guidance_scale=5.0, width=64, height=64, generator=generator)
                pipe.unload_lora_weights()
            return CLIENTS * options.pictures / (time.perf_counter() - began)

        over_http(LORAS)  # each LoRA's first use loads it
        for number in range(options.rounds):
            if time.monotonic() > end:
                print(f"out of time after {number} of {options.rounds} rounds", file=sys.stderr)
                break
            pair = (over_http(CLIENTS), plain()) if number % 2 else (plain(), over_http(CLIENTS))[::-1]
            rates.append(pair)
            print(f"round {number + 1}/{options.rounds}: HTTP/raw {pair[0] / pair[1]:.3f}", file=sys.stderr)
    return rates


def report(switching: dict[str, list[float]], serving: list[tuple[float, float]], paths: list[str], options: argparse.Namespace, load: float) -> str:
    """The section for the results file."""
    middle = {kind: statistics.median(values) for kind, values in switching.items()}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "bentoml"))
    names = {"switch": "switch between two loaded LoRAs", "step": "one denoising step", "lora": "load a LoRA", "reload": "load the model anew"}
    http, raw = ([pair[side] for pair in serving] for side in (0, 1))
    lines = [
        SECTION,
        "",
        f"`.venv/bin/python bench/lora.py {' '.join(sys.argv[1:])}".strip() + f"`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores "
        f"(load average {load:.1f} before the run), Python {platform.python_version()}, {versions}.",
        "",
        f"{STARTER}, float32, 64x64, {options.steps} steps, {torch.get_num_threads()} torch threads; random LoRAs of rank {lora_files.RANK} on the attention of "
        f"denoiser and text encoder ({os.path.basename(paths[0])} and others). Ratios are of medians.",
        "",
        "| what | ms, median (min to max) | switch / this |",
        "| --- | ---: | ---: |",
        *(f"| {names[kind]} | {spread(values, 2)} | {middle['switch'] / middle[kind]:.4f} |" for kind, values in switching.items()),
        "",
        f"{CLIENTS} clients with {LORAS} LoRAs, a picture each at a time; raw is diffusers' pipeline drawing the same pictures one after "
        "another, with load_lora_weights before and unload_lora_weights after each. The two draw in turns.",
        "",
        "| HTTP pictures/s | raw pictures/s | HTTP / raw, median (min to max) |",
        "| ---: | ---: | ---: |",
        f"| {statistics.median(http):.2f} | {statistics.median(raw):.2f} | {spread([h / r for h, r in serving], 3)} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
