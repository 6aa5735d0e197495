"""Networks that enlarge pictures: from a .safetensors file to something that runners.residency keeps.

The starter's architecture is in runners.compact; spandrel knows about forty others (ESRGAN, Real-ESRGAN, SwinIR,
HAT, DAT, ...) by the names and shapes of their weights. Diffusion upscalers are loaded as other pipelines are.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

from core.families import Entry
from core.problems import Problem, unavailable
from runners import compact


class Network:
    """A network with what runners.residency needs of a pipeline, so that it is kept, measured and unloaded as one.

    Args:
        network: the module.
        scale: its factor.
        run: calls it, where it needs more than being called, on (1, 3, h, w) in 0..1 of its own precision, for (1, 3, scale * h, scale * w).
    """

    scheduler = None

    def __init__(self, network: nn.Module, scale: int, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.network, self.scale, self._run = network.eval().requires_grad_(False), scale, run or network
        self.components = {"network": network}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def to(self, where: torch.device | torch.dtype) -> Network:
        self.network.to(where)
        return self

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> Tensor:
        return self._run(picture.to(self.device, self.dtype)).float().clamp(0, 1)


def fetch(entry: Entry, token: str | None) -> Path:
    """The file of a hub repository that holds one network.

    Raises:
        Problem: 503 where it holds none, or several. What huggingface_hub raises, runners.loading explains.
    """
    source = entry.model.source or entry.id
    folder = Path(snapshot_download(source, revision=entry.model.revision, token=token or None, allow_patterns="*.safetensors"))
    return file_in(folder, entry)


def file_in(folder: Path, entry: Entry) -> Path:
    """The one .safetensors file in a folder.

    Raises:
        Problem: 503 where there is none, or several.
    """
    files = sorted(folder.glob("**/*.safetensors"))
    if len(files) != 1:
        found = ", ".join(f.name for f in files[:5]) or "no .safetensors file"
        raise unavailable(f"The upscaler {entry.id} must be one .safetensors file; there is {found}. Name the file as `source` in configuration.yaml.", slug="model-missing")
    return files[0]


def load(entry: Entry, file: Path, dtype: torch.dtype) -> Network:
    """The network of a file, in CPU memory; in float32 where it does not work in `dtype`.

    Raises:
        Problem: 503 for an architecture that is not known, one that is no upscaler of RGB pictures, or another
            factor than the catalogue says.
    """
    if file.suffix != ".safetensors":
        raise unavailable(f"{entry.id}: only .safetensors files are loaded, and {file.name} is none. Convert it first.", slug="model-broken")
    state = load_file(file)
    own = compact.from_state(state)
    made = Network(own, own.scale).to(dtype) if own is not None else _by_spandrel(entry, state, dtype)
    if made.scale != entry.scale:
        raise unavailable(f"{entry.id} makes pictures {made.scale} times as large, its entry in configuration.yaml says {entry.scale}: mend its `scale`.", slug="model-broken")
    return made


def _by_spandrel(entry: Entry, state: dict[str, Tensor], dtype: torch.dtype) -> Network:
    spandrel = _spandrel(entry)
    try:
        found = spandrel.ModelLoader().load_from_state_dict(state)
    except spandrel.UnsupportedModelError:
        raise _not_one(entry, "has an architecture that spandrel does not know") from None
    if not isinstance(found, spandrel.ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise _not_one(entry, f"is {found.architecture.name}, which does not make an RGB picture of one")
    able = {torch.float16: found.supports_half, torch.bfloat16: found.supports_bfloat16}.get(dtype, True)
    return Network(found.model, found.scale, found).to(dtype if able else torch.float32)


def _not_one(entry: Entry, why: str) -> Problem:
    return unavailable(f"{entry.id} {why}. Use another file, or take it out of configuration.yaml.", slug="model-broken")


def _spandrel(entry: Entry) -> Any:
    if not find_spec("spandrel"):
        raise unavailable(
            f"{entry.id} needs the package spandrel: pip install 'easel[upscale]', or without torchvision, pip install --no-deps spandrel einops.",
            slug="package-missing",
        )
    with _with_or_without_torchvision():
        import spandrel
    return spandrel


@contextlib.contextmanager
def _with_or_without_torchvision() -> Iterator[None]:
    """spandrel imports every architecture it knows, and two of them, for filling holes and for faces, import
    functions of torchvision, which has no build for every torch. Neither enlarges pictures, so where
    torchvision is not there, something empty stands in its place during the import."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    if "spandrel" in sys.modules or find_spec("torchvision"):
        yield
        return
    modules = {name: ModuleType(name) for name in names}
    for missing in ("InterpolationMode", "rotate", "normalize"):
        setattr(modules[names[-1]], missing, None)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
