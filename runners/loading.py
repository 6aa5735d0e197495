"""From a catalogue entry to a pipeline in memory: fetch the weights, then load them.

Fetching (hub to disk) may take long and needs no device, so it runs beside the queue; loading
happens in the device's thread. Weights are safetensors only. Every failure is a 503 Problem that
names the model and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from core.families import Entry
from core.model_settings import Family
from core.problems import Problem, unavailable
from core.settings import ROOT
from runners import hub, optimising, upscalers
from runners.unidiffuser import Pipeline

Kind = Literal["txt2img", "img2img", "inpaint", "upscale"]
# A family's pipelines by what they do; UniDiffuser has one for everything. The first is the one that is loaded.
_SD: dict[Kind, type[DiffusionPipeline]] = {
    "txt2img": StableDiffusionPipeline,
    "img2img": StableDiffusionImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
}
CLASSES: dict[Family, dict[Kind, type[DiffusionPipeline]]] = {  # networks (runners.upscalers) are no pipelines
    "starter": _SD,
    "sd15": _SD,
    "sd2": _SD,
    "sdxl": {"txt2img": StableDiffusionXLPipeline, "img2img": StableDiffusionXLImg2ImgPipeline, "inpaint": StableDiffusionXLInpaintPipeline},
    "flux": {"txt2img": FluxPipeline, "img2img": FluxImg2ImgPipeline, "inpaint": FluxInpaintPipeline},
    "unidiffuser": {"txt2img": Pipeline},
    "sd_x4_upscaler": {"upscale": StableDiffusionUpscalePipeline},
    "latent_upscaler": {"upscale": StableDiffusionLatentUpscalePipeline},
}
# A server's log is no terminal: no progress bars, and errors alone from the libraries.
logging.set_verbosity_error()
logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# The image checker of SD 1.x is not part of making a picture; runners.safety has it for every family.
_WITHOUT_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def device_for(setting: str | None) -> torch.device:
    """The configured device, or the best there is."""
    if setting:
        return torch.device(setting)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fetch(entry: Entry, token: str | None, component: bool = False, downloading: Callable[[], object] = lambda: None) -> Path:
    """Make the model's files local; return the folder, or the single file.

    Args:
        component: it is no pipeline, but a part that is put beside one.
        downloading: is called before the hub is asked.

    Raises:
        Problem: 503 that says what stands in the way: no such repository, gated, no network, disk full.
    """
    source = entry.model.source or entry.id
    if entry.listed:
        for path in (Path(source).expanduser(), ROOT / source):
            if path.exists():
                return upscalers.file_in(path, entry) if entry.model.family == "upscaler" and path.is_dir() else path
    if entry.model.source and (source.startswith((".", "/", "~")) or source.endswith(".safetensors")):
        raise unavailable(f"The weights of {entry.id} are not at {source}. Put them there, or mend `source` in configuration.yaml.", slug="model-missing")

    def download() -> Path:
        downloading()
        named: dict[str, Any] = {"revision": entry.model.revision, "token": token or None}
        if entry.model.family == "upscaler":
            return upscalers.fetch(entry, token)
        if component:
            return Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors"], **named))
        return Path(_base(entry).download(source, variant=entry.model.variant, use_safetensors=True, **named))

    try:
        return hub.once((source, entry.model.family, entry.model.revision, entry.model.variant, component), download)
    except Exception as error:
        raise explain(entry, error) from error


def _base(entry: Entry) -> type[DiffusionPipeline]:
    """The pipeline of a model that is loaded; the others are made of its components."""
    kinds = CLASSES[entry.model.family]
    return kinds["inpaint"] if entry.model.inpainting else next(iter(kinds.values()))


def load(entry: Entry, path: Path, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline | upscalers.Network:
    """Load a model's first pipeline from local files onto the device, optimised as its entry says.

    Raises:
        Problem: 503 where files are missing or broken, or memory does not suffice.
    """
    optimise = entry.model.optimise
    extra = {} if entry.model.family in ("sdxl", "flux", "unidiffuser", "latent_upscaler") else _WITHOUT_CHECKER
    if entry.model.family == "sd_x4_upscaler":
        extra = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    try:
        if entry.model.family == "upscaler":
            return upscalers.load(entry, path, dtype).to(device)
        cls = _base(entry)
        if path.is_file():
            if path.suffix != ".safetensors":  # diffusers would unpickle it
                raise ValueError(f"only .safetensors files are loaded, and {path.name} is none; convert it first")
            config = entry.model.config and str(ROOT / entry.model.config)
            pipeline = cls.from_single_file(str(path), dtype=dtype, config=config, local_files_only=bool(config), **extra)
        else:
            pipeline = cls.from_pretrained(
                path, dtype=dtype, use_safetensors=True, variant=entry.model.variant, local_files_only=True, **extra, **optimising.loading_options(optimise)
            )
        _check_channels(entry, pipeline)
        optimising.apply(pipeline, optimise, device)
    except Exception as error:
        raise explain(entry, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_channels(entry: Entry, pipeline: DiffusionPipeline) -> None:
    """Inpainting models look at the mask too: in five channels more, or (Flux Fill) in many."""
    if entry.traits.multimodal or entry.traits.upscaler:
        return
    latent = pipeline.vae.config.latent_channels
    flow = entry.traits.flow
    channels = (pipeline.transformer if flow else pipeline.unet).config.in_channels
    plain = 4 * latent if flow else latent
    if channels == plain or (entry.model.inpainting and not flow and channels == 2 * latent + 1):
        return
    wanted = "set `inpainting: true` in its entry" if channels == 2 * latent + 1 and not flow else "it is of a kind that Easel does not know"
    raise unavailable(f"{entry.id} takes {channels} channels where its family has {plain}: {wanted}.", slug="model-broken")


def explain(entry: Entry, error: BaseException) -> Problem:
    """What kept `entry` from being had, and what the person who runs the service can do."""
    source = entry.model.source or entry.id
    # diffusers answers every refusal with "not cached locally"; what the hub really said stands behind it.
    error = next((e for e in _chain(error) if isinstance(e, (HfHubHTTPError, Problem)) or getattr(e, "errno", None) == errno.ENOSPC), error)
    if isinstance(error, Problem):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return unavailable(f"{entry.id} does not fit the memory that is free.", retry_after=60, slug="model-memory")
    if isinstance(error, GatedRepoError):
        return unavailable(f"{source} is gated: accept its licence on its hub page and set HF_TOKEN to a token of that account.", slug="model-gated")
    if isinstance(error, RepositoryNotFoundError):
        return unavailable(f"The hub has no {source}, or HF_TOKEN may not read it.", slug="model-missing")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return unavailable(f"The disk is full; {source} cannot be stored. Free some space in {cache_folder()}.", slug="disk-full")
    if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403):
        return unavailable(f"The hub refuses {source}: HF_TOKEN is missing, wrong or without rights.", slug="model-gated")
    if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)) or _is_network(error):
        return unavailable(
            f"The hub cannot be reached for {source}, and it is not on this machine. Check the network, "
            "or give a local folder as `source` in configuration.yaml.",
            retry_after=60,
            slug="model-unreachable",
        )
    first_line = str(error).strip().split("\n")[0][:200]
    return unavailable(f"{entry.id} cannot be loaded from {source}: {first_line}", slug="model-broken")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network(error: BaseException) -> bool:
    names = {cls.__name__ for e in _chain(error) for cls in type(e).__mro__}
    return bool(names & {"ConnectError", "ConnectTimeout", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"})


def cache_folder() -> str:
    return os.environ.get("HF_HOME", "~/.cache/huggingface")
