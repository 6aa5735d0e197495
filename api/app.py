"""The application with every contract's routes, mounted on each BentoML service.

One module per contract adds its router here; api.gate stands in front of all of it.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api import (
    animate,
    errors,
    experiments,
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
    typed,
    upscaling,
    usage,
)
from core import __version__
from core import metrics as count
from core.catalogue import Catalogue
from core.problems import FieldError, Problem, ProblemDetails, invalid, problem, shown
from core.settings import Settings

# The gate has checked the key before a route runs; these tell the OpenAPI document so.
_SECURITY = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False))]
_ERRORS = {
    400: "The body cannot be read",
    401: "No valid key",
    403: "The key may not do this",
    404: "No such thing",
    406: "No such answer format",
    409: "It stands in the way of another, or leaves a choice",
    413: "Too many bytes or pixels",
    415: "Not a picture, or an unknown body type",
    422: "Invalid parameters, each named",
    429: "The queue is full; see Retry-After",
    502: "What was asked elsewhere did not answer as it should",
    503: "Not available now, and why",
    504: "The deadline passed",
    507: "Out of memory on the device, or of room on the disk",
}


def build(settings: Settings) -> FastAPI:
    """The application for these settings."""
    app = FastAPI(
        title="Easel",
        description="Pictures from Stable Diffusion, SDXL and Flux; pictures, captions and embeddings from UniDiffuser; behind API keys and a queue.",
        version=__version__,
        dependencies=_SECURITY,
        responses={code: {"description": text, "model": ProblemDetails} for code, text in _ERRORS.items()},
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.catalogue = Catalogue(settings)
    app.state.loras = loras.installer()
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    contracts = (seed, replay, openai, links, preprocess, animate, upscaling, multimodal, models, typed, loras, llm, experiments, usage, metrics)
    for contract in contracts:
        app.include_router(contract.router)
    app.state.routes = [route for contract in contracts for route in contract.router.routes]
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


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = str(error.detail)[:100]
    made = problem(error.status_code, title.lower().replace(" ", "-"), title, f"{title}: {request.method} {request.url.path[:200]}", headers=dict(error.headers or {}))
    return await _problem(request, made)
