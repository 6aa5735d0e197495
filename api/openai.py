"""OpenAI's images API: /v1/images/generations, /v1/images/edits and /v1/models, for its clients as they are.

Each request is translated into a `GenerationRequest`; the fields of one that OpenAI has no name for may be sent
as well, by their own names (negative_prompt, seed, scheduler, lora, ...). api.errors gives errors OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.responses import Response

from api import answering, document, links, openai_stream, reading, tasks, translated
from api.tasks import Task, Uploads
from api.translated import Translated
from core import images, settings
from core.catalogue import Catalogue
from core.families import Entry
from core.generation import Generation
from core.plans import Inputs, Plan
from core.problems import Problem, invalid_field, nearest, problem, renamed
from core.requests import Format, GenerationRequest, ImageFormat, Text
from core.settings import Limits

router = APIRouter(prefix="/v1", tags=["openai"])
# A request's fields that OpenAI has names for; the others are extensions, by their own.
_NAMES = {"model_id": "model", "count_returned": "n", "width": "size", "height": "size", "format": "output_format", "quality": "output_compression"}
_EXTENSIONS = [name for name in GenerationRequest.model_fields if name not in {"prompt", *_NAMES}]
_PARTS = {"image": 1, "image[]": 1, "mask": 1}
_EXTENSION_FIELDS = {name: field for name, field in GenerationRequest.model_json_schema()["properties"].items() if name in _EXTENSIONS}
Quality = Literal["low", "medium", "high"]
_QUALITIES: dict[str, Quality] = {"standard": "medium", "medium": "medium", "auto": "medium", "low": "low", "high": "high", "hd": "high"}
_STARTED = int(time.time())
_STEPS: dict[Quality, float] = {"low": 0.5, "medium": 1, "high": 1.5}  # times the model's own


class ImagesRequest(openai_stream.Streaming):
    """A request for pictures as OpenAI's clients send it."""

    model_config = ConfigDict(extra="allow", str_strip_whitespace=True)

    prompt: Text = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, max_length=300, description="A model of GET /v1/models; the default one if left out.")
    n: int = Field(1, ge=1, le=10, description="How many; number i has seed + i.")
    size: str = Field("auto", pattern=r"^(auto|\d{1,5}x\d{1,5})$", description='"WIDTHxHEIGHT" in pixels, or "auto": the model\'s own, or the picture\'s shape.')
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: an address that is good for links.retention_s seconds.")
    output_format: Format = Field("png", description="The pictures' file format.")
    output_compression: int | None = Field(None, ge=0, le=100, description="For jpeg and webp: 100 is the best quality. 90 if left out.")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = Field("auto", description="Steps: half the model's own (low), those, or half as many more (high, hd); num_inference_steps says it itself.")
    background: Literal["auto", "opaque"] = Field("auto", description="Pictures are opaque.")
    moderation: Literal["auto"] = Field("auto", description="As the server's safety settings say.")
    user: str | None = Field(None, max_length=200, description="Who it is for; with an experiment, its subject.")

    @model_validator(mode="before")
    @classmethod
    def null_is_left_out(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values

    @field_validator("n", "output_compression", "partial_images", mode="before")
    @classmethod
    def numbers_are_no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must not be true or false")
        return value

    def translated(self, entry: Entry, limits: Limits) -> GenerationRequest:
        """What it asks for.

        Raises:
            Problem: 422 that names each wrong field as OpenAI does.
        """
        more = dict(self.model_extra or {})
        known = [*ImagesRequest.model_fields, *_EXTENSIONS]
        for name in more.keys() - set(_EXTENSIONS):
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, known)}", sorted(known))
        if self.output_compression is not None and self.output_format == "png":
            raise invalid_field("output_compression", "is for jpeg and webp: png loses nothing", "leave it out, or another output_format", self.output_compression)
        if self.partial_images and not self.stream:
            raise invalid_field("partial_images", "needs stream", "0, or stream: true", self.partial_images)
        if self.stream and self.response_format == "url":
            raise invalid_field("response_format", "events have the pictures themselves", "b64_json with stream", self.response_format)
        width, height = (None, None) if self.size == "auto" else self.size.split("x")
        steps = min(max(1, round(entry.steps * _STEPS[_QUALITIES[self.quality]])), limits.num_inference_steps)
        own = {
            "prompt": self.prompt, "model_id": entry.id, "count_returned": self.n, "width": width, "height": height, "format": self.output_format,
            "quality": 90 if self.output_compression is None else max(1, self.output_compression),
        }  # fmt: skip
        subject = {"subject": self.user} if self.user and more.get("experiment") else {}
        try:
            return reading.parse({"num_inference_steps": steps, **subject, **more, **own})
        except Problem as error:
            raise renamed(error, _NAMES) from None


class ImageData(BaseModel):
    """A picture, as base64 or as an address, with the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens that the text encoder read; pictures take none here."""

    input_tokens: int
    output_tokens: int = 0
    total_tokens: int
    input_tokens_details: TokenDetails


class ImagesResponse(BaseModel):
    """The pictures. `size` and `quality` are those of what was drawn."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: Quality
    size: str
    usage: Usage


class Pictures(Translated[ImagesRequest, GenerationRequest]):
    """A request with what it asks for; `base_url` is where its client calls this server, for addresses."""

    base_url: str


class ListedModel(BaseModel):
    """A model of the catalogue. `created` is when this server started: a catalogue knows no dates."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    family: str
    licence: str
    commercial_use: bool


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ListedModel]


_PICTURES = document.gives("The pictures.", {"application/json": ImagesResponse, "text/event-stream": {"type": "string"}}, headers=answering.HEADERS) | document.works()


@router.post("/images/generations", responses=_PICTURES, openapi_extra=document.takes_json(ImagesRequest, **_EXTENSION_FIELDS))
async def generations(request: Request) -> Response:
    """Draw pictures from a prompt."""
    asked, _ = await reading.read_as(ImagesRequest, request, {})
    return await _answer(_GENERATION, asked, {}, request)


@router.post("/images/edits", responses=_PICTURES, openapi_extra=document.takes_form(ImagesRequest, "EditForm", {"image": 1, "mask": 1}, ["image"], **_EXTENSION_FIELDS))
async def edits(request: Request) -> Response:
    """Draw pictures from a prompt and a picture. What is transparent in `mask`, or without one in `image`, is
    repainted wholly (strength 1 if left out); where nothing is, the whole picture is redrawn (strength 0.75)."""
    asked, uploads = await reading.read_as(ImagesRequest, request, _PARTS)
    return await _answer(_EDIT, asked, uploads, request)


@router.get("/models")
async def models(request: Request) -> ModelList:
    """The models that `model` may name."""
    catalogue: Catalogue = request.app.state.catalogue
    return ModelList(data=[_listed(entry) for entry in catalogue.generators.values()])


@router.get("/models/{id:path}", responses=document.refuses(404))
async def model(id: str, request: Request) -> ListedModel:
    """One of them."""
    catalogue: Catalogue = request.app.state.catalogue
    if id not in catalogue.generators:
        raise _unknown(id, catalogue)
    return _listed(catalogue.generators[id])


async def _answer(task: Task[Pictures, ImagesResponse], asked: ImagesRequest, uploads: Uploads, request: Request) -> Response:
    """The pictures; a job, where the client prefers that and wants no events."""
    pictures = Pictures(asked=asked, wanted=asked.translated(_entry(asked, request), settings.load().limits), base_url=str(request.base_url))
    if asked.stream:
        return await _streamed(task, pictures, uploads, request)
    return await tasks.done(task, pictures, uploads, request)


async def _streamed(task: Task[Pictures, ImagesResponse], pictures: Pictures, uploads: Uploads, request: Request) -> Response:
    asked = pictures.asked
    kind: openai_stream.Kind = "image_edit" if task is _EDIT else "image_generation"
    plan = await asyncio.to_thread(task.plan, pictures, uploads, request.state.caller.id)
    told = {"background": "opaque", "output_format": asked.output_format, "quality": _QUALITIES[asked.quality], "size": f"{plan.width}x{plan.height}"}

    async def completed(generation: Generation) -> list[dict[str, Any]]:
        files = await asyncio.to_thread(_files, pictures, generation)
        said = told | {name: value.model_dump() if isinstance(value, Usage) else value for name, value in _told(asked, generation).items()}
        return [{"b64_json": base64.b64encode(file).decode(), "seed": seed, **said} for file, seed in zip(files, generation.seeds, strict=True)]

    return await openai_stream.streamed(plan, request, kind, asked.partial_images, pictures.format, told, completed)


def _plan(wanted: GenerationRequest, _: Uploads, client: str) -> Plan:
    return tasks.catalogue("StableDiffusion").plan(wanted, None, client)


def _edit_plan(wanted: GenerationRequest, uploads: Uploads, client: str) -> Plan:
    inputs = _inputs(uploads, settings.load().limits)
    if inputs.mask is not None and wanted.strength is None:
        wanted = wanted.model_copy(update={"strength": 1.0})
    return tasks.catalogue("StableDiffusion").plan(wanted, inputs, client)


def _made(pictures: Pictures, generation: Generation) -> ImagesResponse:
    data = [_data(file, seed, pictures) for file, seed in zip(_files(pictures, generation), generation.seeds, strict=True)]
    return ImagesResponse(created=int(time.time()), data=data, **_told(pictures.asked, generation))


def _files(pictures: Pictures, generation: Generation) -> list[bytes]:
    return answering.encode_all(generation, pictures.format, pictures.quality, settings.load().metadata.embed)


def _data(file: bytes, seed: int, pictures: Pictures) -> ImageData:
    if pictures.asked.response_format == "url":
        return ImageData(url=links.keep(file, images.MEDIA_TYPES[pictures.asked.output_format], pictures.base_url), seed=seed)
    return ImageData(b64_json=base64.b64encode(file).decode(), seed=seed)


def _told(asked: ImagesRequest, generation: Generation) -> dict[str, Any]:
    """What an answer says of all its pictures."""
    assert generation.ran is not None
    tokens = generation.ran.prompt_tokens
    return {
        "output_format": asked.output_format,
        "quality": _QUALITIES[asked.quality],
        "size": f"{generation.ran.width}x{generation.ran.height}",
        "usage": Usage(input_tokens=tokens, total_tokens=tokens, input_tokens_details=TokenDetails(text_tokens=tokens)),
    }


def _inputs(uploads: Uploads, limits: Limits) -> Inputs:
    """The picture to edit, and what of it to repaint: where the mask's alpha is 0, or its own.

    Raises:
        Problem: 413, 415 or 422 as core.images says; 422 for several pictures, or a mask that is opaque.
    """
    files = [*uploads.get("image", []), *uploads.get("image[]", [])]
    if len(files) != 1:
        raise invalid_field("image", "is given more than once" if files else "is missing", "one picture, as a multipart file part")
    if not (masks := uploads.get("mask")):
        return Inputs(image=images.decode(files[0], limits), mask=images.transparency(files[0], limits))
    mask = images.transparency(masks[0], limits, "mask")
    if mask is None:
        raise invalid_field("mask", "has no transparent pixels, so that nothing would be repainted", "a picture that is transparent where to repaint")
    return Inputs(image=images.decode(files[0], limits), mask=mask)


def _entry(asked: ImagesRequest, request: Request) -> Entry:
    """The model asked for.

    Raises:
        Problem: 404 where there is none of that name.
    """
    catalogue: Catalogue = request.app.state.catalogue
    try:
        return catalogue.find(asked.model)
    except Problem:
        raise _unknown(asked.model or "", catalogue) from None


def _unknown(id: str, catalogue: Catalogue) -> Problem:
    known = list(catalogue.generators)
    error = invalid_field("model", f"there is no model {id[:80]!r}{nearest(id, known)}", known, id)
    return problem(404, "model-not-found", "Model not found", error.details.detail, errors=error.details.errors)


def _listed(entry: Entry) -> ListedModel:
    owner = entry.id.split("/")[0]
    return ListedModel(id=entry.id, created=_STARTED, owned_by=owner, family=entry.model.family, licence=entry.model.licence, commercial_use=entry.model.commercial_use)


_GENERATION = translated.task("openai_generation", Pictures, _plan, _made, names=_NAMES, headers=True)
_EDIT = translated.task("openai_edit", Pictures, _edit_plan, _made, _PARTS, names=_NAMES, headers=True)
