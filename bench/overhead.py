"""Pictures through HTTP against a plain diffusers loop: what the service costs.

`.venv/bin/python bench/overhead.py` starts the service on a free loopback port and a second
process that draws with diffusers alone, has them draw in turns (a machine's speed drifts, and the
two would slow each other down), and writes what it measured to bench/results.md.

The raw loop does the same useful work: the pipeline called with the prompt as a string, a CPU
generator per picture, and a PNG made by Pillow. The device, dtype, size and steps are the ones that
the service says it ran.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import statistics
import sys
import time
from functools import partial
from typing import Any

import turns
from PIL import Image, ImageChops
from turns import ROOT, Block, Pairs, RawLoop, Server, row, spread, where

MODEL, PROMPT, SECTION = "starter/stable-diffusion", "red apple on a table", "## Overhead over HTTP"
ASKED = {"prompt": PROMPT, "model_id": MODEL, "num_inference_steps": 25, "guidance_scale": 5.0}
POST = "/post_config"
CLIENTS = (1, 8)


def main() -> None:
    options = turns.options(__doc__ or "", rounds=5, count=8, unit="pictures", quick=(2, 2))
    if options.raw:
        raw_loop(options.raw)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end too
    load = os.getloadavg()[0]
    with Server() as server:
        server.start_with(POST, {**ASKED, "seed": 0})
        with contextlib.closing(RawLoop(__file__, server.ran)) as raw:
            difference = same_picture(server.first, base64.b64decode(raw.ask(1)["last"]))
            count = max(2, options.count)
            cases = {clients: (partial(draw, server, clients, options.count), partial(raw.block, count, count)) for clients in CLIENTS}
            measured = turns.in_turns(options.rounds, options.limit_s, cases)
            section = report(measured, server, raw.hello, difference, load)
    turns.write(options.results, SECTION, section)
    print(section)


def draw(server: Server, clients: int, pictures: int) -> Block:
    return server.load(clients, pictures, POST, lambda seed: {"params": {**ASKED, "seed": seed}}, b"\x89PNG")


def raw_loop(ran: dict[str, Any]) -> None:
    """The other end of `RawLoop`: reads counts, answers in lines of JSON, ends when its input does."""
    pipe_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    sys.path.insert(0, str(ROOT))
    import torch
    from diffusers import StableDiffusionPipeline

    from core import settings

    if threads := settings.load().models.cpu_threads:  # the runner does the same
        torch.set_num_threads(threads)
    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / MODEL, torch_dtype=getattr(torch, ran["dtype"]), safety_checker=None, local_files_only=True
    ).to(ran["device"])
    pipe.set_progress_bar_config(disable=True)
    width, height = map(int, ran["size"].split("x"))
    name = torch.cuda.get_device_name(ran["device"]) if ran["device"].startswith("cuda") else ran["device"]

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=pipe_out, flush=True)

    answer({"threads": torch.get_num_threads(), "device": name, "scheduler": type(pipe.scheduler).__name__})
    for line in sys.stdin:
        took, out = [], io.BytesIO()
        for seed in range(int(line)):
            began, out = time.perf_counter(), io.BytesIO()
            picture = pipe(
                PROMPT,
                num_inference_steps=int(ran["steps"]),
                guidance_scale=float(ran["guidance-scale"]),
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
            picture.save(out, "PNG", compress_level=4)  # the service's level
            took.append(time.perf_counter() - began)
        answer({"took": took, "last": base64.b64encode(out.getvalue()).decode()})


def same_picture(*files: bytes) -> int:
    """The largest difference of any channel between two pictures, of 255."""
    both = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    return max(high for _, high in ImageChops.difference(*both).getextrema())


def report(measured: dict[int, Pairs], server: Server, hello: dict[str, Any], difference: int, load: float) -> str:
    """The section for the results file."""
    ran, rounds, one = server.ran, len(measured[1].http), measured[1]
    added = [
        1000 * (statistics.median(h.latencies) - statistics.median(r.latencies))
        for h, r in zip(one.http, one.raw, strict=True)
    ]
    lines = [
        SECTION,
        "",
        where("bench/overhead.py", load),
        "",
        f"{ran['model']} on {hello['device']}, {ran['dtype']}, {ran['size']}, {ran['steps']} steps, "
        f"guidance {ran['guidance-scale']}, {ran['scheduler']} (raw: {hello['scheduler']}), "
        f"{hello['threads']} torch threads, {rounds} rounds. Raw is the pipeline called with the prompt as a string, a CPU "
        "generator per picture and a PNG made by Pillow, one picture after another. Raw and HTTP draw in turns; each "
        "ratio is of two neighbouring blocks. Latency at several clients is mostly waiting in the queue.",
        "",
        "| clients | HTTP pictures/s | raw pictures/s | HTTP / raw, median (min to max) "
        "| HTTP p50 / p95, ms | raw p50 / p95, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(clients, pairs) for clients, pairs in measured.items()),
        "",
        f"- Added latency at 1 client, p50: {spread(added, 1)} ms.",
        f"- `bentoml serve` to /readyz 200: {server.start_s:.1f} s; "
        f"then to the first picture, with the model's loading: {server.first_s:.1f} s.",
        f"- Largest difference between the two's pictures of one seed: {difference} of 255 "
        "(large where the weights were rewritten between the two loads).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
