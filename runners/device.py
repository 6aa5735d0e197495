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
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from core import metrics, problems
from core.catalogue import Catalogue
from core.families import FAMILIES, Entry
from core.generation import Generation, Timing
from core.model_settings import ControlNet, IpAdapter, Model, MotionAdapter
from core.plans import Plan
from core.settings import Settings, beside_configuration, secrets
from core.status import Progress
from runners import (
    animation,
    denoise,
    guides,
    loading,
    memory,
    motion,
    multimodal,
    optimising,
    previews,
    upscaling,
    weights,
)
from runners.batch import Batch
from runners.cores import Cores
from runners.memory import Way
from runners.pace import Pace
from runners.queue import DeviceQueue
from runners.residency import Residency, Resident
from runners.safety import SafetyChecker
from runners.stepping import Runs
from runners.work import Job, Share, check_all

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
        self._paces: dict[Hashable, Pace] = {}
        self._guides: dict[str, tuple[ControlNet | IpAdapter, Path]] = {}
        self.queue = DeviceQueue(self.residency.sweep, catalogue.queue.limit, catalogue.queue.per_key)

    def fetch(self, entry: Entry) -> Path:
        """Make a model's files local, and hash them so that loading need not (no device needed; any thread).

        Raises:
            Problem: 503 that says what stands in the way.
        """
        self.safety.load()
        try:
            path = loading.fetch(entry, secrets().hf_token.get_secret_value(), downloading=partial(self.residency.note, entry.id, "downloading"))
            self.residency.fetched(entry.id)
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
        limit = self.catalogue.models.max_batch
        job: Job[Generation] = Job(plan.id, plan.client, lambda job: self._checked([job], [plan], paths)[0], plan.deadline_s)
        if self._by_steps(plan):
            job.run = lambda job: self._draw_by_steps(job, plan, paths)
            # Compiled code is made for the LoRAs that act, all rows alike.
            compiled = plan.loras if self.catalogue.find(plan.model_id).model.optimise.compile else []
            job.share = Share(f"{plan.step_key} {compiled}", plan, plan.rows, limit, steps=plan.steps)
        elif not plan.animation:
            job.share = Share(plan.batch_key, plan, plan.rows, limit, lambda jobs, plans: self._checked(jobs, plans, paths))
        return self.queue.submit(job)

    def _by_steps(self, plan: Plan) -> bool:
        """Whether requests like this share single steps, not whole batches: where one network stays on one device and draws pictures."""
        entry = self.catalogue.find(plan.model_id)
        where = entry.model.optimise
        return not (plan.animation or plan.upscale or entry.traits.multimodal or where.offload != "none" or where.device_map)

    def unload(self, model_id: str | None) -> Future[int]:
        """Queue the unloading of one model, or of all."""
        job: Job[int] = Job("unload", "admin", lambda _: self.residency.unload(model_id), self.catalogue.queue.deadline_s)
        return self.queue.submit(job)

    def _checked(self, jobs: list[Job[Generation]], plans: list[Plan], paths: dict[str, Path], way: Way | None = None) -> list[Generation]:
        """`_run` for the plans whose pictures may be used; what it draws is looked at before anyone sees it."""
        with self._busy():
            refused = [self.safety.refusal(plan) for plan in plans]
            fine = [i for i, problem in enumerate(refused) if problem is None]
            drawn = iter(self._run([jobs[i] for i in fine], [plans[i] for i in fine], paths, way) if fine else [])
            return [Generation(problem=problem.details) if problem else self.safety.censor(next(drawn)) for problem in refused]

    def _run(self, jobs: list[Job[Generation]], plans: list[Plan], paths: dict[str, Path], way: Way | None = None) -> list[Generation]:
        """In the device's thread: make the model resident, then draw plans that are alike, in the first `way` that fits."""
        timings = [Timing(queue=1000 * (time.monotonic() - job.submitted)) for job in jobs]
        plan = plans[0]
        entry = self.catalogue.find(plan.model_id)
        request = self._request(plans, paths)
        way = way or memory.choose(request, self.residency.budget, self._may_offload)
        started = time.perf_counter()
        resident = self._acquire(request, way, plan, paths)

        done = itertools.count(1)
        expected = None if plan.upscale else plan.steps * multimodal.passes(plan) * math.ceil(sum(p.rows for p in plans) / way.rows)

        def check(stepped: int = 0, latents: torch.Tensor | None = None) -> None:
            if stepped:
                metrics.STEPS.labels(metrics.here(), metrics.model(entry)).inc(len(jobs))
                metrics.BATCH_ROWS.labels(metrics.here()).observe(stepped)
                progress = Progress(model_id=entry.id, steps_done=next(done), steps=expected)
                for job in jobs:  # one batch: the progress of all is that of each
                    job.progress = progress
                at_once, row = sum(p.rows for p in plans) <= way.rows, 0
                for job, its in zip(jobs, plans, strict=True) if at_once else [(jobs[0], plan)]:  # of a batch in parts, the first alone
                    previews.show(job, its, resident, None if latents is None else latents[row:], progress.steps_done)
                    row += its.rows
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
        notes = self._dtype(entry, plan)[1]
        plans = [p.model_copy(update={"notes": [*p.notes, *notes]}) for p in plans]
        try:
            for attempt in dict.fromkeys((way, memory.ways(request, self._may_offload)[-1])):
                try:
                    return draw(attempt)
                except RuntimeError as error:
                    if not memory.out_of_memory(error):
                        raise
                # Out here, since the error has held on to the tensors of the pass that failed.
                metrics.OUT_OF_MEMORY.labels(metrics.here()).inc()
                log.warning("%dx%d with %s ran out of memory, %s", plan.width, plan.height, entry.id, attempt)
                memory.release_memory(self.torch_device)
            raise memory.exhausted(request, self.torch_device, self.residency.budget, self._may_offload)
        finally:
            self.residency.touch(resident)

    def _draw_by_steps(self, first: Job[Generation], plan: Plan, paths: dict[str, Path]) -> None:
        """In the device's thread: make the model resident, then draw a plan, and those that join it at its steps."""
        try:
            with self._busy():
                short = self._draw_together(first, plan, paths)
        except RuntimeError as error:
            if first.future.done() or not memory.out_of_memory(error):
                raise
            short = [first]
        if short:
            metrics.OUT_OF_MEMORY.labels(metrics.here()).inc()
        for job in short:
            assert job.share is not None
            memory.release_memory(self.torch_device)
            self.queue.settle(job, partial(self._frugally, job, job.share.work, paths))

    def _draw_together(self, first: Job[Generation], plan: Plan, paths: dict[str, Path]) -> list[Job[Generation]]:
        """The part of `_draw_by_steps` that others join; returns those that memory was too short for."""
        began, models = time.perf_counter(), self.catalogue.models
        request = self._request([plan], paths)
        way = memory.choose(request, self.residency.budget, self._may_offload)
        most = memory.most(request, way, self.residency.budget, models.max_batch)
        resident = self._acquire(request, way, plan, paths)
        pace = self._paces.setdefault((plan.model_id, request.dtype, plan.width, plan.height), Pace())

        def make_room(rows: int) -> None:
            if rows > request.rows:
                self._acquire(replace(request, rows=rows), Way(rows), plan, paths, upscaler)

        try:
            upscaler = self._upscaler(plan, paths, resident)
            guided = self.residency.guide(resident, plan, self._guides)
            with self._thrift(resident, way):
                batch = Batch(
                    resident, partial(self.residency.adapt, resident), guided, upscaler, way, most, models.max_batch, Runs(self.torch_device, pace),
                    self.queue, self.safety, self._dtype(resident.entry, plan)[1], make_room, self._cores.divide if self._cores else None, began,
                )  # fmt: skip
                return batch.draw(first)
        finally:
            self.residency.touch(resident)

    def _frugally(self, job: Job[Generation], plan: Plan, paths: dict[str, Path]) -> Generation:
        """Draw a plan that ran out of memory, in the most frugal way."""
        return self._checked([job], [plan], paths, memory.ways(self._request([plan], paths), self._may_offload)[-1])[0]

    def _busy(self) -> contextlib.AbstractContextManager[None]:
        """While the device computes: a CPU's runners divide its cores."""
        return self._cores.busy() if self._cores else contextlib.nullcontext()

    def _acquire(self, request: memory.Request, way: Way, plan: Plan, paths: dict[str, Path], beside: Resident | None = None) -> Resident:
        """The model in memory, with room for what the plan needs, and `beside` still there."""
        entry, dtype = request.entry, request.dtype
        there = self.residency.present(entry, dtype)
        room = memory.needed(request, way) - memory.weights_at_rest(entry, paths[entry.id], dtype)
        room -= sum(size for name, size in self._beside(plan, paths, dtype).items() if name in there)
        return self.residency.acquire(entry, paths[entry.id], dtype, room, beside)

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
