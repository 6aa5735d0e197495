"""POST /upscale: a picture made larger by an upscaler of the catalogue.

Answers as /post_config does. The typed API of the same name is the same route: its client reads the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import bentoml
import PIL.Image
from fastapi import APIRouter, Request
from starlette.responses import Response

from api import document, tasks
from api.seed import PICTURES
from core.upscaling import UpscaleRequest

router = APIRouter(tags=["generation"])


@router.post(
    "/upscale",
    response_class=Response,
    responses=PICTURES | document.works(406),
    openapi_extra=document.takes_query(UpscaleRequest, {"image": 1}, ["image"], "Picture"),
)
async def upscale(request: Request) -> Response:
    """Make a picture larger."""
    return await tasks.respond(tasks.UPSCALE, request)


class UpscaleInput(UpscaleRequest):
    """An UpscaleRequest with its picture."""

    image: Annotated[Path, bentoml.validators.ContentType("image/*")]


class UpscaleApi:
    """The declaration, for a BentoML service to inherit; see api.typed."""

    @bentoml.api(input_spec=UpscaleInput)  # type: ignore[untyped-decorator]
    async def upscale(self, image: Path, **values: Any) -> PIL.Image.Image:
        """Make a picture larger."""
        picture: PIL.Image.Image = await tasks.in_process(tasks.UPSCALE, {**values, "image": image})
        return picture
