"""Tasks of contracts that translate: their own request beside what it asks for, and an answer in their own shape.

As api.tasks has those that POST /jobs takes, api.openai, api.a1111 and api.replay make theirs of these, so that
`Prefer: respond-async` leaves a job behind whose result is what their route would have answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

from api import answering, tasks
from api.backend import Service
from api.tasks import JSON, Task, Uploads
from core.generation import Generation
from core.plans import Plan
from core.problems import Problem, renamed

A = TypeVar("A", bound=BaseModel)
W = TypeVar("W", bound=BaseModel)
T = TypeVar("T", bound="Translated[Any, Any]")
M = TypeVar("M", bound=BaseModel)


class Translated(BaseModel, Generic[A, W]):
    """What a client of a contract asked, and what that means. Files are beside it, not in it."""

    asked: A
    wanted: W

    @property
    def format(self) -> Any:
        return getattr(self.wanted, "format")  # noqa: B009  # of those that pictures come of

    @property
    def quality(self) -> Any:
        return getattr(self.wanted, "quality")  # noqa: B009


def task(
    name: str,
    model: type[T],
    plan: Callable[[Any, Uploads, str], Plan],
    made: Callable[[T, Generation], M],
    parts: Mapping[str, int] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    headers: bool = False,
    service: Service = "StableDiffusion",
    pictures: bool = True,
) -> Task[T, M]:
    """A task whose answer is JSON of the contract's own.

    Args:
        plan: of what is wanted, as a task's.
        names: what the contract calls the fields of what is wanted, where it has names of its own.
        headers: whether the answer says in headers what ran.
    """

    def planned(translated: T, uploads: Uploads, client: str) -> Plan:
        try:
            return plan(translated.wanted, uploads, client)
        except Problem as problem:
            raise renamed(problem, names or {}) from None

    def answer(translated: T, generation: Generation, _: str) -> Response:
        assert generation.ran is not None
        told = answering.describe(generation.ran, generation.seeds) if headers else {}
        return Response(made(translated, generation).model_dump_json(exclude_none=headers), media_type=JSON, headers=told)

    return tasks.known(Task(name, model, planned, lambda *_: JSON, answer, made, parts or {}, JSON, service, pictures))
