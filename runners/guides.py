"""The ControlNets and IP-Adapters in memory beside one model, and those that guide a batch.

As LoRAs, they belong to the model that they are beside: they count as its bytes and go with it, and on their own
when they have been idle or others need the room. Only the device's thread changes anything here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from core.families import FAMILIES, Entry
from core.guides import Control, ImagePrompt, parts
from core.images import to_pil
from core.model_settings import ControlNet, IpAdapter, Model
from core.plans import Plan
from core.problems import Problem, unavailable
from core.settings import ROOT
from core.status import ResidentGuide
from runners import control, hub, ip_adapters, loading, weights

Spec = ControlNet | IpAdapter


@dataclass
class Kept:
    """A ControlNet or an IP-Adapter in memory."""

    loaded: nn.Module | ip_adapters.Loaded
    bytes: int
    sha256: str
    used: float


@dataclass(frozen=True)
class Prepared:
    """What a plan's pictures became: a map for each ControlNet, another for its second pass, and the IP-Adapter's embeddings
    of its pictures and of none."""

    maps: list[Tensor] = field(default_factory=list)
    larger: list[Tensor] = field(default_factory=list)
    embeds: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Guided:
    """What guides a batch: networks that are in memory, and how they act."""

    nets: list[nn.Module] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    adapter: ip_adapters.Loaded | None = None
    prompt: ImagePrompt | None = None

    @property
    def parts(self) -> list[Control | ImagePrompt]:
        return parts(self.controls, self.prompt)

    def prepare(self, plan: Plan) -> Prepared:
        """A plan's maps and embeddings, once for all its pictures."""
        embeds = self.adapter.embed([to_pil(p) for p in plan.ip_adapter_images]) if self.adapter else None
        larger = control.maps(plan, (plan.hires.width, plan.hires.height)) if plan.hires else []
        return Prepared(control.maps(plan, (plan.width, plan.height)), larger, embeds)

    def arguments(
        self, pipe: DiffusionPipeline, given: dict[str, Any], rows: list[Prepared], generators: list[torch.Generator], guidance_scale: float, second: bool = False
    ) -> dict[str, Any]:
        """The pipeline's arguments for a batch of as many pictures as `rows`, of those `given` to one that nothing guides.

        Args:
            generators: the pictures'.
            second: for the second pass of hires-fix.
        """
        arguments = dict(given)
        if self.nets:
            arguments = control.arguments(pipe, arguments, self.controls, [row.larger if second else row.maps for row in rows], generators)
        if self.adapter:
            pairs = [row.embeds for row in rows if row.embeds]
            without = [torch.cat([nothing for _, nothing in pairs])] if guidance_scale > 1 else []
            arguments["ip_adapter_image_embeds"] = [torch.cat([*without, torch.cat([embeds for embeds, _ in pairs])])]
        return arguments


class Guides:
    """Those beside one model.

    Args:
        pipe: the model's pipeline.
        entry: the model.
        dtype: the precision that the model has, and so they.
    """

    def __init__(self, pipe: DiffusionPipeline, entry: Entry, dtype: torch.dtype) -> None:
        self.pipe, self.entry, self.dtype = pipe, entry, dtype
        self._kept: dict[str, Kept] = {}
        self._own: ip_adapters.Attention | None = None  # the UNet's, while an adapter acts

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for kept in list(self._kept.values()))

    @property
    def ids(self) -> set[str]:
        return set(self._kept)

    def snapshot(self) -> list[ResidentGuide]:
        return [ResidentGuide(id=id, resident_bytes=kept.bytes) for id, kept in list(self._kept.items())]

    def apply(self, plan: Plan, specs: dict[str, tuple[Spec, Path]], make_room: Callable[[int], int]) -> Guided:
        """Make exactly a plan's ControlNets and IP-Adapter act on the model, loading what is not in memory.

        Args:
            specs: of each of them, the catalogue's entry and where its files are.
            make_room: unloads other models for so many bytes; returns how many are still missing.

        Raises:
            Problem: 503 for what is missing, broken, of another architecture or too large.
        """
        self._switch(None)
        wanted = [part.id for part in parts(plan.controls, plan.ip_adapter)]
        for id in dict.fromkeys(wanted):
            self._ready(*specs[id], wanted, make_room)
        nets = [kept.loaded for c in plan.controls if isinstance((kept := self._kept[c.id]).loaded, nn.Module)]
        controls = [c.model_copy(update={"sha256": self._kept[c.id].sha256}) for c in plan.controls]
        if plan.ip_adapter is None:
            return Guided(nets, controls)
        kept = self._kept[plan.ip_adapter.id]
        assert isinstance(kept.loaded, ip_adapters.Loaded)
        self._switch(kept.loaded)
        kept.loaded.scale(plan.ip_adapter.scale)
        return Guided(nets, controls, kept.loaded, plan.ip_adapter.model_copy(update={"sha256": kept.sha256}))

    def drop_idle(self, seconds: float) -> None:
        """Unload what has not been used for so long."""
        for id in [id for id, kept in self._kept.items() if time.monotonic() - kept.used >= seconds]:
            self._drop(id)

    def _switch(self, adapter: ip_adapters.Loaded | None) -> None:
        """Put an adapter into the UNet, or none."""
        if self._own:
            self._own.put_into(self.pipe.unet)
            self._own = None
        if adapter:
            self._own = ip_adapters.Attention.of(self.pipe.unet)
            adapter.attention.put_into(self.pipe.unet)

    def _ready(self, spec: Spec, path: Path, wanted: list[str], make_room: Callable[[int], int]) -> None:
        if kept := self._kept.get(spec.id):
            kept.used = time.monotonic()
            return
        needs = weights.total(files(path, spec)) * self.dtype.itemsize
        while (missing := make_room(needs)) > 0:
            spare = min((id for id in self._kept if id not in wanted), key=lambda id: self._kept[id].used, default=None)
            if spare is None:
                raise unavailable(f"{spec.id} needs {needs >> 20} MiB beside {self.entry.id}, {missing >> 20} MiB more than memory_budget_bytes allows.", slug="model-memory")
            self._drop(spare)
        try:
            self._kept[spec.id] = self._load(spec, path)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _explained(spec, error) from error

    def _load(self, spec: Spec, path: Path) -> Kept:
        device = self.pipe._execution_device
        now = time.monotonic()
        if isinstance(spec, IpAdapter):
            adapter = ip_adapters.load(self.pipe.unet, path, spec, self.dtype, device)
            return Kept(adapter, sum(_bytes(m) for m in adapter.modules), adapter.sha256, now)
        net = control.load(path, spec, self.dtype, device)
        return Kept(net, _bytes(net), _sha256(files(path, spec)), now)

    def _drop(self, id: str) -> None:
        self._switch(None)
        del self._kept[id]


def fetch(spec: Spec, token: str | None) -> Path:
    """Make the files of a ControlNet or IP-Adapter local, and hash them so that loading need not (no device needed;
    any thread); return their folder.

    Raises:
        Problem: 503 that says what stands in the way.
    """
    path = _local(spec, token)
    try:
        _sha256(files(path, spec))
    except OSError as error:
        raise _explained(spec, error) from error
    return path


def _local(spec: Spec, token: str | None) -> Path:
    source = spec.source or spec.id
    for path in (Path(source).expanduser(), ROOT / source):
        if path.is_dir():
            return path
    if source.startswith((".", "/", "~")):
        raise unavailable(f"The weights of {spec.id} are not at {source}. Put them there, or mend `source` in configuration.yaml.", slug="model-missing")
    if isinstance(spec, IpAdapter):
        patterns = [str(Path(spec.subfolder) / spec.weight_name), f"{spec.image_encoder}/config.json", f"{spec.image_encoder}/*.safetensors"]
    else:
        name = f"diffusion_pytorch_model.{spec.variant}" if spec.variant else "diffusion_pytorch_model"
        patterns = ["config.json", f"{name}.safetensors", f"{name}-*.safetensors", f"{name}.safetensors.index.json"]
    try:
        return hub.once(
            (source, spec.revision, *patterns), lambda: Path(snapshot_download(source, revision=spec.revision, allow_patterns=patterns, token=token or None))
        )
    except Exception as error:
        raise _explained(spec, error) from error


def _explained(spec: Spec, error: Exception) -> Problem:
    return loading.explain(_as_entry(spec), error)


def _as_entry(spec: Spec) -> Entry:
    """As a model's entry, for the messages about what cannot be had."""
    return Entry(Model(id=spec.id, family=spec.family, source=spec.source, revision=spec.revision), FAMILIES[spec.family])


def files(path: Path, spec: Spec) -> list[Path]:
    """The weight files of a ControlNet or IP-Adapter whose folder is `path`."""
    return ip_adapters.files(path, spec) if isinstance(spec, IpAdapter) else control.files(path, spec)


def _sha256(files: list[Path]) -> str:
    """Of a single file; of several, of their hashes, one a line."""
    hashes = [weights.sha256(file, None) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
