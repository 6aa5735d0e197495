"""The application with every contract's routes, mounted on each BentoML service.

One module per contract adds its router here; api.gate stands in front of all of it.
"""

from __future__ import annotations

import logging

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader, HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api import (
    a1111,
    a1111_lists,
    animate,
    document,
    errors,
    experiments,
    jobs,
    links,
    llm,
    loras,
    metrics,
    models,
    multimodal,
    openai,
    preprocess,
    replay,
    seed,
    studio,
    tasks,
    typed,
    upscaling,
    usage,
)
from core import __version__
from core import metrics as count
from core.problems import FieldError, Problem, invalid, problem, shown, unavailable
from core.settings import Settings

log = logging.getLogger("easel.api")
_DESCRIPTION = """Pictures from Stable Diffusion, SDXL and Flux; pictures, captions and embeddings from UniDiffuser; behind API keys and a queue.

Where an operation has several answers, Accept chooses among them. Parameters that are listed for the query may also stand in
a form or a JSON object, and the fields of a form in the query; each once. A runner that is served alone has every route, and answers
404 for the work of the other."""
# The gate has checked the key before a route runs; these tell the OpenAPI document so.
_SECURITY = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False))]


def build(settings: Settings) -> FastAPI:
    """The application for these settings."""
    app = FastAPI(
        title="Easel",
        description=_DESCRIPTION,
        version=__version__,
        dependencies=_SECURITY,
        generate_unique_id_function=document.operation_id,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.catalogue = tasks.catalogue("StableDiffusion")
    app.state.submit = jobs.submitted
    app.state.loras = loras.installer()
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(SQLAlchemyError, _store)
    contracts = (seed, replay, jobs, openai, a1111, a1111_lists, links, preprocess, animate, upscaling, multimodal, models, typed, loras, llm, experiments, usage, metrics, studio)
    for contract in contracts:
        app.include_router(contract.router)
    app.state.routes = [route for contract in contracts for route in contract.router.routes]
    document.complete(app)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    path = request.url.path
    count.problem(error)
    return Response(errors.body(path, error), errors.status(path, error), error.headers, errors.media_type(path))


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        FieldError(field=str(item["loc"][-1])[:80], message=item["msg"], given=shown(item.get("input")))
        for item in error.errors()
    ]
    return await _problem(request, invalid(found))


async def _store(request: Request, error: Exception) -> Response:
    log.error("the store of jobs: %s", type(error).__name__, exc_info=error)
    return await _problem(request, unavailable("The store of jobs does not answer.", retry_after=5, slug="job-store"))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title, headers = str(error.detail)[:100], dict(error.headers or {})
    if error.status_code == 405:  # Starlette tells the methods of the first route at this path alone
        path = request.url.path
        routes = [r for r in request.app.state.routes if r.path == path] or [r for r in request.app.state.routes if r.path_regex.match(path)]
        headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    made = problem(error.status_code, title.lower().replace(" ", "-"), title, f"{title}: {request.method} {request.url.path[:200]}", headers=headers)
    return await _problem(request, made)
