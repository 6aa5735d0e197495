"""The safety checker: every picture that goes into a model or comes out of one is looked at, and every text that comes
out is read, by what configuration.yaml says under `safety`; no request can ask for less.

runners.device has it look at a plan's pictures before they are used, and at a generation's before anyone
sees them, so that no route passes it by. What cannot be looked at is not given out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from core import metrics, problems, settings
from core.blocklist import Blocklist
from core.generation import Generation
from core.images import to_pil
from core.plans import Pixels, Plan
from core.problems import Problem, problem

log = logging.getLogger("easel.safety")
# Which of some pictures (RGB, any size) are flagged.
Detector = Callable[[list[Image.Image]], list[bool]]
_HUB = "CompVis/stable-diffusion-safety-checker"
WITHHELD = "[withheld]"  # in the place of a text with words of the blocklist
_MOSAIC = 12  # a blurred picture has so many colours along its longer side: no filter brings back the rest


class SafetyChecker:
    """The checker by its settings; off, it lets every picture pass and loads nothing. Texts are read in any mode."""

    def __init__(self, configured: settings.Safety, device: torch.device) -> None:
        self.settings, self._device = configured, device
        self._words = Blocklist.configured(configured)
        self._lock = threading.Lock()
        self._detector: Detector | None = None

    def load(self) -> None:
        """Make the detector ready (any thread; fetches its weights where they are on the hub).

        Raises:
            Problem: 503 where it cannot be had: nothing is drawn without it.
        """
        with self._lock:
            if self._detector or self.settings.mode == "off":
                return
            try:
                self._detector = _nudenet(self.settings) if self.settings.detector == "nudenet" else _stable_diffusion(self.settings, self._device)
            except Exception as error:
                log.exception("the safety checker cannot be loaded")
                raise problems.unavailable("The safety checker cannot be loaded, and nothing is drawn without it; the server's log has the cause.", slug="safety-checker") from error

    def refusal(self, plan: Plan) -> Problem | None:
        """What stands in the way of a plan: the 422 that names its flagged input picture."""
        if self.settings.mode == "off":
            return None
        named = list(_pictures("image", plan))
        for (name, _), flagged in zip(named, self._look([pixels for _, pixels in named]), strict=True):
            if flagged:
                metrics.FLAGGED.labels("input").inc()
                field = name.removesuffix("s")  # a form's parts are named for one picture
                details = problem(
                    422, "image-flagged", "Picture flagged", f"{field}: the safety checker flags this picture.",
                    errors=[problems.FieldError(field=field, message="is flagged by the safety checker", allowed="another picture")],
                )  # fmt: skip
                return details
        return None

    def censor(self, generation: Generation) -> Generation:
        """The generation with every flagged picture and every text with words of the blocklist replaced, and said so in `ran`."""
        return self._seen(self._read(generation))

    def _read(self, generation: Generation) -> Generation:
        stopped = [self._words.stops(text) for text in generation.texts]
        if not any(stopped):
            return generation
        assert generation.ran is not None
        metrics.WITHHELD.inc(sum(stopped))
        notes = [*generation.ran.notes, f"{sum(stopped)} of {len(stopped)} texts had words that are not allowed here, and were withheld"]
        texts = [WITHHELD if stops else text for text, stops in zip(generation.texts, stopped, strict=True)]
        return generation.model_copy(update={"texts": texts, "ran": generation.ran.model_copy(update={"notes": notes})})

    def _seen(self, generation: Generation) -> Generation:
        ran, pictures = generation.ran, generation.pictures
        if self.settings.mode == "off" or generation.problem:
            return generation
        assert ran is not None
        began = time.perf_counter()
        flags = self._look(pictures)
        metrics.FLAGGED.labels("output").inc(sum(flags))
        of = generation.seeds or list(range(len(pictures)))  # fewer than pictures where those are frames
        seeds = [of[i * len(of) // len(pictures)] for i, flagged in enumerate(flags) if flagged]
        done = "blurred" if self.settings.mode == "blur" else "blanked"
        ran = ran.model_copy(
            update={
                "flagged": list(dict.fromkeys(seeds)),
                "notes": [*ran.notes, f"{sum(flags)} of {len(flags)} pictures flagged by the safety checker and {done}"] if seeds else ran.notes,
                "timing": ran.timing.model_copy(update={"safety": 1000 * (time.perf_counter() - began)}),
            }
        )
        kept = [self._replaced(p) if flagged else p for p, flagged in zip(pictures, flags, strict=True)]
        return generation.model_copy(update={"pictures": kept, "ran": ran})

    def _look(self, pictures: list[Pixels]) -> list[bool]:
        if not pictures:
            return []
        self.load()
        assert self._detector
        return self._detector([to_pil(pixels) for pixels in pictures])

    def _replaced(self, pixels: Pixels) -> Pixels:
        size = (pixels.width, pixels.height)
        picture = Image.new("RGB", size)
        if self.settings.mode == "blur":
            scale = _MOSAIC / max(size)
            coarse = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
            picture = to_pil(pixels).resize(coarse, Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
        return Pixels(width=pixels.width, height=pixels.height, data=picture.tobytes())


def _pictures(name: str, value: object) -> Iterator[tuple[str, Pixels]]:
    """Every picture in a plan, whatever field it is in, with the field's name."""
    if isinstance(value, Pixels):
        yield name, value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _pictures(field, getattr(value, field))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pictures(name, item)


def _nudenet(configured: settings.Safety) -> Detector:
    """NudeNet 3 (YOLOv8n, its weights in its package), on the CPU: flagged is what has a detection of one of
    `categories` with a score of at least `threshold`."""
    from nudenet import NudeDetector

    detector = NudeDetector()

    def look(pictures: list[Image.Image]) -> list[bool]:
        # As OpenCV reads a file: blue first.
        found = [detector.detect(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])) for picture in pictures]
        return [any(d["class"] in configured.categories and d["score"] >= configured.threshold for d in detections) for detections in found]

    return look


def _stable_diffusion(configured: settings.Safety, device: torch.device) -> Detector:
    """diffusers' checker for Stable Diffusion (CLIP embeddings near to those of 17 concepts, thresholds in its
    weights; Rando et al. 2022, https://arxiv.org/abs/2210.04610). `source`: a folder or hub id with the
    checker itself, or a folder of a pipeline that has one."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    source = str(settings.beside_configuration(Path(configured.source)) if configured.source and _is_path(configured.source) else configured.source or _HUB)
    whole = (Path(source) / "safety_checker").is_dir()
    token = settings.secrets().hf_token.get_secret_value() or None
    model = StableDiffusionSafetyChecker.from_pretrained(source, subfolder="safety_checker" if whole else "", use_safetensors=True, token=token)
    processor = CLIPImageProcessorPil.from_pretrained(source, subfolder="feature_extractor" if whole else "", token=token)
    model = model.to(device, torch.float16 if device.type == "cuda" else torch.float32).eval()

    def look(pictures: list[Image.Image]) -> list[bool]:
        flagged: list[bool] = []
        for picture in pictures:
            inputs = processor(picture, return_tensors="pt").pixel_values.to(device, model.dtype)
            flagged += model(clip_input=inputs, images=[np.zeros(1)])[1]
        return flagged

    return look


def _is_path(source: str) -> bool:
    return settings.beside_configuration(Path(source)).exists()
