"""The generation tasks: how the request of each is read, planned, run and answered.

Every route that has something made goes through here, whether its client waits for the answer (`respond`, `typed`) or
leaves a job behind (`Prefer: respond-async`, and api.jobs).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from api import answering, backend, embedding, quotas, reading, usage
from api.answering import CaptionResponse, GenerationResponse, JointResponse, TextsResponse
from api.backend import Follow, Service
from api.embedding import EmbedResponse
from core import animation, images, multimodal, plans, settings, upscaling
from core.animation import AnimationRequest
from core.catalogue import Catalogue
from core.generation import Generation
from core.multimodal import (
    CaptionRequest,
    EmbedRequest,
    JointRequest,
    PicturesRequest,
    PromptToImageRequest,
    TextsRequest,
    TextVariationRequest,
)
from core.plans import Pixels, Plan
from core.problems import invalid_field
from core.requests import GenerationRequest, Sampling
from core.upscaling import UpscaleRequest

R = TypeVar("R", bound=BaseModel)
A = TypeVar("A")
Uploads = dict[str, list[bytes]]
Draw = Callable[[Plan, Request, Service], Awaitable[Generation]]
JSON, TEXT = "application/json", "text/plain"
MANY = 0  # of a part: as many as limits.images
_NPY = ("application/x-npy", "application/octet-stream")


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """A kind of generation.

    Args:
        name: by which POST /jobs knows it.
        model: its request.
        plan: the plan of a request with its uploads, for a client (a hash of the key). It decodes: for a worker thread.
        negotiate: the media type of the answer by Accept; raises the 406.
        answer: by Accept, what its route answers. It encodes: for a worker thread.
        made: the answer as the typed APIs give it.
        parts: the files it takes, and how many of each.
        accept: what is answered to those who accept anything.
        pictures: whether pictures come of it, each of which can be had alone.
    """

    name: str
    model: type[R]
    plan: Callable[[R, Uploads, str], Plan]
    negotiate: Callable[[R, str], str]
    answer: Callable[[R, Generation, str], Response]
    made: Callable[[R, Generation], A]
    parts: Mapping[str, int] = field(default_factory=dict)
    accept: str = "*/*"
    service: Service = "StableDiffusion"
    pictures: bool = True

    def accepted(self, header: str | None) -> str:
        """What an Accept header means here."""
        return self.accept if not header or header.strip() == "*/*" else header


@lru_cache(maxsize=2)
def catalogue(service: Service) -> Catalogue:
    """A runner's models, in this process."""
    configured = settings.load()
    return Catalogue(configured, configured.unidiffuser if service == "UniDiffuser" else configured.models)


# The way of a request.


async def respond(task: Task[Any, Any], request: Request) -> Response:
    """What a route answers: what was made, by Accept, once it is there; or at once a job, where the client prefers that.

    Raises:
        Problem: what is wrong with the request, before any work; what stood in the way of it.
    """
    return await done(task, *await read(task, request), request)


async def done(task: Task[R, Any], wanted: R, uploads: Uploads, request: Request, draw: Draw | None = None) -> Response:
    """As `respond`, of what has been read. `draw`: instead of `drawn`."""
    reading.idempotency_key(request)  # refused where it is wrong, though without a job nothing is known by it
    if reading.prefers_async(request):
        return cast(Response, await request.app.state.submit(task, wanted, uploads, request))
    accept = task.accepted(request.headers.get("accept"))
    task.negotiate(wanted, accept)  # an answer that cannot be had is refused before the work
    plan = await asyncio.to_thread(task.plan, wanted, uploads, request.state.caller.id)
    return await answered(task, wanted, await (draw or drawn)(plan, request, task.service), accept)


async def typed(task: Task[R, A], request: Request) -> A:
    """As `respond`, for the routes of the typed APIs, whose answer is JSON whatever their clients accept."""
    wanted, uploads = await read(task, request)
    reading.idempotency_key(request)
    if reading.prefers_async(request):
        return cast(A, await request.app.state.submit(task, wanted, uploads, request))  # FastAPI sends a Response as it is
    return await asyncio.to_thread(task.made, wanted, await made(task, wanted, uploads, request))


async def in_process(task: Task[R, A], values: dict[str, Any]) -> A:
    """As `typed`, for a call within this process: plain values, and the paths of files."""
    given = {name: paths if isinstance(paths, list) else [paths] for name, paths in values.items() if name in task.parts}
    wanted = reading.check(task.model, {name: value for name, value in values.items() if name not in given})
    uploads = {name: [Path(path).read_bytes() for path in paths] for name, paths in given.items()}
    return await asyncio.to_thread(task.made, wanted, await made(task, wanted, uploads, None))


async def read(task: Task[R, Any], request: Request) -> tuple[R, Uploads]:
    """The checked request and its files; raises as `reading.read_as`."""
    most = settings.load().limits.images
    return await reading.read_as(task.model, request, {name: count or most for name, count in task.parts.items()})


async def made(task: Task[R, Any], wanted: R, uploads: Uploads, request: Request | None) -> Generation:
    """What comes of a request, as long as its client waits for it."""
    plan = await asyncio.to_thread(task.plan, wanted, uploads, request.state.caller.id if request else "in-process")
    return await drawn(plan, request, task.service)


async def answered(task: Task[R, Any], wanted: R, generation: Generation, accept: str) -> Response:
    """The answer that `accept` asks for."""
    return await asyncio.to_thread(task.answer, wanted, generation, accept)


async def drawn(plan: Plan, request: Request | None, service: Service = "StableDiffusion", *, gone: asyncio.Event | None = None, follow: Follow | None = None) -> Generation:
    """What comes of a plan, as long as the client waits for it, put down in the usage log; takes and raises what
    `backend.generate` does, and as `Quotas.place`."""
    async with quotas.of_process().place(plan):
        generation = await backend.generate(plan, request, service, gone=gone, follow=follow)
        await usage.record(plan, generation)
    return generation


# What plans them.


def _pictures_plan(wanted: GenerationRequest, uploads: Uploads, client: str) -> Plan:
    return catalogue("StableDiffusion").plan(wanted, reading.pictures(uploads, settings.load().limits), client)


def _img2img_plan(wanted: GenerationRequest, uploads: Uploads, client: str) -> Plan:
    _one(uploads)
    return _pictures_plan(wanted, uploads, client)


def _painted_plan(wanted: GenerationRequest, uploads: Uploads, client: str) -> Plan:
    return catalogue("StableDiffusion").plan(wanted, reading.painted(wanted, uploads, settings.load().limits), client)


def _upscale_plan(wanted: UpscaleRequest, uploads: Uploads, client: str) -> Plan:
    return upscaling.plan(catalogue("StableDiffusion"), wanted, images.decode(_one(uploads), settings.load().limits), client)


def _animation_plan(wanted: AnimationRequest, _: Uploads, client: str) -> Plan:
    return animation.plan(catalogue("StableDiffusion"), wanted, client)


def _multimodal_plan(task: plans.Task, wanted: Sampling | EmbedRequest, uploads: Uploads, client: str) -> Plan:
    return multimodal.plan(catalogue("UniDiffuser"), task, wanted, _squares(wanted, uploads), client)


def _of_pictures_plan(task: plans.Task, wanted: Sampling | EmbedRequest, uploads: Uploads, client: str) -> Plan:
    if not uploads.get("image"):
        most = settings.load().limits.images
        raise invalid_field("image", "is missing", f"1 to {most} multipart file parts")
    return _multimodal_plan(task, wanted, uploads, client)


def _variation_plan(wanted: JointRequest, uploads: Uploads, client: str) -> Plan:
    _one(uploads)
    return _multimodal_plan("image_variation", wanted, uploads, client)


def _squares(wanted: Sampling | EmbedRequest, uploads: Uploads) -> list[Pixels]:
    """Safe pictures of the model's size, one after another, so that a large one is not held any longer."""
    size = catalogue("UniDiffuser").find(wanted.model_id).size
    # The middle square is what UniDiffuser looks at, as its authors crop it.
    return [images.resized(images.decode(data, settings.load().limits), size, size) for data in uploads.get("image", [])]


def _one(uploads: Uploads) -> bytes:
    if not (files := uploads.get("image")):
        raise invalid_field("image", "is missing", "a multipart file part")
    return files[0]


# What answers them.


def _embed() -> bool:
    """Whether pictures carry metadata."""
    return settings.load().metadata.embed


def _picture_type(wanted: Any, accept: str) -> str:
    return answering.choose(accept, wanted)[0]


def _picture_answer(wanted: Any, generation: Generation, accept: str) -> Response:
    return answering.answer(generation, wanted, accept, _embed())


def _picture_json(wanted: Any, generation: Generation) -> GenerationResponse:
    return answering.as_json(generation, wanted, _embed())


def _joint_json(wanted: JointRequest, generation: Generation) -> JointResponse:
    return JointResponse(**dict(_picture_json(wanted, generation)), texts=generation.texts)


def _animation_answer(wanted: AnimationRequest, generation: Generation, accept: str) -> Response:
    media_type, started = _animation_type(wanted, accept), time.perf_counter()
    format = animation.FORMATS[media_type]
    body = answering.animation_file(generation, wanted, format, _embed())
    assert generation.ran is not None
    generation.ran.timing.encode = 1000 * (time.perf_counter() - started)
    disposition = {"Content-Disposition": f'inline; filename="easel-{generation.seeds[0]}.{format}"'}
    return Response(body, media_type=media_type, headers=answering.describe(generation.ran, generation.seeds) | disposition)


def _animation_type(wanted: AnimationRequest, accept: str) -> str:
    own = animation.MEDIA_TYPES[wanted.format]
    others = [] if "format" in wanted.model_fields_set else [kind for kind in animation.FORMATS if kind != own]
    return answering.negotiate(accept, [own, *others])


def _animation_made(wanted: AnimationRequest, generation: Generation) -> bytes:
    return answering.animation_file(generation, wanted, wanted.format, _embed())


def _upscaled(_: UpscaleRequest, generation: Generation) -> Any:
    return images.to_pil(generation.pictures[0])


def _captions_answer(offers: list[str], _: CaptionRequest, generation: Generation, accept: str) -> Response:
    response = answering.captions(generation)
    plain = answering.negotiate(accept, offers) == TEXT
    body = "\n".join(generation.texts) if plain else response.model_dump_json()
    return Response(body, media_type=TEXT if plain else JSON, headers=answering.describe(response.ran, response.seeds))


def _captions_json(_: CaptionRequest, generation: Generation) -> CaptionResponse:
    return answering.captions(generation)


def _texts_json(_: TextsRequest, generation: Generation) -> TextsResponse:
    return answering.texts(generation)


def _embeddings_answer(wanted: EmbedRequest, generation: Generation, accept: str) -> Response:
    media_type = answering.negotiate(accept, [JSON, *_NPY])
    body = (embedding.seed_json if media_type == JSON else embedding.npy)(generation, wanted)
    assert generation.ran is not None
    return Response(body, media_type=media_type, headers=answering.describe(generation.ran, []))


def _embeddings_json(wanted: EmbedRequest, generation: Generation) -> EmbedResponse:
    return embedding.answer(generation, wanted)


def _offered(offers: list[str], _: Any, accept: str) -> str:
    return answering.negotiate(accept, offers)


def _json_only(name: str, model: type[R], plan: Callable[[R, Uploads, str], Plan], made: Callable[[R, Generation], A], parts: Mapping[str, int] | None = None, pictures: bool = True) -> Task[R, A]:
    """A task of UniDiffuser's whose answer is JSON."""

    def answer(wanted: R, generation: Generation, _: str) -> Response:
        assert generation.ran is not None
        return Response(cast(BaseModel, made(wanted, generation)).model_dump_json(), media_type=JSON, headers=answering.describe(generation.ran, generation.seeds))

    return Task(name, model, plan, partial(_offered, [JSON]), answer, made, parts or {}, service="UniDiffuser", pictures=pictures)


# All of them.

_IMAGES = {"image": MANY}
GENERATE = Task("generate", GenerationRequest, _pictures_plan, _picture_type, _picture_answer, _picture_json, reading.PARTS)
TXT2IMG = Task("txt2img", GenerationRequest, _pictures_plan, _picture_type, _picture_answer, _picture_json, reading.GUIDES, JSON)
IMG2IMG = Task("img2img", GenerationRequest, _img2img_plan, _picture_type, _picture_answer, _picture_json, reading.PARTS, JSON)
INPAINT = Task("inpaint", GenerationRequest, _painted_plan, _picture_type, _picture_answer, _picture_json, reading.PARTS, JSON)
OUTPAINT = Task("outpaint", GenerationRequest, _painted_plan, _picture_type, _picture_answer, _picture_json, reading.PARTS, JSON)
UPSCALE = Task("upscale", UpscaleRequest, _upscale_plan, _picture_type, _picture_answer, _upscaled, {"image": 1})
ANIMATE = Task("animate", AnimationRequest, _animation_plan, _animation_type, _animation_answer, _animation_made, pictures=False)
PROMPT2IMG = Task("prompt2img", PromptToImageRequest, partial(_multimodal_plan, "generate"), _picture_type, _picture_answer, _picture_json, service="UniDiffuser")
IMG2PROMPT = Task("img2prompt", CaptionRequest, partial(_of_pictures_plan, "caption"), partial(_offered, [TEXT, JSON]), partial(_captions_answer, [TEXT, JSON]), _captions_json, _IMAGES, service="UniDiffuser", pictures=False)
IMG2EMBED = Task("img2embed", EmbedRequest, partial(_of_pictures_plan, "embed"), partial(_offered, [JSON, *_NPY]), _embeddings_answer, _embeddings_json, _IMAGES, service="UniDiffuser", pictures=False)
CAPTION = _json_only("caption", CaptionRequest, partial(_of_pictures_plan, "caption"), _captions_json, _IMAGES, pictures=False)
EMBED = _json_only("embed", EmbedRequest, partial(_of_pictures_plan, "embed"), _embeddings_json, _IMAGES, pictures=False)
JOINT = _json_only("joint", JointRequest, partial(_multimodal_plan, "joint"), _joint_json)
IMAGE = Task("image", PicturesRequest, partial(_multimodal_plan, "image"), _picture_type, _picture_answer, _picture_json, accept=JSON, service="UniDiffuser")
TEXTS = _json_only("text", TextsRequest, partial(_multimodal_plan, "text"), _texts_json, pictures=False)
IMAGE_VARIATION = _json_only("image_variation", JointRequest, _variation_plan, _joint_json, {"image": 1})
TEXT_VARIATION = _json_only("text_variation", TextVariationRequest, partial(_multimodal_plan, "text_variation"), _texts_json, pictures=False)

_ALL = (
    GENERATE, TXT2IMG, IMG2IMG, INPAINT, OUTPAINT, UPSCALE, ANIMATE, PROMPT2IMG, IMG2PROMPT, IMG2EMBED,
    CAPTION, EMBED, JOINT, IMAGE, TEXTS, IMAGE_VARIATION, TEXT_VARIATION,
)  # fmt: skip
TASKS: dict[str, Task[Any, Any]] = {task.name: task for task in _ALL}  # that POST /jobs takes
_KNOWN = dict(TASKS)


def known(task: Task[R, A]) -> Task[R, A]:
    """A contract's own, of which jobs come by `Prefer: respond-async` alone."""
    _KNOWN[task.name] = task
    return task


def of_job(name: str) -> Task[Any, Any]:
    return _KNOWN[name]
