"""UniDiffuser over HTTP: the seed contract's prompt2img, img2prompt and img2embed, and the typed APIs.

As in api.typed, `MultimodalApis` declares the typed calls for BentoML's schema and client, and the
gate sends public calls to the routes here.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import bentoml
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from api import answering, document, drawing, embedding, reading
from api.answering import GenerationResponse
from api.embedding import EmbedResponse, SeedEmbeddings
from api.seed import PICTURES
from core import images, multimodal, settings
from core.catalogue import Catalogue
from core.generation import Generation, Ran
from core.multimodal import (
    CaptionRequest,
    EmbedRequest,
    JointRequest,
    PicturesRequest,
    PromptToImageRequest,
    TextsRequest,
    TextVariationRequest,
)
from core.plans import Pixels, Task
from core.problems import invalid_field
from core.requests import Sampling

router = APIRouter(tags=["unidiffuser"], responses=document.refuses(*document.WORK))
R = TypeVar("R", bound=Sampling | EmbedRequest)
File = Annotated[Path, bentoml.validators.ContentType("image/*")]
_NPY = ("application/x-npy", "application/octet-stream")
_MOST = {"image": settings.load().limits.images}


class CaptionResponse(BaseModel):
    """`captions[i][k]` is caption k of picture i, made with `seeds[k]`."""

    captions: list[list[str]]
    seeds: list[int]
    ran: Ran


class TextsResponse(BaseModel):
    texts: list[str]
    seeds: list[int]
    ran: Ran


class JointResponse(GenerationResponse):
    """Pictures, each with its text."""

    texts: list[str]


# The seed contract.


@router.post("/prompt2img", response_class=Response, responses=PICTURES | document.refuses(406), openapi_extra=document.takes_query(PromptToImageRequest))
async def prompt2img(request: Request) -> Response:
    """Draw pictures from a prompt; answers as /post_config does."""
    wanted, _ = await _read(PromptToImageRequest, request, most=0)
    accept = request.headers.get("accept", "*/*")
    answering.choose(accept, wanted)  # an answer that cannot be had is refused before the work
    generation = await _run("generate", wanted, [], request)
    return await answering.answer(generation, wanted, accept, settings.load().metadata.embed)


@router.post(
    "/img2prompt",
    response_class=Response,
    responses=document.gives("The captions.", {"text/plain": {"type": "string"}, "application/json": CaptionResponse}, headers=answering.HEADERS) | document.refuses(406),
    openapi_extra=document.takes_query(CaptionRequest, _MOST, ["image"], "SeveralPictures"),
)
async def img2prompt(request: Request) -> Response:
    """Say what pictures show: text, one caption a line, picture by picture; or JSON, by Accept."""
    wanted, pictures = await _read(CaptionRequest, request)
    media_type = answering.negotiate(request.headers.get("accept", "*/*"), ["text/plain", "application/json"])
    generation = await _run("caption", wanted, pictures, request)
    response = _captions(generation)
    body = response.model_dump_json() if media_type == "application/json" else "\n".join(generation.texts)
    return Response(body, media_type=media_type, headers=answering.describe(response.ran, response.seeds))


@router.post(
    "/img2embed",
    response_class=Response,
    responses=document.gives("The embeddings.", {"application/json": SeedEmbeddings, **dict.fromkeys(_NPY, document.FILE)}, headers=answering.HEADERS) | document.refuses(406),
    openapi_extra=document.takes_query(EmbedRequest, _MOST, ["image"], "SeveralPictures"),
)
async def img2embed(request: Request) -> Response:
    """Embed pictures. JSON: for one picture the vectors themselves, for several a list of them. NumPy
    (application/x-npy): one row for each, with the fields CLIP_embeddings and vae_emb, float16."""
    wanted, pictures = await _read(EmbedRequest, request)
    media_type = answering.negotiate(request.headers.get("accept", "*/*"), ["application/json", *_NPY])
    generation = await _run("embed", wanted, pictures, request)
    body = await asyncio.to_thread(embedding.seed_json if media_type == "application/json" else embedding.npy, generation, wanted)
    assert generation.ran is not None
    return Response(body, media_type=media_type, headers=answering.describe(generation.ran, []))


# The typed APIs.


@router.post("/generate", openapi_extra=document.takes_json(PromptToImageRequest))
async def generate(request: Request) -> GenerationResponse:
    """Draw pictures from a prompt; the answer is JSON with base64 pictures."""
    wanted, _ = await _read(PromptToImageRequest, request, most=0)
    return await _pictures(await _run("generate", wanted, [], request), wanted)


@router.post("/caption", openapi_extra=document.takes_form(CaptionRequest, "CaptionForm", _MOST, ["image"]))
async def caption(request: Request) -> CaptionResponse:
    """Say what pictures show."""
    wanted, pictures = await _read(CaptionRequest, request)
    return _captions(await _run("caption", wanted, pictures, request))


@router.post("/embed", openapi_extra=document.takes_form(EmbedRequest, "EmbedForm", _MOST, ["image"]))
async def embed(request: Request) -> EmbedResponse:
    """Embed pictures."""
    wanted, pictures = await _read(EmbedRequest, request)
    return await asyncio.to_thread(embedding.answer, await _run("embed", wanted, pictures, request), wanted)


@router.post("/joint", openapi_extra=document.takes_json(JointRequest, needed=False))
async def joint(request: Request) -> JointResponse:
    """Make pictures together with their texts, from nothing."""
    wanted, _ = await _read(JointRequest, request, most=0)
    return await _joint(await _run("joint", wanted, [], request), wanted)


@router.post("/image", openapi_extra=document.takes_json(PicturesRequest, needed=False))
async def image(request: Request) -> GenerationResponse:
    """Make pictures from nothing."""
    wanted, _ = await _read(PicturesRequest, request, most=0)
    return await _pictures(await _run("image", wanted, [], request), wanted)


@router.post("/text", openapi_extra=document.takes_json(TextsRequest, needed=False))
async def text(request: Request) -> TextsResponse:
    """Make texts from nothing."""
    wanted, _ = await _read(TextsRequest, request, most=0)
    return _texts(await _run("text", wanted, [], request))


@router.post("/image_variation", openapi_extra=document.takes_form(JointRequest, "VariationForm", {"image": 1}, ["image"]))
async def image_variation(request: Request) -> JointResponse:
    """Draw pictures like the one sent, by way of a text, which is told."""
    wanted, pictures = await _read(JointRequest, request, most=1)
    return await _joint(await _run("image_variation", wanted, pictures, request), wanted)


@router.post("/text_variation", openapi_extra=document.takes_json(TextVariationRequest))
async def text_variation(request: Request) -> TextsResponse:
    """Make texts like the prompt, by way of a picture."""
    wanted, _ = await _read(TextVariationRequest, request, most=0)
    return _texts(await _run("text_variation", wanted, [], request))


class WithImages(BaseModel):
    image: list[File]


class WithImage(BaseModel):
    image: File


class CaptionInput(WithImages, CaptionRequest):
    """A CaptionRequest with its pictures."""


class EmbedInput(WithImages, EmbedRequest):
    """An EmbedRequest with its pictures."""


class VariationInput(WithImage, JointRequest):
    """A JointRequest with the picture to vary."""


class MultimodalApis:
    """The declarations, for a BentoML service to inherit. Called in this process (never over HTTP),
    they do as the routes do."""

    @bentoml.api(input_spec=PromptToImageRequest)  # type: ignore[untyped-decorator]
    async def generate(self, **values: Any) -> GenerationResponse:
        """Draw pictures from a prompt with UniDiffuser."""
        wanted = reading.check(PromptToImageRequest, values)
        return await _pictures(await _run("generate", wanted, []), wanted)

    @bentoml.api(input_spec=CaptionInput)  # type: ignore[untyped-decorator]
    async def caption(self, image: list[Path], **values: Any) -> CaptionResponse:
        """Say what pictures show."""
        wanted = reading.check(CaptionRequest, values)
        return _captions(await _run("caption", wanted, _decode([p.read_bytes() for p in image], wanted)))

    @bentoml.api(input_spec=EmbedInput)  # type: ignore[untyped-decorator]
    async def embed(self, image: list[Path], **values: Any) -> EmbedResponse:
        """Embed pictures."""
        wanted = reading.check(EmbedRequest, values)
        return embedding.answer(await _run("embed", wanted, _decode([p.read_bytes() for p in image], wanted)), wanted)

    @bentoml.api(input_spec=JointRequest)  # type: ignore[untyped-decorator]
    async def joint(self, **values: Any) -> JointResponse:
        """Make pictures together with their texts."""
        wanted = reading.check(JointRequest, values)
        return await _joint(await _run("joint", wanted, []), wanted)

    @bentoml.api(input_spec=PicturesRequest)  # type: ignore[untyped-decorator]
    async def image(self, **values: Any) -> GenerationResponse:
        """Make pictures from nothing."""
        wanted = reading.check(PicturesRequest, values)
        return await _pictures(await _run("image", wanted, []), wanted)

    @bentoml.api(input_spec=TextsRequest)  # type: ignore[untyped-decorator]
    async def text(self, **values: Any) -> TextsResponse:
        """Make texts from nothing."""
        return _texts(await _run("text", reading.check(TextsRequest, values), []))

    @bentoml.api(input_spec=VariationInput)  # type: ignore[untyped-decorator]
    async def image_variation(self, image: Path, **values: Any) -> JointResponse:
        """Draw pictures like the one sent."""
        wanted = reading.check(JointRequest, values)
        return await _joint(await _run("image_variation", wanted, _decode([image.read_bytes()], wanted)), wanted)

    @bentoml.api(input_spec=TextVariationRequest)  # type: ignore[untyped-decorator]
    async def text_variation(self, **values: Any) -> TextsResponse:
        """Make texts like the prompt."""
        return _texts(await _run("text_variation", reading.check(TextVariationRequest, values), []))


# What they share.


async def _read(model: type[R], request: Request, most: int | None = None) -> tuple[R, list[Pixels]]:
    """The request and its pictures; at least one where any may be sent, and limits.images at most."""
    most = settings.load().limits.images if most is None else most
    wanted, parts = await reading.read_as(model, request, {"image": most} if most else {})
    uploads = parts.get("image", [])
    if most and not uploads:
        raise invalid_field("image", "is missing", "a multipart file part" if most == 1 else f"1 to {most} multipart file parts")
    return wanted, await asyncio.to_thread(_decode, uploads, wanted)


def _decode(uploads: list[bytes], wanted: Sampling | EmbedRequest) -> list[Pixels]:
    """Safe pictures of the model's size, one after another, so that a large one is not held any longer."""
    size = catalogue().find(wanted.model_id).size
    return [images.square(images.decode(data, settings.load().limits), size) for data in uploads]


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """UniDiffuser's models."""
    return Catalogue(settings.load(), settings.load().unidiffuser)


async def _run(task: Task, wanted: Sampling | EmbedRequest, pictures: list[Pixels], request: Request | None = None) -> Generation:
    client = request.state.caller.id if request else "in-process"
    plan = multimodal.plan(catalogue(), task, wanted, pictures, client)
    return await drawing.drawn(plan, request, "UniDiffuser")


async def _pictures(generation: Generation, wanted: PromptToImageRequest | PicturesRequest) -> GenerationResponse:
    return await answering.as_json(generation, wanted, settings.load().metadata.embed)


async def _joint(generation: Generation, wanted: JointRequest) -> JointResponse:
    return JointResponse(**dict(await _pictures(generation, wanted)), texts=generation.texts)


def _texts(generation: Generation) -> TextsResponse:
    assert generation.ran is not None
    return TextsResponse(texts=generation.texts, seeds=generation.seeds, ran=generation.ran)


def _captions(generation: Generation) -> CaptionResponse:
    assert generation.ran is not None
    each, texts = len(generation.seeds), generation.texts
    captions = [texts[i : i + each] for i in range(0, len(texts), each)]
    return CaptionResponse(captions=captions, seeds=generation.seeds, ran=generation.ran)
