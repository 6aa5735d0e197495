"""A runner: plans in, pictures (texts, embeddings) out, as a BentoML service's internal methods.

service.py makes the Stable Diffusion and the UniDiffuser service of this class. api.gate answers 404 for its routes on any public
listener. The entry process imports this module too, so torch is imported in `start` only.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import bentoml

from core import logs, metrics, problems, tracing, upscaling
from core.catalogue import Catalogue
from core.draining import Draining
from core.generation import Generation
from core.model_settings import Models
from core.plans import Pixels, Plan
from core.requests import GenerationRequest
from core.settings import Settings
from core.status import PlanProgress, RunnerStatus
from core.upscaling import UpscaleRequest
from runners import watchdog
from runners.sharing import InHand

if TYPE_CHECKING:
    from runners.device import Device

log = logging.getLogger("easel.runner")
WATCH_S = 3.0
LOCAL_S = 1.0  # within which files that are here already are had, however short the deadline
_WARM_UP = GenerationRequest(prompt="warm-up", num_inference_steps=1, seed=0)


class DiffusionRunner:
    """The methods that the entry calls."""

    def start(self, name: str, settings: Settings, models: Models, draining: Draining) -> None:
        """Take the device. `name` is the service's."""
        from runners.device import Device

        self.name, self.draining = name, draining
        self.catalogue = Catalogue(settings, models)
        self.device: Device = Device(settings, self.catalogue)
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._preparing: dict[str, asyncio.Task[dict[str, Path]]] = {}
        self._in_hand = InHand(self.device.queue.cancel, self.device.queue.per_key)
        self._cold = set(models.warm_up)

    @bentoml.on_startup
    async def begin(self) -> None:
        """Heed signals, and begin warming up; readiness waits for it."""
        self.draining.install()
        gc.freeze()  # what was imported stays: looking through it took most of the time of unloading a model
        metrics.begin()
        self._watching = asyncio.create_task(watchdog.watch(self.device.queue, self.catalogue.queue.hang_timeout_s))
        self._warming = [asyncio.create_task(self._warm(model_id)) for model_id in sorted(self._cold)]

    @bentoml.on_shutdown
    def end(self) -> None:
        self.device.queue.close()

    @bentoml.api(route="/internal/run")
    async def run(self, plan: Plan) -> Generation:
        """Do what a plan says; a problem comes back as data, so that it keeps its shape."""
        logs.request_id.set(plan.request_id)
        logs.of_job(plan.job_id)
        with self.draining.holding(partial(self._stop, plan.id)):
            generation = await self._done(plan)
        if generation.problem and self.draining.over:
            generation = Generation(problem=self.draining.refuse().details)
        metrics.done(generation, plan.model_id if plan.model_id in self.catalogue.entries else metrics.UNLISTED)
        log.info("failed" if generation.problem else "done", extra={**logs.of_plan(plan), **_told(generation)})
        return generation

    async def _done(self, plan: Plan) -> Generation:
        try:
            began = time.monotonic()
            paths = await self._prepared(plan)
            if (waited := time.monotonic() - began) >= plan.deadline_s:
                raise problems.deadline_passed(plan.deadline_s)
            submitted = time.time_ns()
            generation = await self._in_hand.done(plan, lambda plan: self.device.submit(plan, paths[plan.model_id], paths), waited)
            if generation.ran:
                tracing.stages(generation.ran.timing, submitted)
            return generation
        except problems.Problem as problem:
            return Generation(problem=problem.details)
        except TimeoutError:
            detail = f"{plan.model_id} is still being downloaded. GET /buffer_status shows its state."
            return Generation(problem=problems.unavailable(detail, retry_after=60, slug="model-downloading").details)
        except Exception:
            log.exception("generation %s failed", plan.id)
            detail = "The generation failed on the device; the server's log has the cause."
            return Generation(problem=problems.problem(500, "generation-failed", "Generation failed", detail).details)

    @bentoml.api(route="/internal/cancel")
    async def cancel(self, plan_id: str) -> bool:
        """Stop a plan, waiting (for its model's files or its turn) or at its next step; False where it is unknown or done."""
        return self._stop(plan_id)

    def _stop(self, plan_id: str) -> bool:
        if waiting := self._preparing.get(plan_id):
            return waiting.cancel()
        return self._in_hand.leave(plan_id)

    @bentoml.api(route="/internal/progress")
    async def progress(self, plan_id: str, preview: bool) -> PlanProgress:
        """How a plan is here; with `preview`, what it looks like so far is made for some seconds."""
        return self.device.queue.progress(self._in_hand.job_of(plan_id), WATCH_S if preview else 0)

    @bentoml.api(route="/internal/unload")
    async def unload(self, model_id: str) -> int:
        """Unload a model, or all for an empty id, after the work in hand; the number unloaded."""
        return await asyncio.wrap_future(self.device.unload(model_id or None))

    @bentoml.api(route="/internal/status")
    async def status(self) -> RunnerStatus:
        """How this runner is."""
        residency = self.device.residency
        status = RunnerStatus(
            service=self.name,
            pid=os.getpid(),
            ready=not self._cold and not self.draining.active,
            draining=self.draining.active,
            device=str(self.device.torch_device),
            memory_budget_bytes=residency.budget,
            resident_bytes=residency.resident_bytes,
            models=residency.snapshot(list(self.catalogue.entries.values())),
            queue=self.device.queue.status(),
        )
        metrics.show(status, set(self.catalogue.entries))
        return status

    async def _prepared(self, plan: Plan) -> dict[str, Path]:
        """The local paths of a plan's models, by id; its ControlNets and IP-Adapter are local too.

        Raises:
            Problem: what stands in the way; 499 where the plan is cancelled meanwhile.
            TimeoutError: at the plan's deadline, where they are being downloaded.
        """
        waiting = asyncio.create_task(self._all_local(plan))
        self._preparing[plan.id] = waiting
        try:
            done, _ = await asyncio.wait([waiting], timeout=max(plan.deadline_s, LOCAL_S))
            if not done:
                waiting.cancel()
                raise TimeoutError
            if waiting.cancelled():
                raise problems.cancelled()
            return waiting.result()
        finally:
            del self._preparing[plan.id]

    async def _all_local(self, plan: Plan) -> dict[str, Path]:
        fetches = {id: partial(self.device.fetch, self.catalogue.find(id)) for id in plan.models}
        if plan.animation:
            fetches[plan.animation.motion_adapter] = partial(self.device.fetch_motion, plan)
        paths = await asyncio.gather(*(self._local(id, fetch) for id, fetch in fetches.items()))
        if plan.controls or plan.ip_adapter:
            await asyncio.to_thread(self.device.fetch_guides, plan)
        return dict(zip(fetches, paths, strict=True))

    async def _local(self, id: str, fetch: Callable[[], Path]) -> Path:
        """The local path of what has an id; fetched once, however many ask, and without holding the device."""
        task = self._fetching.get(id)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(fetch))
            self._fetching[id] = task
            task.add_done_callback(lambda _: self._fetching.pop(id, None))
        return await asyncio.shield(task)

    def _warm_up_plan(self, model_id: str) -> Plan:
        entry = self.catalogue.find(model_id)
        if entry.traits.upscaler:
            wanted = UpscaleRequest(model_id=model_id, num_inference_steps=1 if entry.steps else None)
            return upscaling.plan(self.catalogue, wanted, Pixels(width=8, height=8, data=bytes(192)), "warm-up")
        return self.catalogue.plan(_WARM_UP.model_copy(update={"model_id": model_id}), None, "warm-up")

    async def _warm(self, model_id: str) -> None:
        """Load a model and draw one step; a failure is logged, and readiness does not wait for it."""
        try:
            plan = self._warm_up_plan(model_id)
            outcome: Generation = await cast(Any, self.run).local(plan)  # in this process: else BentoML goes by HTTP
            if outcome.problem:
                log.error("warm-up of %s failed: %s", model_id, outcome.problem.detail)
        finally:
            self._cold.discard(model_id)


def _told(generation: Generation) -> dict[str, object]:
    """What a line tells of what came of a plan: nothing that a caller wrote."""
    if generation.problem:
        return {"problem": metrics.kind(generation.problem.type)}
    made = {"pictures": len(generation.pictures), "texts": len(generation.texts), "embeddings": len(generation.embeddings)}
    stages = {f"{stage}_ms": round(ms, 1) for stage, ms in generation.ran.timing.model_dump().items() if ms} if generation.ran else {}
    return {**{what: count for what, count in made.items() if count}, **stages}
