"""POST /animate: an animation from a prompt, as GIF, WebP or MP4. BentoML's client gets the same file (`animate`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import bentoml
from fastapi import APIRouter, Request
from starlette.responses import Response

from api import answering, document, reading, tasks
from core.animation import FORMATS, AnimationRequest

router = APIRouter(tags=["animation"])
_CONTENT = document.gives("The animation, by `format` or Accept.", dict.fromkeys(FORMATS, document.FILE), headers=answering.HEADERS)


class AnimationApis:
    """The declaration, for a BentoML service to inherit; see api.typed."""

    @bentoml.api(input_spec=AnimationRequest)  # type: ignore[untyped-decorator]
    async def animate(self, **values: Any) -> Annotated[Path, bentoml.validators.ContentType("image/*")]:
        """Draw an animation from a prompt."""
        path = Path(tempfile.mkstemp(suffix=f".{reading.check(AnimationRequest, values).format}")[1])
        file = await tasks.in_process(tasks.ANIMATE, values)
        path.write_bytes(file)
        return path


@router.post("/animate", response_class=Response, responses=_CONTENT | document.works(406), openapi_extra=document.takes_query(AnimationRequest))
async def animate(request: Request) -> Response:
    """Draw an animation from a prompt."""
    return await tasks.respond(tasks.ANIMATE, request)
