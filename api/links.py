"""GET /v1/images/files/{name}: a picture that an answer gave the URL of.

Who has the address may read it, without a key, as with OpenAI's: it is unguessable and short-lived. The gate
asks `opens`; every other address there needs a key, and then answers 404.
"""

from __future__ import annotations

from functools import lru_cache

from fastapi import APIRouter
from starlette.datastructures import URL
from starlette.responses import Response

from api import document
from core import images, settings
from core.links import Links
from core.problems import problem

PREFIX = "/v1/images/files/"
router = APIRouter(tags=["openai"])


@lru_cache(maxsize=1)
def links() -> Links:
    """This process's."""
    configured = settings.load().links
    return Links(configured.retention_s, configured.bytes)


def opens(path: str) -> bool:
    """Whether a path is the address of a picture that is still kept."""
    return path.startswith(PREFIX) and links().find(path.removeprefix(PREFIX)) is not None


def keep(data: bytes, media_type: str, base_url: str) -> str:
    """Keep a picture for a while; answers its whole URL, on the host that the caller called."""
    return str(URL(base_url).replace(path=PREFIX + links().keep(data, media_type)))


@router.get(
    PREFIX + "{name}",
    name="file",
    response_class=Response,
    responses=document.gives("The picture.", dict.fromkeys(images.MEDIA_TYPES.values(), document.FILE)) | document.refuses(401, 404),
    openapi_extra={"security": [{}]},
)
async def picture(name: str) -> Response:
    """A picture that was answered as a URL, for links.retention_s seconds; no key is needed."""
    kept = links().find(name)
    if kept is None:
        raise problem(404, "not-found", "Not found", "There is no such picture, or it is no longer kept.")
    return Response(kept.data, media_type=kept.media_type, headers={"Cache-Control": "private, max-age=300"})
