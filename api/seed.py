"""The seed contract: POST /post_config, by the parameters and answers that its users know."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from api import answering, drawing, reading
from core.requests import GenerationRequest
from core.settings import Settings

router = APIRouter(tags=["generation"])


def documented(model: type[BaseModel], image: dict[str, Any] | None) -> dict[str, Any]:
    """A model's fields as query parameters, and the schema of the image part, for the OpenAPI document."""
    schema = model.model_json_schema()
    parameters = [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "description": field.pop("description", ""), "schema": field}
        for name, field in schema["properties"].items()
    ]
    if image is None:
        return {"parameters": parameters}
    parts = {"image": image, "mask": image, **{name: {"type": "array", "items": image} for name in reading.GUIDES}} if model is GenerationRequest else {"image": image}
    form = {"type": "object", "properties": parts}
    return {"parameters": parameters, "requestBody": {"required": False, "content": {"multipart/form-data": {"schema": form}}}}


PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One picture, or for several a contact sheet, ZIP, multipart or JSON by Accept.",
        "content": {
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp", "application/zip", "multipart/mixed")},
            "application/json": {"schema": {"$ref": "#/components/schemas/GenerationResponse"}},
        },
    }
}


@router.post("/post_config", response_class=Response, responses=PICTURES, openapi_extra=documented(GenerationRequest, {"type": "string", "format": "binary"}))
async def post_config(request: Request) -> Response:
    """Draw pictures from a prompt, and from an input image where one is sent, of which `mask` says what to repaint."""
    settings: Settings = request.app.state.settings
    wanted, inputs = await reading.read(request, settings.limits)
    accept = request.headers.get("accept", "*/*")
    answering.choose(accept, wanted)  # an answer that cannot be had is refused before the work
    generation = await drawing.drawn(await drawing.planned(wanted, inputs, request), request)
    return await answering.answer(generation, wanted, accept, settings.metadata.embed)
