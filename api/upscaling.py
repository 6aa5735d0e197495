"""POST /upscale: a picture made larger by an upscaler of the catalogue.

Answers as /post_config does. The typed API of the same name is the same route: its client reads the picture.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import bentoml
import PIL.Image
from fastapi import APIRouter, Request
from starlette.responses import Response

from api import answering, document, drawing, reading
from api.seed import PICTURES
from core import images, settings, upscaling
from core.catalogue import Catalogue
from core.generation import Generation
from core.plans import Pixels
from core.problems import invalid_field
from core.upscaling import UpscaleRequest

router = APIRouter(tags=["generation"])


@router.post(
    "/upscale",
    response_class=Response,
    responses=PICTURES | document.refuses(406, *document.WORK),
    openapi_extra=document.takes_query(UpscaleRequest, {"image": 1}, ["image"], "Picture"),
)
async def upscale(request: Request) -> Response:
    """Make a picture larger."""
    configured = settings.load()
    wanted, uploads = await reading.read_as(UpscaleRequest, request, {"image": 1})
    if not uploads.get("image"):
        raise invalid_field("image", "is missing", "a multipart file part")
    accept = request.headers.get("accept", "*/*")
    answering.choose(accept, wanted)  # an answer that cannot be had is refused before the work
    image = await asyncio.to_thread(images.decode, uploads["image"][0], configured.limits)
    generation = await _enlarge(request.app.state.catalogue, wanted, image, request)
    return await answering.answer(generation, wanted, accept, configured.metadata.embed)


class UpscaleInput(UpscaleRequest):
    """An UpscaleRequest with its picture."""

    image: Annotated[Path, bentoml.validators.ContentType("image/*")]


class UpscaleApi:
    """The declaration, for a BentoML service to inherit; see api.typed."""

    @bentoml.api(input_spec=UpscaleInput)  # type: ignore[untyped-decorator]
    async def upscale(self, image: Path, **values: Any) -> PIL.Image.Image:
        """Make a picture larger."""
        wanted, configured = reading.check(UpscaleRequest, values), settings.load()
        picture = images.decode(image.read_bytes(), configured.limits)
        return images.to_pil((await _enlarge(Catalogue(configured), wanted, picture, None)).pictures[0])


async def _enlarge(catalogue: Catalogue, wanted: UpscaleRequest, image: Pixels, request: Request | None) -> Generation:
    plan = upscaling.plan(catalogue, wanted, image, request.state.caller.id if request else "in-process")
    return await drawing.drawn(plan, request)
