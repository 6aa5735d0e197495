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

from api import answering, document, drawing, loras, reading
from api.answering import GenerationResponse
from core import settings
from core.catalogue import Catalogue
from core.loras import keeping
from core.loras.messages import Added, AddLora, Listing, Removed, RemoveLora
from core.plans import Inputs
from core.problems import invalid_field
from core.requests import GenerationRequest

router = APIRouter(tags=["typed"], responses=document.refuses(*document.WORK))


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
        uploads, wanted = _uploads(values), reading.parse(values)
        return await _draw(wanted, reading.pictures(uploads, settings.load().limits))

    @bentoml.api(input_spec=Img2ImgInput)  # type: ignore[untyped-decorator]
    async def img2img(self, **values: Any) -> GenerationResponse:
        """Draw pictures from a prompt and an input picture."""
        uploads, wanted = _uploads(values), reading.parse(values)
        return await _draw(wanted, reading.pictures(uploads, settings.load().limits))

    @bentoml.api(input_spec=InpaintInput)  # type: ignore[untyped-decorator]
    async def inpaint(self, **values: Any) -> GenerationResponse:
        """Repaint what is white in `mask`."""
        uploads, wanted = _uploads(values), reading.parse(values)
        return await _draw(wanted, reading.painted(wanted, uploads, settings.load().limits))

    @bentoml.api(input_spec=Img2ImgInput)  # type: ignore[untyped-decorator]
    async def outpaint(self, **values: Any) -> GenerationResponse:
        """Draw beyond the picture's sides (outpaint_left, ...)."""
        uploads, wanted = _uploads(values), reading.parse(values)
        return await _draw(wanted, reading.painted(wanted, uploads, settings.load().limits))

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
    wanted, inputs = await reading.read(request, request.app.state.settings.limits, parts=reading.GUIDES)
    return await _draw(wanted, inputs, request)


@router.post("/img2img", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
async def img2img(request: Request) -> GenerationResponse:
    """Draw pictures from a prompt and an input picture; the answer is JSON with base64 pictures."""
    wanted, inputs = await reading.read(request, request.app.state.settings.limits)
    if inputs.image is None:
        raise invalid_field("image", "is missing", "a multipart file part")
    return await _draw(wanted, inputs, request)


@router.post("/outpaint", name="outpaint", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
@router.post("/inpaint", openapi_extra=document.takes_form(GenerationRequest, "Img2ImgForm", reading.PARTS, ["image"]))
async def inpaint(request: Request) -> GenerationResponse:
    """Repaint what is white in `mask` (without one, what is transparent in `image`), or draw beyond the
    picture's sides (outpaint_*); the answer is JSON with base64 pictures."""
    wanted, uploads = await reading.read_as(GenerationRequest, request, reading.PARTS)
    inputs = await asyncio.to_thread(reading.painted, wanted, uploads, request.app.state.settings.limits)
    return await _draw(wanted, inputs, request)


def _uploads(values: dict[str, Any]) -> dict[str, list[bytes]]:
    """The files of a call in this process, taken out of its values, by the names of their parts."""
    given = {part: values.pop(part) for part in reading.PARTS if part in values}
    return {part: [path.read_bytes() for path in (paths if isinstance(paths, list) else [paths])] for part, paths in given.items()}


async def _draw(wanted: GenerationRequest, inputs: Inputs | None, request: Request | None = None) -> GenerationResponse:
    configured = settings.load()
    client = request.state.caller.id if request else "in-process"
    catalogue: Catalogue = request.app.state.catalogue if request else Catalogue(configured)
    plan = await asyncio.to_thread(catalogue.plan, wanted, inputs, client)
    return await answering.as_json(await drawing.drawn(plan, request), wanted, configured.metadata.embed)
