"""POST /animate: an animation from a prompt, as GIF, WebP or MP4. BentoML's client gets the same file (`animate`)."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import bentoml
from fastapi import APIRouter, Request
from starlette.responses import Response

from api import answering, document, drawing, reading
from core import animation, metadata, settings
from core.animation import AnimationFormat, AnimationRequest
from core.catalogue import Catalogue
from core.generation import Generation

router = APIRouter(tags=["animation"])
_FORMATS: dict[str, AnimationFormat] = {kind: format for format, kind in animation.MEDIA_TYPES.items()}
_CONTENT = document.gives("The animation, by `format` or Accept.", dict.fromkeys(_FORMATS, document.FILE), headers=answering.HEADERS)


class AnimationApis:
    """The declaration, for a BentoML service to inherit; see api.typed."""

    @bentoml.api(input_spec=AnimationRequest)  # type: ignore[untyped-decorator]
    async def animate(self, **values: Any) -> Annotated[Path, bentoml.validators.ContentType("image/*")]:
        """Draw an animation from a prompt."""
        configured, wanted = settings.load(), reading.check(AnimationRequest, values)
        generation = await _generation(Catalogue(configured), wanted, "in-process", None)
        path = Path(tempfile.mkstemp(suffix=f".{wanted.format}")[1])
        path.write_bytes(await asyncio.to_thread(_file, generation, wanted, wanted.format, configured.metadata.embed))
        return path


@router.post("/animate", response_class=Response, responses=_CONTENT | document.refuses(406, *document.WORK), openapi_extra=document.takes_query(AnimationRequest))
async def animate(request: Request) -> Response:
    """Draw an animation from a prompt."""
    configured: settings.Settings = request.app.state.settings
    wanted, _ = await reading.read_as(AnimationRequest, request, {})
    asked = "format" in wanted.model_fields_set
    own = animation.MEDIA_TYPES[wanted.format]
    media_type = answering.negotiate(request.headers.get("accept", "*/*"), [own] if asked else [own, *(kind for kind in _FORMATS if kind != own)])
    generation = await _generation(request.app.state.catalogue, wanted, request.state.caller.id, request)
    assert generation.ran is not None
    started, format = time.perf_counter(), _FORMATS[media_type]
    body = await asyncio.to_thread(_file, generation, wanted, format, configured.metadata.embed)
    generation.ran.timing.encode = 1000 * (time.perf_counter() - started)
    headers = answering.describe(generation.ran, generation.seeds)
    headers["Content-Disposition"] = f'inline; filename="easel-{generation.seeds[0]}.{format}"'
    return Response(body, media_type=media_type, headers=headers)


async def _generation(catalogue: Catalogue, wanted: AnimationRequest, client: str, request: Request | None) -> Generation:
    plan = await asyncio.to_thread(animation.plan, catalogue, wanted, client)
    return await drawing.drawn(plan, request)


def _file(generation: Generation, wanted: AnimationRequest, format: AnimationFormat, embed: bool) -> bytes:
    text = metadata.texts(generation, 0).get("parameters") if embed else None
    return animation.encode(generation.pictures, wanted.fps, format, wanted.quality, text)
