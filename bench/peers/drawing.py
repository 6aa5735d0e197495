"""What a user of diffusers writes to draw with several models and LoRAs: the body that the raw loop and two peers share.

It runs in the peers' environments, with diffusers alone. Everything is loaded once. LoRAs are on a second copy of their
model, so that pictures without them do not pay for peft's layers.
"""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

Wanted = dict[str, Any]  # the fields of bench.scenarios.Picture, `image` in base64


class Drawing:
    """Args:
    folders: of the models, by id.
    loras: files of LoRAs for the first of them, by name.
    """

    def __init__(self, folders: dict[str, str], loras: dict[str, str]) -> None:
        self._pipes = {(model, False): _load(folder) for model, folder in folders.items()}
        first = next(iter(folders))
        self._pipes[first, True] = with_loras = _load(folders[first])
        for name, path in loras.items():
            with_loras.load_lora_weights(os.path.dirname(path), weight_name=os.path.basename(path), adapter_name=name)
        self._redrawing = {key: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False) for key, pipe in self._pipes.items()}
        for pipe in self._redrawing.values():
            pipe.set_progress_bar_config(disable=True)
        self._own = {key: pipe.scheduler for key, pipe in self._pipes.items()}

    @classmethod
    def configured(cls) -> Drawing:
        """Of what the benchmark says in the environment."""
        return cls(**json.loads(os.environ["BENCH_MODELS"]))

    def draw(self, wanted: list[Wanted]) -> list[Image.Image]:
        """Pictures that are `alike`, as one batch."""
        first = wanted[0]
        key = first["model"], first["lora"] is not None
        pipe = self._redrawing[key] if first["image"] else self._pipes[key]
        if first["lora"]:
            pipe.set_adapters([first["lora"]])
        own = self._own[key]
        pipe.scheduler = getattr(diffusers, first["scheduler"]).from_config(own.config) if first["scheduler"] else own
        more: dict[str, Any] = {}
        if first["image"]:
            more = {"image": [opened(one["image"]) for one in wanted], "strength": first["strength"]}
        else:
            more = {"width": first["size"], "height": first["size"]}
        images: list[Image.Image] = pipe(
            [one["prompt"] for one in wanted], num_inference_steps=first["steps"], guidance_scale=first["guidance"],
            generator=[torch.Generator("cpu").manual_seed(one["seed"]) for one in wanted], **more,
        ).images  # fmt: skip
        return images


def alike(one: Wanted) -> str:
    """Equal for pictures that can be drawn as one batch: they differ in prompt, seed and input picture alone."""
    own = {"prompt": None, "seed": None, "image": one["image"] is not None}
    return json.dumps(one | own, sort_keys=True)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=4)  # Easel's level
    return out.getvalue()


def opened(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")


def _load(folder: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
