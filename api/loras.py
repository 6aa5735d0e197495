"""The LoRAs and embeddings over HTTP: what there is, for everyone; adding and changing it, for admins.

The seed's /add_new_lora and BentoML's typed calls do as POST /admin/loras does. api.gate asks for
the admin key; core.loras does the work.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api import document, reading, uploading
from core import settings
from core.loras import keeping
from core.loras.installing import Installer, Job
from core.loras.messages import (
    Added,
    AddLora,
    Changed,
    Embeddings,
    JobState,
    Listing,
    Removed,
    RemoveLora,
    Terms,
    UploadedLora,
    Verified,
)
from core.problems import invalid_field, nearest

router = APIRouter(tags=["loras"])
# RFC 9745: since when GET /add_new_lora is deprecated (24 November 2026).
_DEPRECATED = {"Deprecation": "@1795478400", "Link": '</docs>; rel="deprecation"'}
_PREFER = {"name": "Prefer", "in": "header", "required": False, "schema": {"type": "string"}, "description": "respond-async: as wait=false."}
_WAIT = {"name": "wait", "in": "query", "required": False, "schema": {"type": "boolean", "default": True}, "description": "false: answer 202 with a job at once, as `Prefer: respond-async` does."}
_SOURCE = {"name": "name", "in": "query", "required": True, "schema": {"type": "string"}, "description": "A name, a Civitai model or version id, MODEL@VERSION, or a page's address."}
_KIND = {"name": "kind", "in": "query", "required": False, "schema": {"type": "string", "enum": ["lora", "embedding"]}, "description": "What must come; a name is looked for among LoRAs if left out."}
_NAMED = {"parameters": [_SOURCE, _KIND, _WAIT, _PREFER]}
_WORDS = {"type": "string", "description": "Separated by commas."}
_WRITING = document.refuses(404, 409, 503, 507)
_FETCHING = document.refuses(404, 409, 410, 413, 499, 502, 503, 504, 507)
_ADDED = (
    document.gives("Added, or there already.", {"application/json": Added})
    | document.gives("Begun.", {"application/json": JobState}, 202, ["Location", "Preference-Applied"])
    | _FETCHING
)


@lru_cache(maxsize=1)
def installer() -> Installer:
    """This process's LoRAs."""
    return Installer(settings.load(), settings.secrets(), settings.configuration_path().parent)


@router.get("/get_available_loras")
async def get_available_loras() -> Listing:
    """Every LoRA with its trigger words, base model and rights."""
    return await asyncio.to_thread(keeping.listing, installer().registry)


@router.get("/get_available_embeddings")
async def get_available_embeddings() -> Embeddings:
    """Every embedding with its base model and rights; its name in a prompt or negative prompt stands for it."""
    return await asyncio.to_thread(keeping.embeddings, installer().registry)


@router.post("/list_loras")
async def list_loras() -> Listing:
    """The same, as the typed client asks for it."""
    return await get_available_loras()


@router.post("/add_new_lora", responses=_ADDED, openapi_extra=_NAMED)
async def add_new_lora(request: Request) -> Response:
    """Add a LoRA from Civitai (admin key). One that is there already answers 200 too."""
    return await _add(_named(request), request)


@router.get("/add_new_lora", deprecated=True, responses=_ADDED, openapi_extra=_NAMED)
async def add_new_lora_by_get(request: Request) -> Response:
    """As POST does; for callers of old."""
    response = await _add(_named(request), request)
    response.headers.update(_DEPRECATED)
    return response


@router.post("/admin/loras", responses=_ADDED, openapi_extra=document.takes_json(AddLora) | {"parameters": [_WAIT, _PREFER]})
async def add(request: Request) -> Response:
    """Add a LoRA from Civitai or from a hub repository."""
    return await _add(reading.check(AddLora, await reading.read_json(request)), request)


@router.post("/add_lora", responses=_FETCHING, openapi_extra=document.takes_json(AddLora))
async def add_lora(request: Request) -> Added:
    """The same, as the typed client asks for it: it waits for the LoRA."""
    return await installer().start(reading.check(AddLora, await reading.read_json(request))).result()


@router.post(
    "/admin/loras/upload",
    responses=_WRITING,
    openapi_extra=document.takes_form(UploadedLora, "UploadForm", {"file": 1}, ["file"], trigger_words=_WORDS, usage_rights={"type": "string"}),
)
async def upload(request: Request) -> Added:
    """Add a LoRA from a .safetensors file."""
    mine = installer()
    async with uploading.received(request, mine.registry.folder) as (fields, file):
        wanted = reading.check(UploadedLora, fields)
        return await asyncio.to_thread(keeping.take_upload, mine.registry, mine.settings, file, wanted)


@router.get("/admin/loras/jobs")
async def jobs() -> list[JobState]:
    """What is being added or was, the latest first."""
    return [job.state for job in reversed(installer().jobs.values())]


@router.get("/admin/loras/jobs/{id}", responses=document.refuses(404))
async def job(id: str) -> JobState:
    """One adding: its progress, then its result or error."""
    return installer().job(id).state


@router.delete("/admin/loras/jobs/{id}", responses=document.refuses(404))
async def cancel(id: str) -> JobState:
    """Stop an adding. One that is over stays as it is."""
    return (await installer().cancel(id)).state


@router.patch("/admin/loras/{name}", responses=_WRITING, openapi_extra=document.takes_json(Terms))
async def change(name: str, request: Request) -> Changed:
    """Edit trigger words and rights; answers the entry as it is then."""
    terms = reading.check(Terms, await reading.read_json(request))
    lora = await asyncio.to_thread(keeping.change, installer().registry, name, terms)
    return Changed(name=lora.name, lora=lora.entry())


@router.delete("/admin/loras/{name}", responses=_WRITING)
async def remove(name: str) -> Removed:
    """Remove a LoRA, and its weights where Easel downloaded them."""
    return await asyncio.to_thread(keeping.remove, installer().registry, name)


@router.post("/remove_lora", responses=_WRITING, openapi_extra=document.takes_json(RemoveLora))
async def remove_lora(request: Request) -> Removed:
    """The same, as the typed client asks for it."""
    return await remove(reading.check(RemoveLora, await reading.read_json(request)).name)


@router.post("/admin/loras/{name}/verify", responses=document.refuses(404, 503))
async def verify(name: str) -> Verified:
    """Hash the weights again and compare with what was registered."""
    return await asyncio.to_thread(keeping.verify, installer().registry, name)


def _named(request: Request) -> AddLora:
    """`name` of the query, and `kind`; beside them it has nothing but `wait`."""
    known = ["name", "kind", "wait"]
    for name, _ in request.query_params.multi_items():
        if name not in known:
            raise invalid_field(name[:80], f"unknown parameter{nearest(name, known)}", known)
        if len(request.query_params.getlist(name)) > 1:
            raise invalid_field(name, "is given more than once", "once")
    named = request.query_params.get("name", "").strip()
    if not named or len(named) > 500:
        raise invalid_field("name", "is missing" if not named else "is too long", "a name, a Civitai id or a page's address, of at most 500 characters")
    return reading.check(AddLora, {"source": named, "kind": request.query_params.get("kind")})


async def _add(wanted: AddLora, request: Request) -> Response:
    """Start, and wait as long as a request may take; else tell the job."""
    mine = installer()
    wait = _waits(request)
    job = mine.start(wanted)
    if wait:
        try:
            added = await asyncio.wait_for(job.result(), mine.settings.queue.deadline_s)
            return JSONResponse(added.model_dump(mode="json"))
        except TimeoutError:
            pass
    return _begun(job, asked=not wait)


def _waits(request: Request) -> bool:
    text = request.query_params.get("wait", "true").lower()
    if text not in ("true", "false", "1", "0"):
        raise invalid_field("wait", "is neither true nor false", ["true", "false"], text)
    return text in ("true", "1") and not reading.prefers_async(request)


def _begun(job: Job, asked: bool) -> Response:
    headers = {"Location": f"/admin/loras/jobs/{job.state.id}"}
    if asked:
        headers["Preference-Applied"] = "respond-async"
    return JSONResponse(job.state.model_dump(mode="json"), 202, headers)
