"""What a request needs in memory, estimated before it is queued, and in which way of running it would fit.

The estimate is the weights on the device while they are used, by the files' headers, those of what a request
puts beside its model too, plus the largest sum of tensors in one forward pass, by coefficients that bench/memory.py counts on the real
architectures. Kernels' workspace and fragmentation come on top, so it is a lower bound: what it
refuses cannot fit, and what it admits may still meet an out-of-memory error, which runners.device handles.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from core import problems
from core.families import Entry
from core.model_settings import Family
from core.plans import Plan
from core.problems import Problem
from runners import weights
from runners.optimising import QUANTISED, TILE

TOKENS = 77  # of a prompt, at the least


@dataclass(frozen=True)
class Activations:
    """Numbers alive at once for each row and pixel, in a step of the denoiser and in the VAE's two directions; and for each
    row and token of text, what is kept of it from step to step (runners.attention)."""

    denoise: float
    decode: float = 768
    encode: float = 643
    texts: int = 0


ACTIVATIONS: dict[Family, Activations] = {
    "starter": Activations(19, 193, 131, texts=1792),
    "sd15": Activations(130, texts=24960),
    "sd2": Activations(130, texts=24960),
    "sdxl": Activations(79, texts=166400),
    "flux": Activations(205),
    "unidiffuser": Activations(181),
    # Of an upscaler's tile, enlarged. Networks differ widely: the starter's, among the smallest, has 15. The
    # diffusion ones: as SD's UNet, by their channels and factors, not counted.
    "upscaler": Activations(15, 0, 0),
    "sd_x4_upscaler": Activations(416, encode=0),
    "latent_upscaler": Activations(156),
}


@dataclass(frozen=True)
class Way:
    """A way to run: how many pictures at once, with attention and VAE in slices and tiles (`thrifty`), and
    with the components on the device one at a time (`offload`)."""

    rows: int
    thrifty: bool = False
    offload: bool = False

    def told(self, asked: int) -> str | None:
        """How it differs from the usual way of running `asked` rows; None where it does not."""
        parts = [f"{self.rows} at a time instead of {asked}"] if self.rows < asked else []
        parts += ["attention sliced, VAE sliced and tiled"] if self.thrifty else []
        parts += ["components offloaded in turn"] if self.offload else []
        return ", ".join(parts) or None


@dataclass(frozen=True)
class Request:
    """What an estimate depends on."""

    entry: Entry
    path: Path
    dtype: torch.dtype
    width: int
    height: int
    rows: int
    guided: bool
    has_image: bool
    frames: int = 1  # drawn together, however few are decoded at once
    beside: int = 0  # bytes of what the request puts beside the model: LoRAs, ControlNets, adapters, an upscaler

    @classmethod
    def of(cls, plan: Plan, entry: Entry, path: Path, dtype: torch.dtype, rows: int, beside: int = 0) -> Request:
        guided = plan.guidance_scale > 1 and entry.model.family != "flux"  # Flux is told its guidance, and runs once
        width, height = plan.width, plan.height
        if plan.hires:
            width, height = plan.hires.width, plan.hires.height
        if plan.upscale:
            width, height = (min(side, plan.upscale.tile) * plan.upscale.scale for side in plan.upscale.first)
        return cls(entry, path, dtype, width, height, rows, guided, bool(plan.image or plan.images or plan.hires), plan.animation.num_frames if plan.animation else 1, beside)


def ways(request: Request, may_offload: bool) -> list[Way]:
    """From the usual way to the most frugal."""
    rows = [request.rows // 2**i for i in range(request.rows.bit_length())]
    frugal = [Way(1, thrifty=True)]
    optimise = request.entry.model.optimise
    if may_offload and request.frames == 1 and optimise.offload == "none" and not (optimise.device_map or optimise.compile):
        frugal.append(Way(1, thrifty=True, offload=True))
    return [*(Way(n) for n in rows), *frugal]


def activations(request: Request, way: Way) -> int:
    """Bytes for the tensors of a forward pass."""
    numbers, optimise = ACTIVATIONS[request.entry.model.family], request.entry.model.optimise
    pixels = request.width * request.height
    if way.thrifty and request.entry.model.family == "upscaler":
        pixels //= 4  # tiles of half the side
    texts = 0 if optimise.compile else numbers.texts * TOKENS * way.rows
    denoise = (numbers.denoise * max(way.rows, request.frames) * pixels + texts) * (2 if request.guided else 1) * request.dtype.itemsize
    vae_rows = 1 if way.thrifty or optimise.vae_slicing else way.rows
    tile = TILE if way.thrifty else request.entry.traits.size if optimise.vae_tiling else math.inf
    vae_pixels = min(pixels, tile**2)
    # SDXL's VAE overflows in float16, so that diffusers runs it in float32.
    itemsize = 4 if request.entry.model.family == "sdxl" and request.dtype == torch.float16 else request.dtype.itemsize
    coding = max(numbers.decode, numbers.encode if request.has_image else 0) * vae_rows * vae_pixels * itemsize
    whole = 3 * way.rows * pixels * itemsize  # the pictures themselves, which tiles are put together to
    return int(max(denoise, coding + whole))


def weights_in_use(request: Request, way: Way) -> int:
    """Bytes of weights on the device at once while the model runs, with what is beside it."""
    optimise = request.entry.model.optimise
    sizes = _component_bytes(request.entry, request.path, request.dtype)
    if optimise.by_layer:  # the one in use and the one on its way
        return request.beside + max((min(2 * largest, total) for total, largest in sizes), default=0)
    each = [total for total, _ in sizes]
    return request.beside + (max(each, default=0) if way.offload or optimise.offload == "model" else sum(each))


def weights_at_rest(entry: Entry, path: Path, dtype: torch.dtype) -> int:
    """Bytes of weights on the device while the model waits."""
    return 0 if entry.model.optimise.offload != "none" else sum(total for total, _ in _component_bytes(entry, path, dtype))


def _component_bytes(entry: Entry, path: Path, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Of each component: all its weights, and the largest tensor."""
    quantised = QUANTISED if entry.model.optimise.quantisation else ()
    found = []
    for name, tensors in weights.numbers(path, entry.model.variant).items():
        itemsize = 1 if name in quantised else dtype.itemsize
        found.append((sum(tensors) * itemsize, max(tensors, default=0) * itemsize))
    return found


def needed(request: Request, way: Way) -> int:
    return weights_in_use(request, way) + activations(request, way)


def choose(request: Request, budget: int, may_offload: bool) -> Way:
    """The first way that fits the budget.

    Raises:
        Problem: 503 where not even the weights fit; else 507 that says what would.
    """
    all_ways = ways(request, may_offload)
    for way in all_ways:
        if needed(request, way) <= budget:
            return way
    last = all_ways[-1]
    if weights_in_use(request, last) > budget:
        raise model_too_large(request.entry, weights_in_use(request, last), budget, request.beside)
    detail = f"{request.width}x{request.height} with {request.entry.id} needs about {_mib(needed(request, last))}, one at a time and in tiles; {_mib(budget)} are allowed."
    raise _refusal(f"{detail} {_advice(request, last, budget)}")


def exhausted(request: Request, device: torch.device, budget: int, may_offload: bool) -> Problem:
    """507 for a request that ran out of memory in its most frugal way, whatever the estimate said."""
    last = ways(request, may_offload)[-1]
    said = f"{request.width}x{request.height} with {request.entry.id} needs more memory than {device} has free, one at a time and in tiles too."
    # The estimate was too low, so that what it says of half the pixels is the most to promise.
    half = replace(request, **dict(zip(("width", "height"), _scaled(request, math.sqrt(0.5)), strict=True)))
    return _refusal(f"{said} {_advice(half, last, budget)}")


def most(request: Request, way: Way, budget: int, ceiling: int) -> int:
    """How many pictures like the request's, guided and with a picture to start from, fit beside each other, up to `ceiling`;
    those of the chosen `way` do."""
    if way.thrifty:
        return way.rows
    any_like_it = replace(request, guided=request.entry.model.family != "flux", has_image=True)
    return next((n for n in range(ceiling, way.rows, -1) if needed(any_like_it, Way(n)) <= budget), way.rows)


def out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; a CPU and Apple's GPUs say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "MPS backend out of memory" in str(error))
    )


def release_memory(device: torch.device) -> None:
    """Give freed memory back: Python's cycles, CUDA's cache, and the C allocator's pages."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def model_too_large(entry: Entry, needs: int, budget: int, beside: int = 0) -> Problem:
    """503 for weights that do not fit; `beside` are those among them that the request puts beside the model."""
    told = f", {_mib(beside)} of it for the LoRAs, ControlNets, adapters or upscaler that the request names" if beside else ""
    return problems.unavailable(f"{entry.id} needs about {_mib(needs)}{told}; memory_budget_bytes allows {_mib(budget)}.", slug="model-memory")


def _advice(request: Request, way: Way, budget: int) -> str:
    """What would fit: the largest picture of the same shape, up to the size of `request`."""
    if request.entry.traits.multimodal:
        return "Ask for fewer results or pictures at once."
    if request.entry.traits.upscaler:
        return "Give it smaller tiles: a smaller size of its entry in configuration.yaml."
    for percent in range(100, 0, -5):
        width, height = _scaled(request, percent / 100)
        if min(width, height) < request.entry.min_size:
            break
        if needed(replace(request, width=width, height=height), way) <= budget:
            return f"What would fit by estimate: {width}x{height}, count_returned 1."
    return "No size of this model fits; use a smaller model, or a torch_dtype of half the bytes."


def _scaled(request: Request, factor: float) -> tuple[int, int]:
    step = request.entry.traits.multiple
    return tuple(max(step, int(side * factor) // step * step) for side in (request.width, request.height))  # type: ignore[return-value]


def _refusal(detail: str) -> Problem:
    return problems.problem(507, "out-of-memory", "Out of memory", detail)


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20)} MiB"
