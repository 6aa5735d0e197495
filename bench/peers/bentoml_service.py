"""BentoML's own published way to serve diffusers: a service that loads a pipeline and has a synchronous API for each task."""

from __future__ import annotations

import base64
import io

import bentoml
from drawing import Drawing
from PIL import Image


@bentoml.service(traffic={"timeout": 600})
class Txt2Img:
    def __init__(self) -> None:
        self.drawing = Drawing.configured()

    @bentoml.api
    def txt2img(self, prompt: str, model: str, size: int, num_inference_steps: int, guidance_scale: float, seed: int, scheduler: str = "", lora: str = "") -> Image.Image:
        return self._draw(prompt, model, size, num_inference_steps, guidance_scale, seed, scheduler, lora)

    @bentoml.api
    def img2img(
        self, image: Image.Image, prompt: str, model: str, size: int, num_inference_steps: int, guidance_scale: float, seed: int, strength: float, scheduler: str = "", lora: str = ""
    ) -> Image.Image:
        given = io.BytesIO()
        image.save(given, "PNG")
        return self._draw(prompt, model, size, num_inference_steps, guidance_scale, seed, scheduler, lora, base64.b64encode(given.getvalue()).decode(), strength)

    def _draw(
        self, prompt: str, model: str, size: int, steps: int, guidance: float, seed: int, scheduler: str, lora: str, image: str | None = None, strength: float = 0
    ) -> Image.Image:
        wanted = {
            "prompt": prompt, "model": model, "size": size, "steps": steps, "guidance": guidance, "seed": seed,
            "scheduler": scheduler or None, "lora": lora or None, "image": image, "strength": strength,
        }  # fmt: skip
        return self.drawing.draw([wanted])[0]
