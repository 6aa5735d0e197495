"""Where a runner's workers run: their service names, their devices, and the GPUs that BentoML gives them.

service.py makes one BentoML service of each, and not one service with several workers: those would
share a socket, and nobody could choose which of them gets a request.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from core.model_settings import Models, Workers
from core.settings import Settings

_SEEN = "_EASEL_GPUS"
MAX_WORKERS = 64


@dataclass(frozen=True)
class Place:
    """A worker's place. `device` as in settings (None: the best that the process sees); `gpu`, how many
    GPUs, or what share of one, BentoML sets aside for it; `url`, where it
    is served already."""

    name: str
    device: str | None
    gpu: float
    url: str | None = None


def gpus_seen(there: int, environment: MutableMapping[str, str]) -> tuple[int, bool]:
    """How many of the machine's GPUs this service may use, and whether BentoML deals them out: not
    where the environment does. The answer is left in the environment for the workers' processes, whose
    own CUDA_VISIBLE_DEVICES is what BentoML has dealt them."""
    if _SEEN not in environment:
        chosen = environment.get("CUDA_VISIBLE_DEVICES")
        count = there if chosen is None else len([c for c in chosen.split(",") if c.strip() not in ("", "-1")])
        dealt = chosen is None and "BENTOML_DISABLE_GPU_ALLOCATION" not in environment
        environment[_SEEN] = f"{count} {int(dealt)}"
    count_text, dealt_text = environment[_SEEN].split()
    return int(count_text), dealt_text == "1"


def share(setting: float | None, workers: int, gpus: int) -> float:
    """GPUs for each of all runners' workers: as configured; else one, or a part where there are fewer GPUs."""
    if setting is not None:
        return setting
    return 1 / math.ceil(workers / gpus) if gpus else 0


def places(name: str, workers: Workers, models: Models, gpu: float, gpus: int, dealt: bool) -> list[Place]:
    """A place for each worker; the first has the runner's name, the others a number behind it.

    Args:
        gpu: for each worker.
        gpus, dealt: as `gpus_seen` tells.

    Raises:
        ValueError: where two workers would be on one GPU, or an optimisation needs what its worker does not have.
    """
    if isinstance(workers, list):
        if models.device:
            raise ValueError(f"{name}: give its devices in workers or in device ({models.device}), not in both")
        if shared := {d for d in workers if d != "cpu" and workers.count(d) > 1}:
            raise ValueError(f"{name}: {', '.join(sorted(shared))} stands more than once in workers; a GPU has one worker")
        found = [Place(_numbered(name, i), device, 0) for i, device in enumerate(workers)]
    elif models.device or not gpus:
        if workers > 1 and models.device not in (None, "cpu"):
            raise ValueError(f"{name}: {workers} workers cannot all be on {models.device}; list their devices in workers")
        found = [Place(_numbered(name, i), models.device, gpu if workers == 1 else 0) for i in range(workers)]
    else:
        if workers > 1 and workers * max(gpu, 1 if not dealt else 0) > gpus:
            raise ValueError(f"{name}: {workers} workers with {gpu:g} GPUs each do not fit the {gpus} here")
        found = [Place(_numbered(name, i), None if dealt or workers == 1 else f"cuda:{i}", gpu) for i in range(workers)]
    for place in found:
        on_gpu = place.device.startswith("cuda") if place.device else bool(gpus and place.gpu)
        if missing := models.needs(max(1, int(place.gpu)) if on_gpu else 0):
            raise ValueError(f"{place.name} cannot have its models optimised so. {'. '.join(missing)}")
    return found


def elsewhere(name: str, urls: Sequence[str]) -> list[Place]:
    """A place for each worker that is served at an address of its own."""
    return [Place(_numbered(name, i), None, 0, url) for i, url in enumerate(urls)]


def addresses(settings: Settings) -> dict[str, str]:
    """The addresses of the workers that are served elsewhere, by name."""
    runners = {"StableDiffusion": settings.stable_diffusion.urls, "UniDiffuser": settings.unidiffuser.urls}
    return {place.name: place.url for name, urls in runners.items() for place in elsewhere(name, urls) if place.url}


def runner_of(worker: str) -> str:
    """The runner that a worker belongs to."""
    return worker.rstrip("0123456789")


def _numbered(name: str, index: int) -> str:
    return f"{name}{index + 1}" if index else name
