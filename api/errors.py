"""How an error answer looks, by the contract that its path belongs to: problem JSON, but for OpenAI's paths.

api.gate and api.app write errors with it, so that a client of a contract finds its own shape whatever went wrong.
"""

from __future__ import annotations

import json

from pydantic import BaseModel

from core.problems import MEDIA_TYPE, Problem, ProblemDetails

OPENAI = "/v1/"
_CODES = {"unauthorized": "invalid_api_key", "invalid-parameters": "invalid_value", "queue-full": "rate_limit_exceeded", "too-large": "request_too_large"}


class OpenAIProblem(BaseModel):
    """What went wrong: `param` is the first field that cannot be honoured, `code` a stable name of the kind of error."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    error: OpenAIProblem


def media_type(path: str) -> str:
    """Of the errors at a path."""
    return "application/json" if path.startswith(OPENAI) else MEDIA_TYPE


def shape(path: str) -> type[BaseModel]:
    """Of the errors at a path."""
    return OpenAIError if path.startswith(OPENAI) else ProblemDetails


def translated(path: str, status: int) -> int:
    """OpenAI has no 422: what cannot be honoured is a 400 there."""
    return 400 if path.startswith(OPENAI) and status == 422 else status


def status(path: str, problem: Problem) -> int:
    return translated(path, problem.details.status)


def body(path: str, problem: Problem) -> bytes:
    return json.dumps(openai(problem).model_dump()).encode() if path.startswith(OPENAI) else problem.body()


def openai(problem: Problem) -> OpenAIError:
    """The problem in OpenAI's shape; what is allowed goes into the message."""
    details = problem.details
    slug = details.type.rsplit(":", 1)[-1]
    kind = "server_error" if details.status >= 500 else "rate_limit_error" if details.status == 429 else "invalid_request_error"
    allowed = [f"{e.field} allows {e.allowed if isinstance(e.allowed, str) else ', '.join(e.allowed)}" for e in details.errors if e.allowed]
    message = ". ".join([details.detail.rstrip("."), *allowed]) + "."
    param = details.errors[0].field if details.errors else None
    return OpenAIError(error=OpenAIProblem(message=message, type=kind, param=param, code=_CODES.get(slug, slug.replace("-", "_"))))
