"""A device with its queue and resident models: plans and paths in, pictures out.

The torch half of a runner. runners.diffusion, which every process imports, makes one of these in
the runner's own process only.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import torch

from core import problems
from core.catalogue import Catalogue, Entry
from core.generation import Generation, Plan, Timing
from core.settings import Settings, secrets
from runners import denoise, loading, multimodal, weights
from runners.queue import DeviceQueue, Job, Share, check_all
from runners.residency import Residency


class Device:
    """The queue, the thread and the memory of one device."""

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        models = catalogue.models
        self.settings, self.catalogue = settings, catalogue
        self.torch_device = loading.device_for(models.device)
        if models.cpu_threads:
            torch.set_num_threads(models.cpu_threads)
        self.residency = Residency(models, self.torch_device, lora_budget=settings.loras.memory_budget_bytes)
        self.queue = DeviceQueue(self.residency.sweep, catalogue.queue.limit, catalogue.queue.per_key)

    def fetch(self, entry: Entry) -> Path:
        """Make a model's files local, and hash them so that loading need not (no device needed; any thread).

        Raises:
            Problem: 503 that says what stands in the way.
        """
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

    def submit(self, plan: Plan, path: Path) -> Future[Generation]:
        """Queue a plan whose model's files are at `path`."""
        rows = multimodal.rows_of(plan) if self.catalogue.find(plan.model_id).traits.multimodal else len(plan.seeds)
        share: Share[Plan, Generation] = Share(
            plan.batch_key, plan, rows, self.catalogue.models.max_batch, lambda jobs, plans: self._run(jobs, plans, path)
        )
        return self.queue.submit(Job(plan.id, plan.client, lambda job: self._run([job], [plan], path)[0], plan.deadline_s, share))

    def unload(self, model_id: str | None) -> Future[int]:
        """Queue the unloading of one model, or of all."""
        job: Job[int] = Job("unload", "admin", lambda _: self.residency.unload(model_id), self.catalogue.queue.deadline_s)
        return self.queue.submit(job)

    def _run(self, jobs: list[Job[Generation]], plans: list[Plan], path: Path) -> list[Generation]:
        """In the device's thread: make the model resident, then draw plans that are alike."""
        timings = [Timing(queue=1000 * (time.monotonic() - job.submitted)) for job in jobs]
        plan = plans[0]
        entry = self.catalogue.find(plan.model_id)
        dtype, notes = self._dtype(entry, plan)
        started = time.perf_counter()
        resident = self.residency.acquire(entry, path, dtype)

        def check() -> None:
            check_all(jobs)

        check()
        try:
            loras = self.residency.adapt(resident, plan.loras)
            for timing in timings:
                timing.load = 1000 * (time.perf_counter() - started)
            plans = [p.model_copy(update={"notes": [*p.notes, *notes]}) for p in plans]
            if entry.traits.multimodal:
                return multimodal.run(resident, plans, check, self.catalogue.models.max_batch, timings)
            return denoise.generate(resident, plans, loras, check, self.catalogue.models.max_batch, timings)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # a CPU's way to say it
                raise
            less = "fewer results or pictures at once" if entry.traits.multimodal else "a smaller size"
            detail = f"{plan.width}x{plan.height} needs more memory than {self.torch_device} has free. Ask for {less}."
            raise problems.problem(507, "out-of-memory", "Out of memory", detail) from None
        finally:
            self.residency.touch(resident)

    def _dtype(self, entry: Entry, plan: Plan) -> tuple[torch.dtype, list[str]]:
        """The precision to run in: as asked, by family on a GPU; no float16 on a CPU."""
        if self.torch_device.type == "cpu":
            chosen = "bfloat16" if plan.torch_dtype == "bfloat16" else "float32"
            asked_otherwise = plan.torch_dtype not in (None, chosen)
            notes = [f"a CPU has no fast {plan.torch_dtype}; ran in {chosen}"] if asked_otherwise else []
            return getattr(torch, chosen), notes
        return getattr(torch, plan.torch_dtype or entry.traits.gpu_dtype), []
