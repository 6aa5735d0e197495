"""Which models are in memory: load on first use, unload when idle, evict the least recently used.

Only the device's thread calls `acquire`, `sweep` and `unload`; `snapshot` may be called from
anywhere. Bytes are measured, on the device or by counting the tensors, not looked up in a table.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline

from core import metrics
from core.families import Entry
from core.generation import AppliedLora
from core.model_settings import Models, MotionAdapter
from core.plans import Plan, PlannedLora
from core.status import ResidentModel
from runners import control, loading, memory, motion, optimising, stepping, weights
from runners.adapters import Adapters
from runners.guides import Guided, Guides, Spec
from runners.loading import Kind
from runners.motion import Motion
from runners.remembered import Remembered, Tensors, remember_encodings

log = logging.getLogger("easel.residency")
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
Load = Callable[[Entry, Path, torch.dtype, torch.device], DiffusionPipeline]
Key = tuple[str, torch.dtype]


@dataclass
class Resident:
    """A model in memory. Its pipelines share all components; `base` is the one that was loaded.
    `scheduler` is the model's own, `sha256` its weights'. `weights_bytes` are on the device; where the
    model is offloaded, `host_bytes` wait in CPU memory."""

    entry: Entry
    dtype: torch.dtype
    scheduler: Any
    base: DiffusionPipeline
    adapters: Adapters
    guides: Guides
    weights_bytes: int
    host_bytes: int
    used: float
    load_s: float
    sha256: str
    remembered: Remembered
    motion: Motion | None = None
    _made: dict[Kind, DiffusionPipeline] = field(default_factory=dict)

    def pipeline(self, kind: Kind, nets: list[torch.nn.Module] | None = None) -> DiffusionPipeline:
        """A pipeline that does `kind`, of this model's components, controlled by ControlNets where there are `nets`. It is
        the caller's own, to be given a scheduler; it shares the denoiser's passes (runners.stepping) and encodes no picture twice.

        Offloaded by component it is nobody's own, since its hooks know the components: then its scheduler is whichever was put in last.
        """
        if nets:
            pipe = control.pipeline(self.base, self.entry.model.family, kind, nets, **_flags(self.base))
        elif kind == "txt2img":
            pipe = self.base
        else:
            if kind not in self._made:
                made = loading.CLASSES[self.entry.model.family][kind](**self.base.components, **_flags(self.base))
                made.set_progress_bar_config(disable=True)
                self._made[kind] = made
            pipe = self._made[kind]
        if getattr(self.base, "_all_hooks", None):
            return pipe
        return stepping.share_passes(remember_encodings(pipe if nets else copy.copy(pipe), self.remembered))

    @cached_property
    def device(self) -> str:
        """Where it computes. Asked once: diffusers looks through all of its modules to tell."""
        return str(getattr(self.base, "_execution_device", self.base.device))

    def remember(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What the text encoders have made before of what `key` names, under the LoRAs that act on them now."""
        return self.remembered.get((self.adapters.reading, key), make)

    @property
    def beside(self) -> set[str]:
        """What is in memory beside it: LoRAs by their files, ControlNets, IP-Adapters and the motion adapter by their ids."""
        return self.adapters.files | self.guides.ids | ({self.motion.id} if self.motion else set())

    @property
    def bytes(self) -> int:
        """On the device, of the model, the LoRAs beside it (those wait where the model waits) and what else is beside it."""
        return self.weights_bytes + (0 if self.host_bytes else self.adapters.bytes) + (self.motion.bytes if self.motion else 0) + self.guides.bytes + self.remembered.bytes


class Residency:
    """The models on one device, under a memory budget.

    Args:
        settings: idle timeouts and the budget (bytes; by default four fifths of the device's memory).
        device: where models go.
        load: makes a pipeline from local files.
        lora_budget: bytes that the LoRAs beside one model may take.
    """

    def __init__(self, settings: Models, device: torch.device, load: Load = loading.load, lora_budget: int = 2 * 1024**3) -> None:
        self.settings, self.device, self._load, self.lora_budget = settings, device, load, lora_budget
        self.budget = settings.memory_budget_bytes or _device_memory(device, any(m.optimise.device_map for m in settings.catalogue)) * 4 // 5
        self._residents: dict[tuple[str, torch.dtype], Resident] = {}
        self._states: dict[str, tuple[str, str | None]] = {}
        self._lock = threading.Lock()

    def present(self, entry: Entry, dtype: torch.dtype) -> set[str]:
        """What is in memory beside a model, and of other models: LoRAs by their files, all else by id."""
        resident = self._residents.get((entry.id, dtype))
        return {id for id, _ in self._residents} | (resident.beside if resident else set())

    def acquire(self, entry: Entry, path: Path, dtype: torch.dtype, room: int = 0, beside: Resident | None = None) -> Resident:
        """The model in memory, loaded now if it is not, with `room` bytes beside it for what it computes;
        `beside` stays in memory too.

        Raises:
            Problem: 503 where it cannot be loaded, or is larger than the whole budget.
        """
        key = (entry.id, dtype)
        keep = {key} | _keys(beside)
        if resident := self._residents.get(key):
            resident.used = time.monotonic()
            self._evict(room, keep)
            return resident
        self.note(entry.id, "loading")
        try:
            resident = self._bring_in(entry, path, dtype, room, beside)
        except Exception as error:
            problem = loading.explain(entry, error)
            self.note(entry.id, "failed", problem.details.detail)
            metrics.LOAD_FAILURES.labels(metrics.here(), metrics.model(entry), metrics.kind(problem.details.type)).inc()
            memory.release_memory(self.device)
            raise problem from error
        with self._lock:
            self._residents[key] = resident
            self._states.pop(entry.id, None)
        self._evict(room, keep)
        metrics.LOAD_SECONDS.labels(metrics.here(), metrics.model(entry)).observe(resident.load_s)
        log.info("loaded %s as %s on %s: %.1f MiB in %.1f s", entry.id, dtype, self.device, resident.bytes / 2**20, resident.load_s)
        return resident

    def _bring_in(self, entry: Entry, path: Path, dtype: torch.dtype, room: int, beside: Resident | None) -> Resident:
        at_rest = memory.weights_at_rest(entry, path, dtype)
        if at_rest > self.budget:
            raise memory.model_too_large(entry, at_rest, self.budget)
        self._evict(at_rest + room, _keys(beside))
        started, before = time.monotonic(), _allocated(self.device)
        base = self._load(entry, path, dtype, self.device)
        total = optimising.tensor_bytes(base)
        measured = (_allocated(self.device) - before) if self.device.type == "cuda" else total
        host = total if entry.model.optimise.offload != "none" else 0
        now = time.monotonic()
        adapters = Adapters(base, entry.id, self.lora_budget)
        return Resident(entry, dtype, base.scheduler, base, adapters, Guides(base, entry, dtype), measured, host, now, now - started, weights.sha256(path, entry.model.variant), Remembered(self.settings.remembered_bytes))

    def adapt(self, resident: Resident, loras: list[PlannedLora], held: AbstractSet[str] = frozenset()) -> list[AppliedLora]:
        """Make exactly these LoRAs act on a model, and make room for them among the other models.

        Raises:
            Problem: see `Adapters.apply`.
        """
        applied = resident.adapters.apply(loras, held)
        self._evict(0, _keys(resident))
        return applied

    def animate(self, resident: Resident, adapter: MotionAdapter, path: Path) -> Motion:
        """The motion adapter beside a model, in the place of any other; make room for it among the other models.

        Raises:
            Problem: see `motion.load`.
        """
        if resident.motion is None or resident.motion.id != adapter.id:
            resident.motion = None
            resident.motion = motion.load(resident.base, adapter, path)
            self._evict(0, keep=_keys(resident))
        resident.motion.follow(resident.base.unet)
        return resident.motion

    def guide(self, resident: Resident, plan: Plan, specs: dict[str, tuple[Spec, Path]]) -> Guided:
        """Make exactly a plan's ControlNets and IP-Adapter act on a model, and make room for them among the other models.

        Raises:
            Problem: see `Guides.apply`.
        """

        def make_room(needed: int) -> int:
            self._evict(needed, keep=_keys(resident))
            return self.resident_bytes + needed - self.budget

        return resident.guides.apply(plan, specs, make_room)

    def sweep(self) -> None:
        """Unload what has been idle for its timeout."""
        now = time.monotonic()
        for key, resident in list(self._residents.items()):
            if now - resident.used >= self._timeout(resident.entry):
                self._unload(key, "idle")
            else:
                resident.guides.drop_idle(self._timeout(resident.entry))

    def unload(self, model_id: str | None) -> int:
        """Unload one model in every precision, or all; the number unloaded."""
        keys = [key for key in self._residents if model_id in (None, key[0])]
        for key in keys:
            self._unload(key, "asked")
        return len(keys)

    def touch(self, resident: Resident) -> None:
        """Count idle time from the end of use, not from its start."""
        resident.used = time.monotonic()

    def note(self, model_id: str, state: str, error: str | None = None) -> None:
        """Remember a state that is not "warm": downloading, loading, failed."""
        with self._lock:
            self._states[model_id] = (state, error)

    def fetched(self, model_id: str) -> None:
        """A download has ended."""
        with self._lock:
            if self._states.get(model_id) == ("downloading", None):
                del self._states[model_id]

    def snapshot(self, entries: list[Entry]) -> list[ResidentModel]:
        """Every listed model, and every unlisted one in memory, as /buffer_status shows it."""
        now = time.monotonic()
        with self._lock:
            residents, states = list(self._residents.values()), dict(self._states)
        warm = [
            ResidentModel(
                model_id=r.entry.id,
                family=r.entry.model.family,
                state="warm",
                device=str(self.device),
                torch_dtype=str(r.dtype).removeprefix("torch."),
                resident_bytes=r.bytes,
                host_bytes=r.host_bytes and r.host_bytes + r.adapters.bytes,
                remembered_bytes=r.remembered.bytes,
                loras=r.adapters.snapshot(),
                guides=r.guides.snapshot(),
                last_used_s_ago=round(now - r.used, 3),
                unload_in_s=round(max(0.0, self._timeout(r.entry) - (now - r.used)), 3),
            )
            for r in residents
        ]
        ids = {r.entry.id for r in residents}
        others = []
        for entry in entries:
            if entry.id not in ids:
                state, error = states.get(entry.id, ("cold", None))
                others.append(ResidentModel.model_validate({"model_id": entry.id, "family": entry.model.family, "state": state, "error": error}))
        return warm + others

    @property
    def resident_bytes(self) -> int:
        with self._lock:
            return sum(r.bytes for r in self._residents.values())

    def _timeout(self, entry: Entry) -> float:
        return entry.model.idle_timeout_s or self.settings.idle_timeout_s

    def _evict(self, room: int, keep: AbstractSet[Key] = frozenset()) -> None:
        """Until `room` more bytes fit the budget, forget what models remember, then unload the least recently used."""
        if self.resident_bytes + room > self.budget:
            for resident in self._residents.values():
                resident.remembered.clear()
        while self.resident_bytes + room > self.budget:
            candidates = [k for k in self._residents if k not in keep]
            if not candidates:
                return
            self._unload(min(candidates, key=lambda k: self._residents[k].used), "evicted")

    def _unload(self, key: tuple[str, torch.dtype], why: str) -> None:
        with self._lock:
            resident = self._residents.pop(key)
        began, model = time.monotonic(), metrics.model(resident.entry)
        log.info("unloading %s (%s): %.1f MiB", resident.entry.id, why, resident.bytes / 2**20)
        del resident
        memory.release_memory(self.device)
        metrics.UNLOAD_SECONDS.labels(metrics.here(), model, why).observe(time.monotonic() - began)


def _keys(resident: Resident | None) -> set[Key]:
    return {(resident.entry.id, resident.dtype)} if resident else set()


def _flags(pipeline: DiffusionPipeline) -> dict[str, bool]:
    return {"requires_safety_checker": False} if "safety_checker" in pipeline.components else {}


def _device_memory(device: torch.device, spread: bool) -> int:
    """Bytes of the device, or of all the worker's GPUs where models are spread over them."""
    if device.type == "cuda":
        return sum(int(torch.cuda.get_device_properties(d).total_memory) for d in (range(torch.cuda.device_count()) if spread else [device]))
    limits = [int(text) for file in _CONTAINER_LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min([int(psutil.virtual_memory().total), *limits])


def _allocated(device: torch.device) -> int:
    """Bytes on all the GPUs of this process: only the device's thread allocates any."""
    return sum(int(torch.cuda.memory_allocated(d)) for d in range(torch.cuda.device_count())) if device.type == "cuda" else 0
