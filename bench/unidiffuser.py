"""Captions and embeddings through HTTP against a plain loop over the pipeline, and captions while pictures are made.

`.venv/bin/python bench/unidiffuser.py` has two take turns: the service (the entry with
both runners) and a process with diffusers alone. The raw loop does the same useful work,
one picture after another: open a JPEG, crop it to the model's size, call UniDiffuserPipeline for a
caption, or its CLIP and VAE encoders for embeddings, and write JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import turns
from PIL import Image, ImageDraw
from scenarios import STARTER
from turns import REPLY_S, ROOT, Block, Pairs, RawLoop, Server, percentiles, row, spread, where

SECTION = "## UniDiffuser: captions and embeddings"
CLIENTS = (1, 8)
PICTURE = {"prompt": "red apple on a table", "model_id": STARTER, "num_inference_steps": 25, "guidance_scale": 5.0}  # what is drawn meanwhile
STEPS, GUIDANCE = 20, 8.0
TASKS = {"caption": "/img2prompt", "embed": "/img2embed"}


def main() -> None:
    options = turns.options(__doc__ or "", rounds=3, count=16, unit="calls", quick=(1, 4))
    if options.raw:
        raw_loop(options.raw)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end too
    load = os.getloadavg()[0]
    with Server() as server:
        server.start_with(TASKS["caption"], asked("caption", 0)["params"], files=asked("caption", 0)["files"])
        with contextlib.closing(RawLoop(__file__, server.ran)) as raw:
            same = raw.ask("caption 1")["last"] == server.first.decode()
            count = max(2, options.count)
            cases = {
                (task, clients): (partial(over_http, server, task, clients, options.count), partial(raw.block, f"{task} {count}", count))
                for task in TASKS for clients in CLIENTS
            }  # fmt: skip
            measured = turns.in_turns(options.rounds, options.limit_s, cases)
            hello = raw.hello
        quiet, busy, pictures = beside_pictures(server, options.count)
        section = report(measured, server, hello, same, load, quiet, busy, pictures)
    turns.write(options.results, SECTION, section)
    print(section)


@lru_cache(maxsize=256)
def photograph(number: int) -> bytes:
    """A JPEG of 256x256: shapes in colours, by number."""
    draw, chosen = random.Random(number), Image.new("RGB", (256, 256), "white")
    for _ in range(6):
        box = sorted(draw.sample(range(256), 2)) + sorted(draw.sample(range(256), 2))
        ImageDraw.Draw(chosen).ellipse((box[0], box[2], box[1], box[3]), fill=tuple(draw.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    chosen.save(out, "JPEG", quality=90)
    return out.getvalue()


def asked(task: str, number: int) -> dict[str, Any]:
    """The arguments of call `number`, for requests."""
    params = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": number} if task == "caption" else {}
    return {"params": params, "files": {"image": ("photo.jpg", photograph(number), "image/jpeg")}}


def over_http(server: Server, task: str, clients: int, calls: int) -> Block:
    for number in range(max(2 * clients, calls + clients)):
        photograph(number)  # so that making it is not among the time of a call
    return server.load(clients, calls, TASKS[task], lambda number: asked(task, number))


def beside_pictures(server: Server, calls: int) -> tuple[Block, Block, float]:
    """Captions of one client alone, and while another has pictures drawn without a pause; pictures a second meanwhile."""
    over_http(server, "caption", 1, 2)
    quiet = over_http(server, "caption", 1, max(8, calls))
    stop = threading.Event()
    drawn: list[int] = []  # the answers' statuses

    def draw() -> None:
        with server.session() as session:
            while not stop.is_set():
                answer = session.post(server.url + "/post_config", params={**PICTURE, "seed": len(drawn)}, timeout=REPLY_S)
                drawn.append(answer.status_code)

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        try:
            while not drawn and not drawing.done():  # the picture model is loaded for the first
                time.sleep(0.05)
            before, began = len(drawn), time.perf_counter()
            busy = over_http(server, "caption", 1, max(8, calls))
            rate = (len(drawn) - before) / (time.perf_counter() - began)
        finally:
            stop.set()
        drawing.result()
    if set(drawn) != {200}:
        raise RuntimeError(f"pictures failed: {sorted(set(drawn))}")
    return quiet, busy, rate


def raw_loop(ran: dict[str, Any]) -> None:
    """The other end of `RawLoop`: reads a task and a count, answers in lines of JSON, ends when its input does."""
    pipe_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    sys.path.insert(0, str(ROOT))
    import torch
    from diffusers import UniDiffuserPipeline
    from PIL import ImageOps

    from core import settings
    from core.catalogue import Catalogue
    from runners import loading

    configured = settings.load()
    if threads := configured.unidiffuser.cpu_threads:  # the runner does the same
        torch.set_num_threads(threads)
    entry = Catalogue(configured, configured.unidiffuser).find(ran["model"])
    pipe = UniDiffuserPipeline.from_pretrained(loading.fetch(entry, None), dtype=getattr(torch, ran["dtype"])).to(ran["device"])
    pipe.set_progress_bar_config(disable=True)
    side = int(ran["size"].split("x")[0])

    def caption(image: Image.Image, number: int) -> str:
        pipe.set_image_to_text_mode()
        said = pipe(image=image, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator("cpu").manual_seed(number)).text[0]
        return " ".join(said.split())

    @torch.no_grad()
    def embed(image: Image.Image, number: int) -> str:
        inputs = pipe.clip_image_processor(image, return_tensors="pt").to(device=pipe.device, dtype=pipe.image_encoder.dtype)
        clip = pipe.image_encoder(**inputs).image_embeds[0]
        pixels = pipe.image_processor.preprocess(image).to(pipe.device, pipe.vae.dtype)
        vae = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
        return json.dumps({"CLIP_embeddings": clip.tolist(), "vae_emb": vae.ravel().tolist()})

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=pipe_out, flush=True)

    answer({"threads": torch.get_num_threads(), "scheduler": type(pipe.scheduler).__name__})
    for line in sys.stdin:
        task, count = line.split()
        photographs = [photograph(number) for number in range(int(count))]
        took, last = [], ""
        for number, data in enumerate(photographs):
            began = time.perf_counter()
            image = ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            last = {"caption": caption, "embed": embed}[task](image, number)
            took.append(time.perf_counter() - began)
        answer({"took": took, "last": last})


def report(measured: dict[tuple[str, int], Pairs], server: Server, hello: dict[str, Any], same: bool, load: float, quiet: Block, busy: Block, pictures: float) -> str:
    """The section for the results file."""
    ran, rounds = server.ran, len(measured["caption", 1].http)
    slower = statistics.median(busy.latencies) / statistics.median(quiet.latencies)
    lines = [
        SECTION,
        "",
        where("bench/unidiffuser.py", load),
        "",
        f"{ran['model']} on {ran['device']}, {ran['dtype']}, {ran['size']}; captions with {ran['steps']} steps, guidance {ran['guidance-scale']}, "
        f"{ran['scheduler']} (raw: {hello['scheduler']}), {hello['threads']} torch threads, {rounds} rounds. Raw is one picture after another with "
        "UniDiffuserPipeline. Raw and HTTP work in turns; each ratio is of two neighbouring blocks.",
        "",
        "| task, clients | HTTP calls/s | raw calls/s | HTTP / raw, median (min to max) | HTTP p50 / p95, ms | raw p50 / p95, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(f"{task}, {clients}", pairs) for (task, clients), pairs in measured.items()),
        "",
        f"- Captions of one client, p50 / p95: {percentiles(quiet.latencies)} ms alone, {percentiles(busy.latencies)} ms while the Stable Diffusion runner "
        f"made {pictures:.2f} pictures/s ({spread([slower], 2).split(' ')[0]} times as long; both runners share the processor's cores here).",
        f"- The first caption through HTTP {'equals' if same else 'differs from'} that of the raw pipeline with the same seed.",
        f"- `bentoml serve` to /readyz 200: {server.start_s:.1f} s; then to the first caption, with the model's loading: {server.first_s:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
