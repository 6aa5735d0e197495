"""GET /studio: the page for people who would rather look than call, and its files.

They are static and say nothing secret, so that api.gate lets `paths` through without a key; the page asks
for one, and calls the same routes as every other client. What it may do in a browser is bounded by `POLICY`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from core.problems import problem
from core.settings import ROOT

PATH = "/studio"
FOLDER = ROOT / "studio"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
# Scripts and styles from its own files alone, none inline; text is never parsed as HTML (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again by its ETag: a new version shows at once
}
router = APIRouter(tags=["studio"], include_in_schema=False)


@dataclass(frozen=True)
class File:
    """A file of the page as it is answered."""

    data: bytes
    media_type: str
    etag: str


@lru_cache(maxsize=1)
def files() -> dict[str, File]:
    """Every file of the page by its path; what is not among them is not served."""
    found = {}
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in _TYPES:
            data = file.read_bytes()
            path = PATH if file.name == "index.html" else f"{PATH}/{file.name}"
            found[path] = File(data, _TYPES[file.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


def paths() -> set[str]:
    """The paths that need no key: the page's own, exactly."""
    return {*files(), PATH + "/"}


@router.api_route(PATH, methods=["GET", "HEAD"])
@router.api_route(PATH + "/{name}", methods=["GET", "HEAD"])
async def file(request: Request) -> Response:
    """The page, or one of its files; 304 for who has it."""
    found = files().get(request.url.path)
    if found is None:
        raise problem(404, "not-found", "Not found", f"There is no {request.url.path[:200]}.")
    headers = {**_HEADERS, "ETag": found.etag}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.media_type, headers=headers)


@router.api_route(PATH + "/", methods=["GET", "HEAD"])
async def slash() -> Response:
    """To the page's own address, by which it finds its files."""
    return RedirectResponse("../studio", 308)
