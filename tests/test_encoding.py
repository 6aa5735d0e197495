"""Pictures are encoded beside the event loop and beside the device, and nothing of them is lost."""

from __future__ import annotations

import asyncio
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from api import tasks
from core import images
from core.catalogue import Catalogue
from core.model_settings import Model, Models
from core.plans import Pixels
from core.requests import GenerationRequest
from core.settings import Settings
from runners.device import Device


def test_a_picture_is_encoded_while_the_event_loop_and_the_device_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder waits until another picture has been drawn: it would wait for ever in the loop's thread or in the device's."""
    settings = Settings(models=Models(default="starter", catalogue=[Model(id="starter", family="starter", source="starter/stable-diffusion")], cpu_threads=1))
    device = Device(settings, Catalogue(settings))
    next_is_drawn, threads, plainly = threading.Event(), [], images.encode

    def encode(*args: object) -> bytes:
        threads.append(threading.current_thread())
        assert next_is_drawn.wait(60)
        return plainly(*args)

    monkeypatch.setattr(images, "encode", encode)
    request = GenerationRequest(prompt="red apple", negative_prompt="größe 大", seed=1, num_inference_steps=1)

    def draw(seed: int) -> asyncio.Future:
        plan = device.catalogue.plan(request.model_copy(update={"seed": seed}), None, "test")
        return asyncio.wrap_future(device.submit(plan, device.fetch(device.catalogue.find("starter"))))

    async def work() -> bytes:
        first = await draw(1)
        answer = asyncio.create_task(tasks.answered(tasks.GENERATE, request, first, "image/png"))
        while not threads:
            await asyncio.sleep(0.005)
        await draw(2)
        assert not answer.done()
        next_is_drawn.set()
        return (await answer).body

    try:
        body = asyncio.run(asyncio.wait_for(work(), 120))
    finally:
        device.queue.close()
        torch.set_num_threads(2)
    assert threads[0] not in (threading.main_thread(), device.queue._thread)
    picture = Image.open(io.BytesIO(body))
    assert picture.text["parameters"].startswith("red apple\nNegative prompt: größe 大\nSteps: 1")
    assert json.loads(picture.text["easel"])["negative_prompt"] == "größe 大"


@pytest.mark.parametrize("side", [1, 64, 333])
def test_png_gives_every_pixel_back(side: int) -> None:
    data = np.random.default_rng(side).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
    file = images.encode(Pixels(width=2 * side, height=side, data=data.tobytes()), "png", texts={"parameters": "x" * 5000})
    picture = Image.open(io.BytesIO(file))
    assert np.array_equal(np.asarray(picture), data)
    assert picture.text["parameters"] == "x" * 5000
