"""A1111's drawing API: /sdapi/v1/txt2img, img2img, progress, interrupt, extra-single-image, png-info and interrogate.

core.a1111 translates its requests; api.a1111_lists answers what its clients ask at start. Progress and interrupt are about what the
caller's own key is having drawn by these routes, at this entry.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from api import answering, document, reading, tasks, translated
from api.backend import Service
from api.routing import Runner
from api.tasks import Task, Uploads
from api.translated import Translated
from core import a1111, images, infotext, metadata, settings
from core.a1111 import Extras, ImageToImage, TextToImage, unpacked
from core.catalogue import Catalogue
from core.generation import Generation, Ran
from core.multimodal import CaptionRequest
from core.plans import Inputs, Plan
from core.problems import invalid_field
from core.requests import GenerationRequest
from core.status import PlanProgress
from core.upscaling import UpscaleRequest

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])
ASK_S = 3.0
A = TypeVar("A", bound=BaseModel)


@dataclass
class Work:
    """A plan that a client waits for, and what stops it."""

    plan: Plan
    began: float = field(default_factory=time.monotonic)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    runner: Runner | None = None

    async def follow(self, runner: Runner) -> None:
        """Know the worker that has the plan."""
        self.runner = runner


_in_hand: list[Work] = []


class Drawn(BaseModel):
    """`info` is a JSON object as text, with all_seeds, infotexts and, of Easel, notes."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class DrawingProgress(BaseModel):
    """How far the caller's oldest request is: from 0.01 to 1, and 0 where there is none."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class Enlarged(BaseModel):
    image: str
    html_info: str


class PngInfo(BaseModel):
    """A picture's infotext, its other texts, and the infotext's fields by A1111's keys."""

    info: str
    items: dict[str, str]
    parameters: dict[str, str]


class Interrogated(BaseModel):
    caption: str


class ImageToRead(BaseModel):
    """A picture as base64; `model` is "clip" for UniDiffuser's caption."""

    image: str
    model: str = "clip"


@router.post("/txt2img", response_model=Drawn, responses=document.works(499), openapi_extra=document.takes_json(TextToImage))
async def txt2img(request: Request) -> Response:
    """Draw pictures from a prompt."""
    asked = await _asked(TextToImage, request)
    wanted = await asyncio.to_thread(a1111.translated, asked, request.app.state.catalogue)
    return await _done(_TXT2IMG, Translated[TextToImage, GenerationRequest](asked=asked, wanted=wanted), {}, request)


@router.post("/img2img", response_model=Drawn, responses=document.works(499), openapi_extra=document.takes_json(ImageToImage))
async def img2img(request: Request) -> Response:
    """Draw pictures from a prompt and a picture, of which `mask` says what to repaint."""
    asked = await _asked(ImageToImage, request)
    uploads = await asyncio.to_thread(_uploads, asked)
    wanted = await asyncio.to_thread(_translated, asked, uploads, request.app.state.catalogue)
    kept = {} if (asked.model_extra or {}).get("include_init_images") else {"init_images": [""], "mask": None}
    return await _done(_IMG2IMG, Translated[ImageToImage, GenerationRequest](asked=asked.model_copy(update=kept), wanted=wanted), uploads, request)


@router.get("/progress")
async def progress(request: Request, skip_current_image: Annotated[bool, Query(description="true: no preview.")] = False) -> DrawingProgress:
    """How far the caller's drawing is; `current_image` is a preview as JPEG, once there is one."""
    own = _own(request)
    state: dict[str, Any] = {"skipped": False, "interrupted": False, "job": "", "job_count": len(own), "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    if not own:
        return DrawingProgress(progress=0, eta_relative=0, state=state)
    first = own[0]
    now = await _now(first, not skip_current_image)
    step, steps = (now.progress.steps_done, now.progress.steps or first.plan.steps) if now.progress else (0, first.plan.steps)
    done, passed = min(max(step / max(steps, 1), 0.01), 1), time.monotonic() - first.began
    state |= {"job": now.state, "interrupted": first.stop.is_set(), "sampling_step": step, "sampling_steps": steps}
    preview = base64.b64encode(await asyncio.to_thread(images.encode, now.preview, "jpeg", 80)).decode() if now.preview else None
    return DrawingProgress(progress=done, eta_relative=passed / done - passed, state=state, current_image=preview)


@router.post("/interrupt")
@router.post("/skip", name="skip")
async def interrupt(request: Request) -> dict[str, Any]:
    """Cancel what the caller's key is having drawn by these routes; nobody else's. Those calls answer 499."""
    for work in _own(request):
        work.stop.set()
    return {}


@router.post("/extra-single-image", response_model=Enlarged, responses=document.works(499), openapi_extra=document.takes_json(Extras))
async def extra_single_image(request: Request) -> Response:
    """Make a picture larger by an upscaler of GET /upscalers; without one, by Lanczos."""
    asked = await _asked(Extras, request)
    image = await asyncio.to_thread(unpacked, asked.image, "image")
    wanted = asked.translated()
    if asked.upscaler_1 in a1111.NO_UPSCALER:
        return Response((await asyncio.to_thread(_resized, wanted, image)).model_dump_json(), media_type="application/json")
    translated = Translated[Extras, UpscaleRequest](asked=asked.model_copy(update={"image": ""}), wanted=wanted)
    return await _done(_EXTRA, translated, {"image": [image]}, request)


def _resized(wanted: UpscaleRequest, image: bytes) -> Enlarged:
    limits = settings.load().limits
    given, scale = images.decode(image, limits), wanted.scale or 1
    width, height = wanted.width or round(given.width * scale), wanted.height or round(given.height * scale)
    if width * height > limits.upscaled_pixels:
        raise invalid_field("upscaling_resize", f"makes {width}x{height} pixels", f"at most {limits.upscaled_pixels} pixels", None)
    file = images.encode(images.resized(given, width, height), "png")
    return Enlarged(image=base64.b64encode(file).decode(), html_info="")


@router.post("/png-info", openapi_extra=document.takes_json(ImageToRead))
async def png_info(request: Request) -> PngInfo:
    """What a picture's metadata say."""
    asked = await _asked(ImageToRead, request)
    found = await asyncio.to_thread(images.describe, unpacked(asked.image, "image"), settings.load().limits)
    text = found.texts.get("parameters", "")
    said = infotext.parse(text)
    parameters = {"Prompt": said.prompt, "Negative prompt": said.negative_prompt, **said.settings} if text else {}
    return PngInfo(info=text, items={name: value for name, value in found.texts.items() if name != "parameters"}, parameters=parameters)


@router.post("/interrogate", response_model=Interrogated, responses=document.works(499), openapi_extra=document.takes_json(ImageToRead))
async def interrogate(request: Request) -> Response:
    """Say what a picture shows, by UniDiffuser."""
    asked = await _asked(ImageToRead, request)
    if asked.model != "clip":
        raise invalid_field("model", f"there is no {asked.model[:40]!r} here", ["clip"], asked.model)
    uploads = {"image": [await asyncio.to_thread(unpacked, asked.image, "image")]}
    wanted = Translated[ImageToRead, CaptionRequest](asked=asked.model_copy(update={"image": ""}), wanted=CaptionRequest())
    return await tasks.done(_INTERROGATE, wanted, uploads, request)


async def _asked(model: type[A], request: Request) -> A:
    return reading.check(model, await reading.read_json(request))


def _uploads(asked: ImageToImage) -> Uploads:
    """The files of a request."""
    image = {"image": [unpacked(asked.init_images[0], "init_images")]}
    return image if asked.mask is None else image | {"mask": [unpacked(asked.mask, "mask")]}


def _translated(asked: ImageToImage, uploads: Uploads, catalogue: Catalogue) -> GenerationRequest:
    return a1111.translated(asked, catalogue, _inputs(uploads).image if asked.resize_mode else None)


def _inputs(uploads: Uploads) -> Inputs:
    limits, masks = settings.load().limits, uploads.get("mask")
    return Inputs(image=images.decode(uploads["image"][0], limits, "init_images"), mask=images.decode_mask(masks[0], limits) if masks else None)


async def _done(task: Task[Any, Any], wanted: BaseModel, uploads: Uploads, request: Request) -> Response:
    """What was drawn, with progress that can be asked for, or a job."""
    return await tasks.done(task, wanted, uploads, request, _drawn)


async def _drawn(plan: Plan, request: Request, service: Service) -> Generation:
    with _working(plan) as work:
        return await tasks.drawn(plan, request, service, gone=work.stop, follow=work.follow)


@contextlib.contextmanager
def _working(plan: Plan) -> Iterator[Work]:
    work = Work(plan)
    _in_hand.append(work)
    try:
        yield work
    finally:
        _in_hand.remove(work)


def _own(request: Request) -> list[Work]:
    """The caller's work, the oldest first."""
    return [work for work in _in_hand if work.plan.client == request.state.caller.id]


async def _now(work: Work, preview: bool) -> PlanProgress:
    """How a plan is at its worker; of one that no worker has, or that does not answer, nothing is known."""
    with contextlib.suppress(Exception):
        if work.runner:
            return await asyncio.wait_for(work.runner.progress(work.plan.id, preview), ASK_S)
    return PlanProgress()


def _info(generation: Generation, ran: Ran, asked: TextToImage | ImageToImage) -> dict[str, Any]:
    each, seeds = [metadata.of_picture(ran, i) for i in range(len(generation.seeds))], generation.seeds
    return {
        "prompt": each[0].prompt, "all_prompts": [one.prompt for one in each], "negative_prompt": each[0].negative_prompt, "all_negative_prompts": [one.negative_prompt for one in each],
        "seed": seeds[0], "all_seeds": seeds, "subseed": seeds[0], "all_subseeds": seeds, "subseed_strength": 0, "width": ran.width, "height": ran.height,
        "sampler_name": ran.scheduler, "cfg_scale": ran.guidance_scale, "steps": ran.num_inference_steps, "batch_size": asked.batch_size, "restore_faces": False,
        "sd_model_name": ran.model_id, "sd_model_hash": ran.model_sha256[:10], "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1, "seed_resize_from_h": -1,
        "denoising_strength": ran.hires.strength if ran.hires else ran.strength, "extra_generation_params": {"Schedule type": ran.schedule} if ran.schedule else {},
        "index_of_first_image": 0, "infotexts": [metadata.parameters(one, seed) for one, seed in zip(each, seeds, strict=True)], "styles": asked.styles, "job_timestamp": "0",
        "clip_skip": ran.clip_skip + 1, "is_using_inpainting_conditioning": False, "version": f"easel {ran.libraries['easel']}", "notes": ran.notes,
    }  # fmt: skip


def _pictures_plan(wanted: GenerationRequest, uploads: Uploads, client: str) -> Plan:
    return tasks.catalogue("StableDiffusion").plan(wanted, _inputs(uploads) if uploads else None, client)


def _drawn_json(translated: Translated[Any, GenerationRequest], generation: Generation) -> Drawn:
    assert generation.ran is not None
    asked = translated.asked
    files = answering.encode_all(generation, translated.format, translated.quality, settings.load().metadata.embed) if asked.send_images else []
    parameters = asked.model_dump(exclude=None if (asked.model_extra or {}).get("include_init_images") else {"init_images", "mask"})
    return Drawn(images=[base64.b64encode(file).decode() for file in files], parameters=parameters, info=json.dumps(_info(generation, generation.ran, asked), ensure_ascii=False))


def _enlarged_json(_: Translated[Extras, UpscaleRequest], generation: Generation) -> Enlarged:
    assert generation.ran is not None
    (file,) = answering.encode_all(generation, "png", 90, settings.load().metadata.embed)
    return Enlarged(image=base64.b64encode(file).decode(), html_info=metadata.parameters(generation.ran, generation.seeds[0]))


def _interrogated_json(_: Translated[ImageToRead, CaptionRequest], generation: Generation) -> Interrogated:
    return Interrogated(caption=generation.texts[0])


_TXT2IMG = translated.task("a1111_txt2img", Translated[TextToImage, GenerationRequest], _pictures_plan, _drawn_json, names=a1111.NAMES)
_IMG2IMG = translated.task("a1111_img2img", Translated[ImageToImage, GenerationRequest], _pictures_plan, _drawn_json, {"image": 1, "mask": 1}, names=a1111.NAMES)
_EXTRA = translated.task("a1111_extra", Translated[Extras, UpscaleRequest], tasks.UPSCALE.plan, _enlarged_json, {"image": 1}, names=a1111.EXTRAS_NAMES)
_INTERROGATE = translated.task("a1111_interrogate", Translated[ImageToRead, CaptionRequest], tasks.CAPTION.plan, _interrogated_json, {"image": 1}, service="UniDiffuser", pictures=False)
