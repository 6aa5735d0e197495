"""POST /replay: a picture comes in, and the request that made it goes out, or with `run` the picture again."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from api import answering, document, reading, tasks
from api.answering import GenerationResponse
from api.seed import PICTURES
from core import images, replay
from core.problems import invalid_field
from core.replay import Source
from core.requests import GenerationRequest
from core.settings import Settings

router = APIRouter(tags=["generation"])


class ReplayParameters(BaseModel):
    """What comes beside the picture."""

    model_config = ConfigDict(extra="forbid")

    run: bool = Field(False, description="true: draw the picture again and answer as /post_config does.")


class ReplayResponse(BaseModel):
    """`request`: the parameters of POST /post_config, without those at their defaults; `notes`: what of the picture it cannot give back."""

    request: dict[str, Any]
    source: Source
    notes: list[str]


_ANSWERS = document.gives(
    "The request; with run the picture, as /post_config answers it.",
    {
        **{kind: body["schema"] for kind, body in PICTURES[200]["content"].items()},
        "application/json": {"anyOf": [document.schema(ReplayResponse, "serialization"), document.schema(GenerationResponse, "serialization")]},
    },
    headers=answering.HEADERS,
)


@router.post(
    "/replay",
    response_class=Response,
    responses=_ANSWERS | document.refuses(406, *document.WORK),
    openapi_extra=document.takes_query(ReplayParameters, {"image": 1}, ["image"], "Picture"),
)
async def post_replay(request: Request) -> Response:
    """The request that made a picture of Easel's or A1111's, read from the picture's metadata."""
    settings: Settings = request.app.state.settings
    asked, uploads = await reading.read_as(ReplayParameters, request, {"image": 1})
    if not uploads.get("image"):
        raise invalid_field("image", "is missing", "a multipart file part")
    picture = await asyncio.to_thread(images.describe, uploads["image"][0], settings.limits)
    found = await asyncio.to_thread(replay.read, picture, request.app.state.catalogue)
    if not asked.run:
        return JSONResponse(ReplayResponse(request=found.request, source=found.source, notes=found.told).model_dump())
    if found.needs or found.unmet:
        why = "; ".join(found.told[: len(found.told) - len(found.notes)])
        raise invalid_field("image", f"cannot be drawn again as it was: {why}", "without run the answer is the request as far as it goes, to send to /post_config")
    wanted = GenerationRequest.model_validate(found.request)
    accept = request.headers.get("accept", "*/*")
    answering.choose(accept, wanted)
    generation = await tasks.drawn(await tasks.planned(wanted, None, request), request)
    assert generation.ran is not None
    generation.ran.notes += found.notes
    if found.model_sha256 not in (None, generation.ran.model_sha256):
        generation.ran.notes.append("the model's weights are others than those that drew the original (another SHA-256)")
    return await tasks.answered(tasks.GENERATE, wanted, generation, accept)
