"""POST /preprocess: what a preprocessor makes of a picture, as a ControlNet would see it.

As A1111's /controlnet/detect, with a file part for the picture and a picture for an answer.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from api import document, reading
from core import images, preprocessing
from core.plans import Pixels
from core.problems import invalid_field, nearest
from core.settings import Limits

router = APIRouter(tags=["generation"])


class PreprocessRequest(BaseModel):
    """A preprocessor by name, and the size of the map; the picture's own if left out."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)
    preprocessor: Annotated[str, Field(max_length=80, description="canny, lineart_standard, scribble_xdog, invert or none.")]
    width: int | None = Field(None, ge=8, le=4096, description="Pixels; with height.")
    height: int | None = Field(None, ge=8, le=4096, description="Pixels; with width.")


@router.post(
    "/preprocess",
    response_class=Response,
    responses=document.gives("The map.", {"image/png": document.FILE}),
    openapi_extra=document.takes_form(PreprocessRequest, "PreprocessForm", {"image": 1}, ["image"]),
)
async def preprocess(request: Request) -> Response:
    """Make a ControlNet's map from a picture; the answer is a PNG."""
    wanted, uploads = await reading.read_as(PreprocessRequest, request, {"image": 1})
    if "image" not in uploads:
        raise invalid_field("image", "is missing", "a multipart file part")
    if wanted.preprocessor not in preprocessing.NAMES:
        name = wanted.preprocessor
        raise invalid_field("preprocessor", f"there is no preprocessor {name!r}{nearest(name, preprocessing.NAMES)}", preprocessing.NAMES, name)
    if (wanted.width is None) != (wanted.height is None):
        raise invalid_field("height" if wanted.height is None else "width", "is missing: a size is both", "width and height, or neither")
    body = await asyncio.to_thread(_map, wanted, uploads["image"][0], request.app.state.settings.limits)
    return Response(body, media_type="image/png")


def _map(wanted: PreprocessRequest, data: bytes, limits: Limits) -> bytes:
    size = (wanted.width, wanted.height) if wanted.width and wanted.height else None
    made = preprocessing.run(wanted.preprocessor, images.to_pil(images.decode(data, limits)), size)
    return images.encode(Pixels(width=made.width, height=made.height, data=made.tobytes()), "png")
