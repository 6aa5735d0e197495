"""The LoRAs in one model's memory: loaded once, told row by row where they act, dropped when others need room.

peft puts their matrices beside the model's layers, and lets none act: each layer runs its base layer alone, and a hook adds to
the rows that a LoRA acts on. So requests with different LoRAs go through the model together. While none acts peft's layers are
out of the model, which costs what it did before any LoRA was loaded, and draws the very same bytes.

Only the device's thread changes anything here.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from core.generation import AppliedLora
from core.plans import PlannedLora
from core.problems import Problem, problem, unavailable
from core.status import ResidentLora
from runners import lora_files, weights
from runners.lora_files import Matrices

# Several LoRAs on one model are what this module is for.
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
Key = tuple[str, int, int]  # path, modification time, size: a file that was replaced is another one
Acting = tuple[tuple[str, float], ...]  # peft's names of LoRAs, and their weights


@dataclass
class Adapter:
    """A LoRA in memory. `id` is peft's name for it; `layers` are those it reached."""

    id: str
    name: str
    sha256: str
    layers: list[BaseTunerLayer]
    unmatched: int
    bytes: int
    reads: bool  # it reached a text encoder


class Adapters:
    """The LoRAs of one model.

    Args:
        pipe: the pipeline; others that share its components see the LoRAs too.
        model_id: for messages.
        budget: bytes that the LoRAs may take together.
    """

    def __init__(self, pipe: DiffusionPipeline, model_id: str, budget: int) -> None:
        self.pipe, self.model_id, self.budget = pipe, model_id, budget
        self._loaded: OrderedDict[Key, Adapter] = OrderedDict()  # the least recently used first
        self.acting: Acting = ()  # since `apply`
        self._added: list[tuple[str, float, slice | Tensor | None]] = []  # now: a LoRA, its weight, and the rows, if not all
        self._rows: int | None = None  # in all, where they differ
        self._hooked: WeakSet[BaseTunerLayer] = WeakSet()
        self._places: list[tuple[nn.Module, str, BaseTunerLayer]] = []  # peft's layers: the module that each belongs to, and its name there
        self._placed = True  # they are in the model
        self._numbers = itertools.count()

    @property
    def bytes(self) -> int:
        return sum(adapter.bytes for adapter in list(self._loaded.values()))

    @property
    def files(self) -> set[str]:
        return {path for path, _, _ in self._loaded}

    @property
    def reading(self) -> Acting:
        """Those of `acting` that reached a text encoder."""
        reads = {adapter.id for adapter in self._loaded.values() if adapter.reads}
        return tuple((id, weight) for id, weight in self.acting if id in reads)

    def snapshot(self) -> list[ResidentLora]:
        return [ResidentLora(name=a.name, resident_bytes=a.bytes) for a in list(self._loaded.values())]

    def fit(self, loras: list[PlannedLora]) -> bool:
        """Whether LoRAs may be in memory at once, by what their files' headers say."""
        return weights.total({Path(lora.path) for lora in loras}) * self.pipe.dtype.itemsize <= self.budget

    def apply(self, loras: list[PlannedLora], held: Set[str] = frozenset()) -> list[AppliedLora]:
        """Make exactly these LoRAs act on the model, on all rows, loading those that are not in memory. Those that are `held`
        (of `acting`, earlier) stay in memory.

        Raises:
            Problem: 503 for a file that is missing, broken or too large; 422 for one that cannot be
                applied to this model or reaches none of its layers. The model is then without LoRAs.
        """
        acting: dict[str, float] = {}
        applied = []
        self._act(())
        keys = [_key(lora) for lora in loras]
        keep = {*keys, *(key for key, adapter in self._loaded.items() if adapter.id in held)}
        for lora, key in zip(loras, keys, strict=True):
            adapter = self._ready(lora, key, keep)
            acting[adapter.id] = acting.get(adapter.id, 0) + lora.weight
            applied.append(AppliedLora(
                name=lora.name, weight=lora.weight, sha256=adapter.sha256, layers=len(adapter.layers), unmatched=adapter.unmatched,
                commercial_use=lora.commercial_use, credit=lora.credit,
            ))  # fmt: skip
        self._act(tuple(acting.items()))
        return applied

    def act_by_row(self, rows: list[Acting]) -> None:
        """Have each row of the next passes acted on by LoRAs of its own, all of them in memory."""
        places: dict[tuple[str, float], list[int]] = {}
        for row, acting in enumerate(rows):
            for part in acting:
                places.setdefault(part, []).append(row)
        self._rows = len(rows)
        self._added = [(id, weight, _neighbours(of, len(rows), self.pipe.device)) for (id, weight), of in places.items()]
        self._place(bool(places))

    def _act(self, acting: Acting) -> None:
        self.acting, self._rows, self._added = acting, None, [(id, weight, None) for id, weight in acting]
        self._place(bool(acting))

    def _place(self, placed: bool) -> None:
        """Have peft's layers in the model, or their base layers in their place."""
        if placed != self._placed:
            for module, name, layer in self._places:
                setattr(module, name, layer if placed else layer.get_base_layer())
            self._placed = placed

    def _add(self, layer: BaseTunerLayer, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        """A layer's hook: what its base layer made, and what the LoRAs add to it (Hu et al. 2021, equation 3)."""
        for id, weight, rows in self._added:
            if id not in layer.lora_A:
                continue
            down, up, x = layer.lora_A[id], layer.lora_B[id], given[0]
            if rows is None:
                made = made + (up(down(x.to(down.weight.dtype))) * weight).to(made.dtype)
            elif len(x) != self._rows:
                raise ValueError(f"{len(x)} rows came to a layer, of {self._rows}")
            else:
                made[rows] += (up(down(x[rows].to(down.weight.dtype))) * weight).to(made.dtype)
        return made

    def _ready(self, lora: PlannedLora, key: Key, keep: Set[Key]) -> Adapter:
        """The LoRA in memory; room is made by dropping others than those to keep."""
        if adapter := self._loaded.get(key):
            self._loaded.move_to_end(key)
            return adapter
        for other in [k for k in self._loaded if k[0] == key[0] and k not in keep]:
            self._drop(other)
        self._make_room(key[2], keep, lora)
        adapter = self._load(lora)
        self._loaded[key] = adapter
        try:
            self._make_room(0, keep, lora)
        except Problem:
            self._drop(key)
            raise
        return adapter

    def _make_room(self, needed: int, keep: Set[Key], lora: PlannedLora) -> None:
        while self.bytes + needed > self.budget:
            spare = next((k for k in self._loaded if k not in keep), None)
            if spare is None:
                detail = f"{lora.name} and the LoRAs beside it need {(self.bytes + needed) >> 20} MiB; loras.memory_budget_bytes allows {self.budget >> 20} MiB."
                raise unavailable(detail, slug="lora-memory")
            self._drop(spare)

    def _drop(self, key: Key) -> None:
        self._discard(self._loaded.pop(key).id)

    def _load(self, lora: PlannedLora) -> Adapter:
        sha256, tensors, settings = self._read(lora)
        try:
            found, unmatched = lora_files.by_component(tensors, settings, self.pipe)
        except Exception as error:
            raise self._unfit(lora, error) from error
        if not found:
            some = next(iter(tensors), "none at all")
            detail = f"The LoRA {lora.name} reaches no layer of {self.model_id} (its keys are like {some[:120]!r}), so it would change nothing. Leave it out, or use the model that it was made for."
            raise problem(422, "lora-no-effect", "LoRA without effect", detail)
        id = f"lora{next(self._numbers)}"
        self._place(True)
        try:
            for name, matrices in found.items():
                _inject(id, lora_files.components(self.pipe)[name], matrices)
        except torch.OutOfMemoryError:
            self._discard(id)
            raise
        except Exception as error:
            self._discard(id)
            raise self._unfit(lora, error) from error
        layers = [layer for _, _, layer in self._found() if _parameters(layer, id)]
        for layer in layers:
            layer.set_adapter([], inference_mode=True)  # loading has made it the active one
            if layer not in self._hooked:
                layer.register_forward_hook(self._add)
                self._hooked.add(layer)
        self._places = list(self._found())
        size = sum(p.numel() * p.element_size() for layer in layers for p in _parameters(layer, id))
        return Adapter(id, lora.name, sha256, layers, unmatched, size, any(name in lora_files.ENCODERS for name in found))

    def _read(self, lora: PlannedLora) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """The file's SHA-256, tensors and settings."""
        try:
            with open(lora.path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return sha256, *lora_files.load(lora.path)
        except FileNotFoundError:
            raise _gone(lora) from None
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise unavailable(f"The LoRA {lora.name} cannot be read from {lora.path}: {_line(error)}. Add it again.", slug="lora-broken") from error

    def _found(self) -> Iterator[tuple[nn.Module, str, BaseTunerLayer]]:
        """Peft's layers as they are in the model."""
        for component in lora_files.components(self.pipe).values():
            for module in component.modules():
                yield from ((module, name, child) for name, child in module.named_children() if isinstance(child, BaseTunerLayer))

    def _discard(self, id: str) -> None:
        """Take a LoRA out of the model, loaded whole or in part; with the last one peft's layers go too."""
        self._place(True)
        for _, _, layer in self._found():
            if _parameters(layer, id):
                layer.set_adapter([i for i in layer.active_adapters if i != id], inference_mode=True)
                layer.delete_adapter(id)
        for component in lora_files.components(self.pipe).values():
            getattr(component, "peft_config", {}).pop(id, None)
        if not self._loaded:
            self.pipe.unload_lora_weights()
        self._places = list(self._found())

    def _unfit(self, lora: PlannedLora, error: Exception) -> Problem:
        return problem(422, "lora-unfit", "LoRA does not fit", f"The LoRA {lora.name} cannot be applied to {self.model_id}: {_line(error)}")


def _inject(id: str, component: nn.Module, matrices: Matrices) -> None:
    """Put the matrices onto the component's layers, in their precision and on their device."""
    usual, _ = Counter(matrices.ranks.values()).most_common(1)[0]
    # One pattern a rank, not one a layer: peft tries every pattern on every layer.
    others = {
        f"^(?:{'|'.join(re.escape(layer) for layer, own in matrices.ranks.items() if own == rank)})": rank
        for rank in set(matrices.ranks.values()) - {usual}
    }
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,  # alphas are in the matrices: every scale is 1
        target_modules=list(matrices.ranks),
        rank_pattern=others,
        alpha_pattern=others,
        lora_bias=any(key.endswith(".bias") for key in matrices.tensors),
        inference_mode=True,
    )
    inject_adapter_in_model(config, component, adapter_name=id, low_cpu_mem_usage=True, state_dict=matrices.tensors)
    set_peft_model_state_dict(component, matrices.tensors, id, low_cpu_mem_usage=True)
    parameters = [p for m in component.modules() if isinstance(m, BaseTunerLayer) for p in _parameters(m, id)]
    if any(p.is_meta for p in parameters):
        raise ValueError("some of its layers have no bias, others have one")


def _neighbours(rows: list[int], total: int, device: torch.device) -> slice | Tensor | None:
    """Rows as what takes them out of a tensor, without a copy where they are neighbours; None for all."""
    if len(rows) == total:
        return None
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)


def _key(lora: PlannedLora) -> Key:
    try:
        stat = Path(lora.path).stat()
    except OSError:
        raise _gone(lora) from None
    return lora.path, stat.st_mtime_ns, stat.st_size


def _gone(lora: PlannedLora) -> Problem:
    return unavailable(f"The weights of the LoRA {lora.name} are gone from {lora.path}.", slug="lora-missing")


def _parameters(layer: BaseTunerLayer, id: str) -> list[nn.Parameter]:
    """What the LoRA `id` has in a layer; empty where it did not reach it."""
    parts = [getattr(layer, name)[id] for name in layer.adapter_layer_names if id in getattr(layer, name)]
    return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
