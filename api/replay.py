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
from api.tasks import Task, Uploads
from core import images, replay
from core.generation import Generation
from core.plans import Plan
from core.problems import invalid_field
from core.replay import Source
from core.requests import GenerationRequest, ImageFormat
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


class Again(BaseModel):
    """A request that is done again, and what is to be told beside."""

    wanted: GenerationRequest
    notes: list[str]
    model_sha256: str | None

    @property
    def format(self) -> ImageFormat:
        return self.wanted.format

    @property
    def quality(self) -> int:
        return self.wanted.quality


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
    responses=_ANSWERS | document.works(406),
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
    again = Again(wanted=GenerationRequest.model_validate(found.request), notes=found.notes, model_sha256=found.model_sha256)
    return await tasks.done(_REPLAY, again, {}, request)


def _plan(again: Again, _: Uploads, client: str) -> Plan:
    return tasks.catalogue("StableDiffusion").plan(again.wanted, None, client)


def _told(again: Again, generation: Generation) -> Generation:
    """What was made, with what is to be known of it."""
    assert generation.ran is not None
    other = again.model_sha256 not in (None, generation.ran.model_sha256)
    notes = ["the model's weights are others than those that drew the original (another SHA-256)"] if other else []
    return generation.model_copy(update={"ran": generation.ran.model_copy(update={"notes": [*generation.ran.notes, *again.notes, *notes]})})


def _answer(again: Again, generation: Generation, accept: str) -> Response:
    return tasks.GENERATE.answer(again.wanted, _told(again, generation), accept)


def _json(again: Again, generation: Generation) -> GenerationResponse:
    return tasks.GENERATE.made(again.wanted, _told(again, generation))


_REPLAY = tasks.known(Task("replay", Again, _plan, lambda again, accept: tasks.GENERATE.negotiate(again.wanted, accept), _answer, _json))
