"""What full-size models cost on this machine's device: `.venv/bin/python bench/full_size.py` writes its section of bench/results.md.

SD 1.5, SDXL 1.0 and Flux.1-dev by their public configurations, with random weights, which cost what trained ones cost. diffusers' pipeline and Easel's
device draw in turns with the same modules in one process, as they come and with `optimise: {compile: true, channels_last: true}`; each ratio is
of two neighbours. The floor is the operations of a picture, counted by torch's FlopCounterMode, over the rate of a large matrix product
measured here in the same precision. A model at a time is written to a temporary folder and loaded from there: Flux needs 34 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import turns
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from turns import ROOT, spread

sys.path.insert(0, str(ROOT))
from bench import memory
from core.catalogue import Catalogue
from core.families import FAMILIES
from core.model_settings import Family, Model, Models
from core.optimising import Optimise
from core.plans import Inputs
from core.requests import GenerationRequest
from core.settings import Settings
from runners import attention, loading, optimising
from runners.device import Device
from runners.work import Job
from tests import miniatures

SECTION = "## Full-size models"
T = TypeVar("T")
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu", "vocab_size": 32128}
MODES = {"as it comes": Optimise(), "compiled": Optimise(compile=True, channels_last=True)}


@dataclass(frozen=True)
class Size:
    """What is drawn, and the modules that take the place of the miniature's."""

    side: int
    steps: int
    modules: dict[str, Callable[[], nn.Module]]


SIZES: dict[Family, Size] = {
    "sd15": Size(512, 30, {
        "unet": lambda: UNet2DConditionModel(sample_size=64, **memory.SD15), "vae": lambda: AutoencoderKL(latent_channels=4, **memory.VAE), "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    }),
    "sdxl": Size(1024, 30, {
        "unet": lambda: UNet2DConditionModel(sample_size=128, **memory.SDXL), "vae": lambda: AutoencoderKL(latent_channels=4, scaling_factor=0.13025, **memory.VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
    }),
    "flux": Size(1024, 28, {
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
        "vae": lambda: AutoencoderKL(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, **{**memory.VAE, "latent_channels": 16}),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), "text_encoder_2": lambda: T5EncoderModel(T5Config(**T5_XXL)),
    }),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures at once")
    parser.add_argument("--side", type=int, help="pixels, in place of the model's own; to see that it runs")
    parser.add_argument("--steps", type=int, help="in place of the model's own; to see that it runs")
    parser.add_argument("--folder", type=Path, help="where there is room for a model")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args()
    device = loading.device_for(None)
    torch.set_num_threads(1)  # of this thread
    lines = [
        SECTION, "", turns.where("bench/full_size.py", os.getloadavg()[0]), "", f"On {named(device)}. Seconds a picture: median (least to greatest).", "",
        "| model | mode | at once | diffusers, s | Easel, s | diffusers / Easel | Easel / floor | peak MiB: diffusers, Easel |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for family in options.models:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(family, Path(folder), device)
            lines += measured(family, Path(folder), device, options)
        turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    print("\n".join(lines))


def named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else turns.processor()


def precision(family: Family, device: torch.device) -> torch.dtype:
    """Easel's own choice there."""
    return torch.float32 if device.type == "cpu" else getattr(torch, FAMILIES[family].gpu_dtype)


def write(family: Family, folder: Path, device: torch.device) -> None:
    """The model's files: the miniature's tokenizers and scheduler, with modules of full size."""
    torch.manual_seed(0)
    small = getattr(miniatures, family)()
    torch.set_default_dtype(precision(family, device))
    try:
        with torch.device(device):
            modules = {name: make() for name, make in SIZES[family].modules.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    flags = {"requires_safety_checker": False} if family == "sd15" else {}
    type(small)(**{**small.components, **modules}, **flags).save_pretrained(folder)


def measured(family: Family, folder: Path, device: torch.device, options: argparse.Namespace) -> list[str]:
    """A model's rows of the table."""
    size = SIZES[family]
    side, steps = options.side or size.side, options.steps or size.steps
    entries = [Model(id=mode, family=family, source=str(folder), size=size.side, optimise=optimise) for mode, optimise in MODES.items()]
    settings = Settings(models=Models(default=entries[0].id, catalogue=entries, max_batch=max(options.batches), idle_timeout_s=1e6, cpu_threads=os.cpu_count()))
    easel, rows, floor = Device(settings, Catalogue(settings)), [], 0.0

    def in_its_thread(work: Callable[[], T]) -> T:
        """The device's; on a CPU, another that computes would have a team of OpenMP threads too."""
        return easel.queue.submit(Job("diffusers", "bench", lambda _: work(), turns.REPLY_S)).result(turns.REPLY_S)

    for entry in entries:
        guidance = easel.catalogue.plan(GenerationRequest(prompt="red apple", model_id=entry.id), Inputs(), "bench").guidance_scale
        asked = {"prompt": "red apple", "model_id": entry.id, "width": side, "height": side, "num_inference_steps": steps, "guidance_scale": guidance}
        seeds = itertools.count()

        def by_easel(batch: int, asked: dict[str, Any] = asked, seeds: Iterator[int] = seeds) -> None:
            plan = easel.catalogue.plan(GenerationRequest(**asked, count_returned=batch, seed=next(seeds)), Inputs(), "bench")
            outcome = easel.submit(plan, folder).result(turns.REPLY_S)
            if outcome.problem:
                raise RuntimeError(outcome.problem.detail)

        by_easel(1)
        resident = easel.residency.acquire(easel.catalogue.find(entry.id), folder, precision(family, device))

        def pipeline(batch: int, steps: int = steps, pipe: DiffusionPipeline = resident.base, guidance: float = guidance) -> None:
            generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
            with attention.plain(optimising.denoiser_of(pipe)):
                pipe(["red apple"] * batch, width=side, height=side, num_inference_steps=steps, guidance_scale=guidance, generator=generators)

        def by_diffusers(batch: int, pipeline: Callable[[int], None] = pipeline) -> None:
            in_its_thread(lambda: pipeline(batch))

        if not floor:
            floor = in_its_thread(lambda pipeline=pipeline: operations(pipeline, steps) / rate(device, precision(family, device)))
        for batch in options.batches:
            took: dict[Callable[[int], None], list[float]] = {by_diffusers: [], by_easel: []}
            peaks = {by_diffusers: 0, by_easel: 0}
            for number in range(options.rounds + 1):
                for draw in (by_easel, by_diffusers) if number % 2 else (by_diffusers, by_easel):
                    seconds, peak = once(draw, batch, device)
                    took[draw].append(seconds / batch)
                    peaks[draw] = max(peaks[draw], peak)
            raw, own = took[by_diffusers][1:], took[by_easel][1:]  # the first ones compile
            ratios = [a / b for a, b in zip(raw, own, strict=True)]
            told = f"{peaks[by_diffusers] >> 20}, {peaks[by_easel] >> 20}" if device.type == "cuda" else "-"
            rows.append(f"| {family}, {side}x{side}, {steps} steps | {entry.id} | {batch} | {spread(raw, 2)} | {spread(own, 2)} | {spread(ratios, 2)} | {statistics.median(own) / floor:.1f} | {told} |")
            print(rows[-1], file=sys.stderr, flush=True)
        del resident, pipeline, by_diffusers
        easel.unload(entry.id).result(turns.REPLY_S)
        gc.collect()
    easel.queue.close()
    return rows


def once(draw: Callable[[int], None], batch: int, device: torch.device) -> tuple[float, int]:
    """Seconds, and the most bytes on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    draw(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def operations(draw: Callable[..., None], steps: int) -> float:
    """Floating-point operations of a picture: what a step more costs, so many times, and the rest once."""
    counted = []
    for few in (1, 2):
        with FlopCounterMode(display=False) as counter:
            draw(1, few)
        counted.append(counter.get_total_flops())
    return counted[0] + (steps - 1) * (counted[1] - counted[0])


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product; the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(once(lambda _: torch.mm(a, b), 1, device)[0] for _ in range(10))
    return float(2 * n**3 / best)


if __name__ == "__main__":
    main()
