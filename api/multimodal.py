"""UniDiffuser over HTTP: the seed contract's prompt2img, img2prompt and img2embed, and the typed APIs.

As in api.typed, `MultimodalApis` declares the typed calls for BentoML's schema and client, and the
gate sends public calls to the routes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import bentoml
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from api import answering, document, tasks, uploading
from api.answering import CaptionResponse, GenerationResponse, JointResponse, TextsResponse
from api.embedding import EmbedResponse, SeedEmbeddings
from api.seed import PICTURES
from core.multimodal import (
    CaptionRequest,
    EmbedRequest,
    JointRequest,
    PicturesRequest,
    PromptToImageRequest,
    TextsRequest,
    TextVariationRequest,
)

router = APIRouter(tags=["unidiffuser"], responses=document.works())
File = Annotated[Path, bentoml.validators.ContentType("image/*")]
_NPY = ("application/x-npy", "application/octet-stream")
_MOST = {"image": uploading.PARTS}  # limits.images says how many, when one asks


# The seed contract.


@router.post("/prompt2img", response_class=Response, responses=PICTURES | document.refuses(406), openapi_extra=document.takes_query(PromptToImageRequest))
async def prompt2img(request: Request) -> Response:
    """Draw pictures from a prompt; answers as /post_config does."""
    return await tasks.respond(tasks.PROMPT2IMG, request)


@router.post(
    "/img2prompt",
    response_class=Response,
    responses=document.gives("The captions.", {"text/plain": {"type": "string"}, "application/json": CaptionResponse}, headers=answering.HEADERS) | document.refuses(406),
    openapi_extra=document.takes_query(CaptionRequest, _MOST, ["image"], "SeveralPictures"),
)
async def img2prompt(request: Request) -> Response:
    """Say what pictures show: text, one caption a line, picture by picture; or JSON, by Accept."""
    return await tasks.respond(tasks.IMG2PROMPT, request)


@router.post(
    "/img2embed",
    response_class=Response,
    responses=document.gives("The embeddings.", {"application/json": SeedEmbeddings, **dict.fromkeys(_NPY, document.FILE)}, headers=answering.HEADERS) | document.refuses(406),
    openapi_extra=document.takes_query(EmbedRequest, _MOST, ["image"], "SeveralPictures"),
)
async def img2embed(request: Request) -> Response:
    """Embed pictures. JSON: for one picture the vectors themselves, for several a list of them. NumPy
    (application/x-npy): one row for each, with the fields CLIP_embeddings and vae_emb, float16."""
    return await tasks.respond(tasks.IMG2EMBED, request)


# The typed APIs.


@router.post("/generate", openapi_extra=document.takes_json(PromptToImageRequest))
async def generate(request: Request) -> GenerationResponse:
    """Draw pictures from a prompt; the answer is JSON with base64 pictures."""
    return await tasks.typed(tasks.PROMPT2IMG, request)


@router.post("/caption", openapi_extra=document.takes_form(CaptionRequest, "CaptionForm", _MOST, ["image"]))
async def caption(request: Request) -> CaptionResponse:
    """Say what pictures show."""
    return await tasks.typed(tasks.CAPTION, request)


@router.post("/embed", openapi_extra=document.takes_form(EmbedRequest, "EmbedForm", _MOST, ["image"]))
async def embed(request: Request) -> EmbedResponse:
    """Embed pictures."""
    return await tasks.typed(tasks.EMBED, request)


@router.post("/joint", openapi_extra=document.takes_json(JointRequest, needed=False))
async def joint(request: Request) -> JointResponse:
    """Make pictures together with their texts, from nothing."""
    return await tasks.typed(tasks.JOINT, request)


@router.post("/image", openapi_extra=document.takes_json(PicturesRequest, needed=False))
async def image(request: Request) -> GenerationResponse:
    """Make pictures from nothing."""
    return await tasks.typed(tasks.IMAGE, request)


@router.post("/text", openapi_extra=document.takes_json(TextsRequest, needed=False))
async def text(request: Request) -> TextsResponse:
    """Make texts from nothing."""
    return await tasks.typed(tasks.TEXTS, request)


@router.post("/image_variation", openapi_extra=document.takes_form(JointRequest, "VariationForm", {"image": 1}, ["image"]))
async def image_variation(request: Request) -> JointResponse:
    """Draw pictures like the one sent, by way of a text, which is told."""
    return await tasks.typed(tasks.IMAGE_VARIATION, request)


@router.post("/text_variation", openapi_extra=document.takes_json(TextVariationRequest))
async def text_variation(request: Request) -> TextsResponse:
    """Make texts like the prompt, by way of a picture."""
    return await tasks.typed(tasks.TEXT_VARIATION, request)


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
        return await tasks.in_process(tasks.PROMPT2IMG, values)

    @bentoml.api(input_spec=CaptionInput)  # type: ignore[untyped-decorator]
    async def caption(self, image: list[Path], **values: Any) -> CaptionResponse:
        """Say what pictures show."""
        return await tasks.in_process(tasks.CAPTION, {**values, "image": image})

    @bentoml.api(input_spec=EmbedInput)  # type: ignore[untyped-decorator]
    async def embed(self, image: list[Path], **values: Any) -> EmbedResponse:
        """Embed pictures."""
        return await tasks.in_process(tasks.EMBED, {**values, "image": image})

    @bentoml.api(input_spec=JointRequest)  # type: ignore[untyped-decorator]
    async def joint(self, **values: Any) -> JointResponse:
        """Make pictures together with their texts."""
        return await tasks.in_process(tasks.JOINT, values)

    @bentoml.api(input_spec=PicturesRequest)  # type: ignore[untyped-decorator]
    async def image(self, **values: Any) -> GenerationResponse:
        """Make pictures from nothing."""
        return await tasks.in_process(tasks.IMAGE, values)

    @bentoml.api(input_spec=TextsRequest)  # type: ignore[untyped-decorator]
    async def text(self, **values: Any) -> TextsResponse:
        """Make texts from nothing."""
        return await tasks.in_process(tasks.TEXTS, values)

    @bentoml.api(input_spec=VariationInput)  # type: ignore[untyped-decorator]
    async def image_variation(self, image: Path, **values: Any) -> JointResponse:
        """Draw pictures like the one sent."""
        return await tasks.in_process(tasks.IMAGE_VARIATION, {**values, "image": image})

    @bentoml.api(input_spec=TextVariationRequest)  # type: ignore[untyped-decorator]
    async def text_variation(self, **values: Any) -> TextsResponse:
        """Make texts like the prompt."""
        return await tasks.in_process(tasks.TEXT_VARIATION, values)
