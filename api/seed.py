"""The seed contract: POST /post_config, by the parameters and answers that its users know."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from api import answering, document, reading, tasks
from api.answering import GenerationResponse
from core import images
from core.requests import GenerationRequest

router = APIRouter(tags=["generation"])


_IMAGES = dict.fromkeys(images.MEDIA_TYPES.values(), document.FILE)
PICTURES = document.gives(
    "One picture, or several as a contact sheet, ZIP, multipart or JSON, by Accept.",
    {**_IMAGES, "application/zip": document.FILE, "multipart/mixed": document.FILE, "application/json": GenerationResponse},
    headers=answering.HEADERS,
)


@router.post(
    "/post_config",
    response_class=Response,
    responses=PICTURES | document.works(406),
    openapi_extra=document.takes_query(GenerationRequest, reading.PARTS, name="Pictures"),
)
async def post_config(request: Request) -> Response:
    """Draw pictures from a prompt, and from an input image where one is sent, of which `mask` says what to repaint."""
    return await tasks.respond(tasks.GENERATE, request)
