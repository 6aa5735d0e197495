"""A device with its queue and resident models: plans and paths in, pictures out.

The torch half of a runner. runners.diffusion, which every process imports, makes one of these in
the runner's own process only.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from core import problems
from core.catalogue import Catalogue
from core.families import FAMILIES, Entry
from core.generation import Generation, Timing
from core.model_settings import ControlNet, IpAdapter, Model, MotionAdapter
from core.plans import Plan
from core.settings import Settings, beside_configuration, secrets
from core.status import Progress
from runners import animation, denoise, guides, loading, memory, motion, multimodal, optimising, upscaling, weights
from runners.cores import Cores
from runners.memory import Way
from runners.queue import DeviceQueue, Job, Share, check_all
from runners.residency import Residency, Resident, release_memory
from runners.safety import SafetyChecker

log = logging.getLogger("easel.device")


class Device:
    """The queue, the thread and the memory of one device."""

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        models = catalogue.models
        self.settings, self.catalogue = settings, catalogue
        self.torch_device = loading.device_for(models.device)
        if missing := models.needs(torch.cuda.device_count() if self.torch_device.type == "cuda" else 0):
            raise ValueError(f"The catalogue asks for what {self.torch_device} cannot do. {'. '.join(missing)}")
        optimising.keep_compiled(beside_configuration(models.compile_cache))
        self._cores = Cores(models.cpu_threads) if self.torch_device.type == "cpu" else None
        self.residency = Residency(models, self.torch_device, lora_budget=settings.loras.memory_budget_bytes)
        self.safety = SafetyChecker(settings.safety, self.torch_device)
        self._guides: dict[str, tuple[ControlNet | IpAdapter, Path]] = {}
        self.queue = DeviceQueue(self.residency.sweep, catalogue.queue.limit, catalogue.queue.per_key)

    def fetch(self, entry: Entry) -> Path:
        """Make a model's files local, and hash them so that loading need not (no device needed; any thread).

        Raises:
            Problem: 503 that says what stands in the way.
        """
        self.safety.load()
        try:
            path = loading.fetch(entry, secrets().hf_token.get_secret_value())
            try:
                weights.sha256(path, entry.model.variant)
            except OSError as error:
                raise loading.explain(entry, error) from error
            return path
        except problems.Problem as problem:
            self.residency.note(entry.id, "failed", problem.details.detail)
            raise

    def fetch_motion(self, plan: Plan) -> Path:
        """Make the files of an animation's motion adapter local; as `fetch`."""
        adapter = self._adapter(plan)
        named = adapter.model_dump(include={"id", "family", "source", "variant", "revision"})
        return loading.fetch(Entry(Model(**named), FAMILIES[adapter.family]), secrets().hf_token.get_secret_value(), component=True)

    def fetch_guides(self, plan: Plan) -> None:
        """Make the files of a plan's ControlNets and IP-Adapter local (no device needed; any thread).

        Raises:
            Problem: 503 that says what stands in the way.
        """
        for spec in self.catalogue.guides(plan):
            self._guides[spec.id] = spec, guides.fetch(spec, secrets().hf_token.get_secret_value())

    def submit(self, plan: Plan, path: Path, others: dict[str, Path] | None = None) -> Future[Generation]:
        """Queue a plan whose model's files are at `path`, and those of the `others` that it names, by id, at theirs.

        Raises:
            Problem: 429 where the queue is full; 507 where it could not fit the memory even alone.
        """
        paths = {plan.model_id: path, **(others or {})}
        memory.choose(self._request([plan], paths), self.residency.budget, self._may_offload)
        share: Share[Plan, Generation] = Share(
            plan.batch_key, plan, plan.rows, self.catalogue.models.max_batch, lambda jobs, plans: self._checked(jobs, plans, paths)
        )
        alone = Job(plan.id, plan.client, lambda job: self._checked([job], [plan], paths)[0], plan.deadline_s, None if plan.animation else share)
        return self.queue.submit(alone)

    def unload(self, model_id: str | None) -> Future[int]:
        """Queue the unloading of one model, or of all."""
        job: Job[int] = Job("unload", "admin", lambda _: self.residency.unload(model_id), self.catalogue.queue.deadline_s)
        return self.queue.submit(job)

    def _checked(self, jobs: list[Job[Generation]], plans: list[Plan], paths: dict[str, Path]) -> list[Generation]:
        """`_run` for the plans whose pictures may be used; what it draws is looked at before anyone sees it."""
        with self._cores.busy() if self._cores else contextlib.nullcontext():
            refused = [self.safety.refusal(plan) for plan in plans]
            fine = [i for i, problem in enumerate(refused) if problem is None]
            drawn = iter(self._run([jobs[i] for i in fine], [plans[i] for i in fine], paths) if fine else [])
            return [Generation(problem=problem.details) if problem else self.safety.censor(next(drawn)) for problem in refused]

    def _run(self, jobs: list[Job[Generation]], plans: list[Plan], paths: dict[str, Path]) -> list[Generation]:
        """In the device's thread: make the model resident, then draw plans that are alike."""
        timings = [Timing(queue=1000 * (time.monotonic() - job.submitted)) for job in jobs]
        plan = plans[0]
        entry = self.catalogue.find(plan.model_id)
        dtype, notes = self._dtype(entry, plan)
        request = self._request(plans, paths)
        way = memory.choose(request, self.residency.budget, self._may_offload)
        started = time.perf_counter()
        there = self.residency.present(entry, dtype)
        room = memory.needed(request, way) - memory.weights_at_rest(entry, paths[entry.id], dtype)
        room -= sum(size for name, size in self._beside(plan, paths, dtype).items() if name in there)
        resident = self.residency.acquire(entry, paths[entry.id], dtype, room)

        done = itertools.count(1)
        expected = None if plan.upscale else plan.steps * multimodal.passes(plan) * math.ceil(sum(p.rows for p in plans) / way.rows)

        def check(stepped: bool = False) -> None:
            if stepped:
                jobs[0].progress = Progress(model_id=entry.id, steps_done=next(done), steps=expected)
            if self._cores:
                self._cores.divide()
            check_all(jobs)

        def draw(way: Way) -> list[Generation]:
            loras = self.residency.adapt(resident, plan.loras)
            upscaler = self._upscaler(plan, paths, resident)
            guided = self.residency.guide(resident, plan, self._guides)
            for timing in timings:
                timing.load = 1000 * (time.perf_counter() - started)
            with self._thrift(resident, way):
                if plan.animation:
                    beside = self.residency.animate(resident, self._adapter(plan), paths[plan.animation.motion_adapter])
                    drawn = [animation.generate(resident, beside, plans[0], loras, check, way.rows, timings[0])]
                elif entry.traits.multimodal:
                    drawn = multimodal.run(resident, plans, check, way.rows, timings)
                elif plan.upscale:
                    drawn = [upscaling.run(resident, p, check, timing, way.thrifty) for p, timing in zip(plans, timings, strict=True)]
                else:
                    drawn = denoise.generate(resident, plans, loras, guided, check, way.rows, timings, upscaler)
            for ran in (generation.ran for generation in drawn if generation.ran):
                ran.degraded = ran.degraded if entry.model.family == "upscaler" else way.told(request.rows)
            return drawn

        check()
        plans = [p.model_copy(update={"notes": [*p.notes, *notes]}) for p in plans]
        try:
            for attempt in dict.fromkeys((way, memory.ways(request, self._may_offload)[-1])):
                try:
                    return draw(attempt)
                except RuntimeError as error:
                    if not _out_of_memory(error):
                        raise
                # Out here, since the error has held on to the tensors of the pass that failed.
                log.warning("%dx%d with %s ran out of memory, %s", plan.width, plan.height, entry.id, attempt)
                release_memory(self.torch_device)
            raise memory.exhausted(request, self.torch_device, self.residency.budget, self._may_offload)
        finally:
            self.residency.touch(resident)

    def _thrift(self, resident: Resident, way: Way) -> contextlib.AbstractContextManager[None]:
        if not way.thrifty or resident.entry.model.family == "upscaler":  # a network runs in smaller tiles
            return contextlib.nullcontext()
        return optimising.thrifty(resident.base, resident.entry.model.optimise, self.torch_device, way.offload)

    @property
    def _may_offload(self) -> bool:
        return self.torch_device.type == "cuda"

    def _request(self, plans: list[Plan], paths: dict[str, Path]) -> memory.Request:
        """What plans that share batches need memory for."""
        entry = self.catalogue.find(plans[0].model_id)
        dtype, _ = self._dtype(entry, plans[0])
        frames = plans[0].animation.num_frames if plans[0].animation else 0
        rows = frames or sum(p.rows for p in plans)
        beside = sum(self._beside(plans[0], paths, dtype).values())
        return memory.Request.of(plans[0], entry, paths[entry.id], dtype, min(rows, self.catalogue.models.max_batch), beside)

    def _beside(self, plan: Plan, paths: dict[str, Path], dtype: torch.dtype) -> dict[str, int]:
        """Bytes of what a plan puts beside its model: of LoRAs by their files, of all else by id."""
        files = {lora.path: [Path(lora.path)] for lora in plan.loras}
        files |= {spec.id: guides.files(path, spec) for spec, path in (self._guides[wanted.id] for wanted in self.catalogue.guides(plan))}
        if plan.animation:
            files[plan.animation.motion_adapter] = [motion.file(paths[plan.animation.motion_adapter], self._adapter(plan))]
        files |= {id: weights.files(paths[id], None) for id in plan.models[1:]}
        return {name: weights.total(some) * dtype.itemsize for name, some in files.items()}

    def _upscaler(self, plan: Plan, paths: dict[str, Path], beside: Resident) -> Resident | None:
        """The network that enlarges pictures for a plan's second pass, in memory beside its model."""
        if plan.hires is None or plan.hires.model_id is None:
            return None
        entry = self.catalogue.find(plan.hires.model_id)
        dtype = getattr(torch, "float32" if self.torch_device.type == "cpu" else entry.model.torch_dtype or entry.traits.gpu_dtype)
        return self.residency.acquire(entry, paths[entry.id], dtype, beside=beside)

    def _adapter(self, plan: Plan) -> MotionAdapter:
        assert plan.animation is not None
        return next(a for a in self.settings.animation.motion_adapters if a.id == plan.animation.motion_adapter)

    def _dtype(self, entry: Entry, plan: Plan) -> tuple[torch.dtype, list[str]]:
        """The precision to run in: as asked, by family on a GPU; no float16 on a CPU."""
        if self.torch_device.type == "cpu":
            chosen = "bfloat16" if plan.torch_dtype == "bfloat16" else "float32"
            asked_otherwise = plan.torch_dtype not in (None, chosen)
            notes = [f"a CPU has no fast {plan.torch_dtype}; ran in {chosen}"] if asked_otherwise else []
            return getattr(torch, chosen), notes
        return getattr(torch, plan.torch_dtype or entry.traits.gpu_dtype), []


def _out_of_memory(error: RuntimeError) -> bool:
    """torch's own error on a GPU; a CPU and Apple's GPUs say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "MPS backend out of memory" in str(error)
