"""What starting, loading and switching cost: `.venv/bin/python bench/switching.py` writes its section of bench/results.md.

- A start: `bentoml serve` to /readyz 200, and from there to the first picture.
- Loading: Easel's way from local files to a model in memory, in turns with diffusers' `from_pretrained` of the same folder in the same
  process. The files are in the page cache.
- Switching: two models asked for in turns by one client, where the memory budget holds both and where it holds one, against the same
  model again.
- Compiling: the first picture of a model with `optimise: {compile: true}`, in a process with no kernels kept, in a second one
  with those that the first has kept, and of the model as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import turns
import yaml
from scenarios import STARTER
from turns import ROOT, Server, spread

sys.path.insert(0, str(ROOT))

SECTION = "## Start and switch"
OTHER = "bench/other"  # the starter's files again, as a model of its own
STEPS = 10
BUDGETS = {"both": None, "one of them": 75_000_000}  # bytes; the starter has 49 million in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--loads", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=20, help="of each kind when switching")
    parser.add_argument("--no-compiling", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    parser.add_argument("--first-picture", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_picture is not None:
        return first_picture(**options.first_picture)
    lines = [SECTION, "", turns.where("bench/switching.py", os.getloadavg()[0]), "", f"{STARTER}, float32, 64x64, {STEPS} steps; median (least to greatest).", ""]
    lines += [starting(options.starts), loading_models(options.loads)]
    lines += [switching(which, budget, options.pictures) for which, budget in BUDGETS.items()]
    turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    if not options.no_compiling:
        lines += compiling()
        turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    print("\n".join(lines))


def starting(starts: int) -> str:
    ready, first = [], []
    for _ in range(starts):
        with served() as server:
            server.start_with("/post_config", asked(STARTER, 1))
            ready.append(server.start_s)
            first.append(server.first_s)
    return f"- `bentoml serve` to /readyz 200: {spread(ready, 1)} s; from there to the first picture, with the model's loading: {spread(first, 1)} s."


def loading_models(loads: int) -> str:
    import torch
    from diffusers import StableDiffusionPipeline

    from core import settings
    from core.catalogue import Catalogue
    from runners import loading
    from runners.residency import Residency

    configured = settings.load()
    entry = Catalogue(configured).find(STARTER)
    home, path = Residency(configured.models, torch.device("cpu")), loading.fetch(entry, None)

    def easel() -> None:
        home.acquire(entry, path, torch.float32)

    def plain() -> None:
        StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True)

    took: dict[Callable[[], None], list[float]] = {easel: [], plain: []}
    for number in range(loads + 1):
        for work in (easel, plain) if number % 2 else (plain, easel):
            home.unload(None)
            began = time.perf_counter()
            work()
            took[work].append(1000 * (time.perf_counter() - began))
    mine, raw = took[easel][1:], took[plain][1:]  # the first ones import what is imported late
    ratios = [a / b for a, b in zip(mine, raw, strict=True)]
    return f"- Loading: {spread(mine, 0)} ms, diffusers' `from_pretrained` {spread(raw, 0)} ms; ratio of neighbours {spread(ratios, 2)}."


def switching(which: str, budget: int | None, pictures: int) -> str:
    with served(budget) as server:
        for model in (STARTER, OTHER, STARTER):
            server.start_with("/post_config", asked(model, 1))
        same, other = (
            [1000 * s for s in server.load(1, pictures, "/post_config", lambda i, models=models: {"params": asked(models[i % 2], i)}, b"\x89PNG").latencies]
            for models in ((STARTER, STARTER), (OTHER, STARTER))
        )
    more = statistics.median(other) - statistics.median(same)
    return f"- Two models in turns, memory for {which}: {spread(other, 0)} ms a picture, {spread(same, 0)} ms of the same model again: a switch takes {more:.0f} ms."


def asked(model: str, seed: int) -> dict[str, Any]:
    return {"prompt": "red apple", "model_id": model, "num_inference_steps": STEPS, "seed": seed}


@contextmanager
def served(budget: int | None = None) -> Iterator[Server]:
    """A server with the starter twice, and memory for as many bytes of models."""
    settings = yaml.safe_load((ROOT / "configuration.yaml").read_text())
    entry = {"family": "starter", "source": str(ROOT / STARTER), "optimise": {"channels_last": True}}
    settings["models"] |= {"catalogue": [{"id": name, **entry} for name in (STARTER, OTHER)], "memory_budget_bytes": budget}
    with tempfile.TemporaryDirectory() as folder:
        settings["usage"]["path"] = f"{folder}/usage.sqlite3"
        settings["jobs"]["store"] = f"sqlite:///{folder}/jobs.sqlite3"
        settings["experiments"]["path"] = settings["prompts"]["styles"] = settings["prompts"]["wildcards"] = None
        path = Path(folder) / "configuration.yaml"
        path.write_text(yaml.safe_dump(settings))
        with Server(env={"EASEL_CONFIGURATION": str(path)}) as server:
            yield server


def compiling() -> list[str]:
    """The first picture of each of three processes, and the next ones."""
    with tempfile.TemporaryDirectory() as folder:
        ran = {name: in_a_process(compile=compile, cache=folder) for name, compile in (("not compiled", False), ("compiled, no kernels kept", True), ("compiled, kernels kept", True))}
    rows = [f"| {name} | {one['first']:.1f} | {1000 * one['next']:.0f} | {one['made']} | {one['kept']} | {one['difference']} |" for name, one in ran.items()]
    return ["", "| process | first picture, s | the next ones, ms, least of 5 | kernels made | taken from the cache | difference, of 255 |", "| --- | ---: | ---: | ---: | ---: | ---: |", *rows]


def in_a_process(**what: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--first-picture", json.dumps(what)], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def first_picture(compile: bool, cache: str) -> None:
    """Draw with the starter in this process, which has just begun; print what it took."""
    import numpy as np
    import torch
    from torch._dynamo.utils import counters

    from core.catalogue import Catalogue
    from core.model_settings import Model, Models
    from core.optimising import Optimise
    from core.plans import Inputs
    from core.requests import GenerationRequest
    from core.settings import Settings
    from runners.device import Device

    model = Model(id=STARTER, family="starter", optimise=Optimise(channels_last=True, compile=compile))
    settings = Settings(models=Models(default=STARTER, catalogue=[model], device="cpu", compile_cache=cache, cpu_threads=torch.get_num_threads()))
    catalogue = Catalogue(settings)
    device = Device(settings, catalogue)
    path = device.fetch(catalogue.find(STARTER))
    plan = catalogue.plan(GenerationRequest(**asked(STARTER, 1)), Inputs(), "bench")
    took = []
    for _ in range(6):
        began = time.perf_counter()
        drawn = device.submit(plan, path).result(turns.REPLY_S).pictures[0]
        took.append(time.perf_counter() - began)
    device.queue.close()
    reference = Path(cache) / "reference"
    if not reference.exists():
        reference.write_bytes(drawn.data)
    both = [np.frombuffer(data, np.uint8).astype(int) for data in (drawn.data, reference.read_bytes())]
    made, kept = counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps({"first": took[0], "next": min(took[1:]), "made": made, "kept": kept, "difference": int(abs(both[0] - both[1]).max())}))


if __name__ == "__main__":
    main()
