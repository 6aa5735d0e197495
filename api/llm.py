"""The seed's two routes to a language model: help with a prompt, and a plain question. core.llm asks it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from api import answering, document, reading
from core import settings
from core.llm import Assistant, Route
from core.requests import Text

router = APIRouter(tags=["llm"])


class Question(BaseModel):
    """What the two routes take."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    text: Text = Field(min_length=1, description="What to ask.")


class LlmResponse(BaseModel):
    """The JSON answer. `model` is the one that the upstream names; `truncated`: the answer was cut at its greatest length."""

    text: str
    model: str | None
    truncated: bool


_DOCUMENTED: dict[str, Any] = {
    "response_class": Response,
    "responses": document.gives("The answer.", {"text/plain": {"type": "string"}, "application/json": LlmResponse}, headers=["X-Easel-Notes"]) | document.refuses(406, 429, 502, 503, 504),
    "openapi_extra": document.takes_query(Question),
}


@lru_cache(maxsize=1)
def assistant() -> Assistant:
    """This process's way to the language model."""
    return Assistant(settings.load().llm, settings.secrets(), settings.load().server.log_prompts)


@router.get("/llm_prompt_assistance", **_DOCUMENTED)
async def llm_prompt_assistance(request: Request) -> Response:
    """Have a language model improve a prompt. Text, or JSON by Accept; with llm.kind legacy as the upstream answers."""
    return await _ask("llm_prompt_assistance", request)


@router.get("/llm_interface", **_DOCUMENTED)
async def llm_interface(request: Request) -> Response:
    """Ask a language model anything. Text, or JSON by Accept."""
    return await _ask("llm_interface", request)


async def _ask(route: Route, request: Request) -> Response:
    media_type = answering.negotiate(request.headers.get("accept", "*/*"), ["text/plain", "application/json"])
    question, _ = await reading.read_as(Question, request, {})
    answer = await assistant().ask(route, question.text)
    if answer.passed:
        return Response(answer.text, media_type=answer.passed)
    headers = {"X-Easel-Notes": "the answer was cut at its greatest length"} if answer.truncated else {}
    if media_type == "application/json":
        body = LlmResponse(text=answer.text, model=answer.model, truncated=answer.truncated).model_dump_json()
        return Response(body, media_type=media_type, headers=headers)
    return Response(answer.text, media_type=media_type, headers=headers)
