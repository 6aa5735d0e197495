"""service.py with a runner that hangs at the prompt "hang": `bentoml serve tests.hanging:StableDiffusion`, for tests/test_faults.py."""

from __future__ import annotations

import time
from typing import Any

from runners.diffusion import DiffusionRunner
from runners.work import Job
from service import ImageGeneration, StableDiffusion

__all__ = ["ImageGeneration", "StableDiffusion"]
_start = DiffusionRunner.start


def start(self: DiffusionRunner, *args: Any) -> None:
    _start(self, *args)
    submit, queue = self.device.submit, self.device.queue

    def hanging(plan: Any, *paths: Any) -> Any:
        return queue.submit(Job(plan.id, plan.client, lambda _: time.sleep(1e6), plan.deadline_s)) if plan.prompt == "hang" else submit(plan, *paths)

    self.device.submit = hanging  # type: ignore[method-assign]


DiffusionRunner.start = start  # type: ignore[method-assign]
