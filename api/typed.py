"""The typed BentoML APIs, for pictures and for LoRAs: what the generated Python client calls.

BentoML's declarations (`TypedApis`) give the schema and the client; the gate sends public calls
to the routes here and in api.loras, because BentoML's own parsing answers 500 to a bad picture and fetches a URL
given for a file.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import bentoml
from fastapi import APIRouter, Request
from pydantic import Field

from api import document, loras, reading, tasks
from api.answering import GenerationResponse
from core.loras import keeping
from core.loras.messages import Added, AddLora, Listing, Removed, RemoveLora
from core.requests import GenerationRequest

router = APIRouter(tags=["typed"], responses=document.works())


File = Annotated[Path, bentoml.validators.ContentType("image/*")]


class Txt2ImgInput(GenerationRequest):
    """A GenerationRequest with the pictures that guide it, if any."""

    control_image: list[File] = Field(default_factory=list)
    ip_adapter_image: list[File] = Field(default_factory=list)


class Img2ImgInput(Txt2ImgInput):
    """The same with an input picture."""

    image: File


class InpaintInput(Img2ImgInput):
    """The same with an input picture and a mask."""

    mask: File


class TypedApis:
    """The declarations, for a BentoML service to inherit. Called in this process (never over
    HTTP: see above), they do as the routes do."""

    @bentoml.api(input_spec=Txt2ImgInput)  # type: ignore[untyped-decorator]
    async def txt2img(self, **values: Any) -> GenerationResponse:
        """Draw pictures from a prompt, and what guides it."""
        return await tasks.in_process(tasks.TXT2IMG, values)

    @bentoml.api(input_spec=Img2ImgInput)  # type: ignore[untyped-decorator]
    async def img2img(self, **values: Any) -> GenerationResponse:
        """Draw pictures from a prompt and an input picture."""
        return await tasks.in_process(tasks.IMG2IMG, values)

    @bentoml.api(input_spec=InpaintInput)  # type: ignore[untyped-decorator]
    async def inpaint(self, **values: Any) -> GenerationResponse:
        """Repaint what is white in `mask`."""
        return await tasks.in_process(tasks.INPAINT, values)

    @bentoml.api(input_spec=Img2ImgInput)  # type: ignore[untyped-decorator]
    async def outpaint(self, **values: Any) -> GenerationResponse:
        """Draw beyond the picture's sides (outpaint_left, ...)."""
        return await tasks.in_process(tasks.OUTPAINT, values)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop_adding(self) -> None:
        """Leave nothing behind of downloads that a shutdown stops."""
        await loras.installer().close()

    @bentoml.api(input_spec=AddLora)  # type: ignore[untyped-decorator]
    async def add_lora(self, **values: Any) -> Added:
        """Add a LoRA from Civitai or a hub repository, and wait for it (admin key)."""
        return await loras.installer().start(reading.check(AddLora, values)).result()

    @bentoml.api(input_spec=RemoveLora)  # type: ignore[untyped-decorator]
    async def remove_lora(self, name: str) -> Removed:
        """Remove a LoRA and its weights (admin key)."""
        return await asyncio.to_thread(keeping.remove, loras.installer().registry, name)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def list_loras(self) -> Listing:
        """Every LoRA with its trigger words and rights."""
        return await asyncio.to_thread(keeping.listing, loras.installer().registry)


@router.post("/txt2img", openapi_extra=document.takes_either(document.takes_json(GenerationRequest), document.takes_form(GenerationRequest, "Txt2ImgForm", reading.GUIDES)))
async def txt2img(request: Request) -> GenerationResponse:
    """Draw pictures from a prompt, and what guides it; the answer is JSON with base64 pictures."""
    return await tasks.typed(tasks.TXT2IMG, request)


@router.post("/img2img", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
async def img2img(request: Request) -> GenerationResponse:
    """Draw pictures from a prompt and an input picture; the answer is JSON with base64 pictures."""
    return await tasks.typed(tasks.IMG2IMG, request)


@router.post("/outpaint", name="outpaint", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
@router.post("/inpaint", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
async def inpaint(request: Request) -> GenerationResponse:
    """Repaint what is white in `mask` (without one, what is transparent in `image`), or draw beyond the
    picture's sides (outpaint_*); the answer is JSON with base64 pictures."""
    return await tasks.typed(tasks.INPAINT, request)
