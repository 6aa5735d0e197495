"""Requests on one model that share denoising steps: the first, those that join it at a step, each told when it is done.

runners.device calls this, in the device's thread, with everything in memory that the requests' `Plan.step_key` names.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from core import metrics
from core.generation import AppliedLora, Generation, Timing
from core.plans import Plan, PlannedLora
from core.status import Progress
from runners import denoise, memory, previews
from runners.adapters import Acting
from runners.guides import Guided
from runners.memory import Way
from runners.queue import DeviceQueue
from runners.residency import Resident
from runners.safety import SafetyChecker
from runners.stepping import Run, Runs
from runners.work import Job


@dataclass
class Batch:
    """What the requests have in common.

    Args:
        resident, guided, upscaler: the model in memory, and what acts on it or is beside it.
        adapt: makes LoRAs act on the model; those of the given names stay in memory.
        way: the way to run that was chosen for the first.
        most: how many pictures fit the memory at once, of the `max_batch` that may be.
        runs: an empty one, for this batch.
        queue: where those that may join wait.
        safety: looks at their pictures before and after.
        notes: what is to be told of each.
        make_room: is told how many pictures will be drawn at once.
        before_step: is called before each.
        began: when the model was begun to be loaded (of `time.perf_counter`).
    """

    resident: Resident
    adapt: Callable[[list[PlannedLora], Set[str]], list[AppliedLora]]
    guided: Guided
    upscaler: Resident | None
    way: Way
    most: int
    max_batch: int
    runs: Runs[Generation]
    queue: DeviceQueue
    safety: SafetyChecker
    notes: list[str]
    make_room: Callable[[int], object]
    before_step: Callable[[], object] | None
    began: float
    left: dict[str, int] = field(default_factory=dict)
    short: list[Job[Generation]] = field(default_factory=list)
    acting: dict[str, Acting] = field(default_factory=dict)  # the LoRAs of each, by the jobs' ids

    def draw(self, first: Job[Generation]) -> list[Job[Generation]]:
        """Until all that joined are told, but those that memory was too short for: they are returned."""
        assert first.share is not None
        self.runs.before = lambda jobs: self.resident.adapters.act_by_row([self.acting[job.id] for job in jobs])
        self._begin(first, load=1000 * (time.perf_counter() - self.began))
        while self.runs.running:
            # Others join as many as it is worth; the pictures of one request are drawn together as far as they fit.
            for job in self.queue.join(first.share.key, self.runs.pace.worth(self._fitting), self.runs.pictures, max(self.left.values()), self._fit):
                self._begin(job)
            if self.before_step:
                self.before_step()
            self._end(self.runs.step())
        return self.short

    @property
    def _fitting(self) -> int:
        """How many pictures fit the memory at once."""
        return min(self.most, self.runs.most_pictures or self.most)

    def _fit(self, plans: list[Plan]) -> bool:
        """Whether the plans' LoRAs fit the memory beside those of what is being drawn."""
        return self.resident.adapters.fit([lora for plan in (*plans, *(run.name.share.work for run in self.runs.running)) for lora in plan.loras])

    def _begin(self, job: Job[Generation], load: float = 0) -> None:
        assert job.share is not None
        plan: Plan = job.share.work
        plan = plan.model_copy(update={"notes": [*plan.notes, *self.notes]})
        at_once = min(plan.rows, self._fitting)
        timing = Timing(queue=1000 * ((job.started or job.submitted) - job.submitted), load=load)
        model = metrics.model(self.resident.entry)
        steps, done = plan.steps * math.ceil(plan.rows / at_once), itertools.count(1)

        def check(stepped: int = 0, latents: Tensor | None = None) -> None:
            if stepped:
                metrics.STEPS.labels(metrics.here(), model).inc()
                job.progress = Progress(model_id=plan.model_id, steps_done=next(done), steps=steps)
                self.left[job.id] -= 1
                previews.show(job, plan, self.resident, latents, job.progress.steps_done)
            job.check()

        def work() -> Generation:
            check()
            if problem := self.safety.refusal(plan):
                return Generation(problem=problem.details)
            self.make_room(self.runs.pictures + at_once)
            began = time.perf_counter()
            loras = self.adapt(plan.loras, {id for acting in self.acting.values() for id, _ in acting})
            timing.load += 1000 * (time.perf_counter() - began)
            self.acting[job.id] = self.resident.adapters.acting
            return denoise.generate(self.resident, [plan], loras, self.guided, check, at_once, [timing], self.upscaler)[0]

        self.left[job.id] = steps
        self._end(self.runs.start(job, partial(job.context.copy().run, work), at_once))
        self.runs.running.sort(key=lambda run: self.acting[run.name.id])  # rows that a LoRA acts on are neighbours

    def _end(self, ended: Iterable[Run[Generation]]) -> None:
        for run in ended:
            job: Job[Generation] = run.name
            del self.left[job.id]
            self.acting.pop(job.id, None)
            if run.error is not None and memory.out_of_memory(run.error):
                self.short.append(job)
            else:
                self.queue.settle(job, partial(self._outcome, run))

    def _outcome(self, run: Run[Generation]) -> Generation:
        """What came of a run, looked at; raises what it raised."""
        if run.error is not None:
            raise run.error
        generation, plan = run.outcome, run.name.share.work
        assert generation is not None
        if generation.ran:
            generation.ran.degraded = replace(self.way, rows=self._fitting).told(min(plan.rows, self.max_batch))
        return self.safety.censor(generation)
