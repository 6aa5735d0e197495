"""Everything that can go wrong with a request, as RFC 9457 problem details.

Raise `Problem` anywhere; api.gate and api.app turn it into `application/problem+json`, and a
runner hands its details to the entry service as data. Nothing else in Easel makes error bodies.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

MEDIA_TYPE = "application/problem+json"
# Takes a field that cannot be honoured: its name, what is wrong, what is allowed, and what was given.
Refuse = Callable[[str, str, str | list[str] | None, object], None]
MOST_TOLD = 30  # errors of one request


class FieldError(BaseModel):
    """One thing wrong with one field: what was sent, and what would do."""

    model_config = ConfigDict(frozen=True)
    field: str
    message: str
    allowed: str | list[str] | None = None
    given: str | None = None


class ProblemDetails(BaseModel):
    """The body of an error answer (RFC 9457), with `errors` for fields, `retry_after` seconds, and
    the `candidates` among which the caller must choose."""

    model_config = ConfigDict(frozen=True)
    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[FieldError] = []
    retry_after: int | None = None
    candidates: list[dict[str, Any]] | None = None


class Problem(Exception):
    """A request that cannot be served, and why. `headers` go into the answer."""

    def __init__(self, details: ProblemDetails, headers: dict[str, str] | None = None) -> None:
        super().__init__(details.detail)
        self.details = details
        self.headers = dict(headers or {})
        if details.retry_after is not None:
            self.headers.setdefault("Retry-After", str(details.retry_after))

    def body(self) -> bytes:
        return self.details.model_dump_json(exclude_none=True).encode()


def problem(status: int, slug: str, title: str, detail: str, **more: Any) -> Problem:
    """Make a Problem; `slug` becomes the stable type `urn:easel:problem:SLUG`."""
    headers = more.pop("headers", None)
    details = ProblemDetails(type=f"urn:easel:problem:{slug}", title=title, status=status, detail=detail, **more)
    return Problem(details, headers)


def invalid(errors: list[FieldError], in_all: int = 0) -> Problem:
    """422: the request is understood, and these fields of it cannot be honoured; of very many, the first and how many more.

    Args:
        in_all: how many there are, where `errors` are the first.
    """
    more = max(in_all, len(errors)) - MOST_TOLD
    return _invalid(errors if more <= 0 else [*errors[:MOST_TOLD], FieldError(field="request", message=f"has {more} more errors")])


def _invalid(errors: list[FieldError]) -> Problem:
    return problem(
        422,
        "invalid-parameters",
        "Invalid parameters",
        "; ".join(f"{e.field}: {e.message}" for e in errors),
        errors=errors,
    )


def invalid_field(field: str, message: str, allowed: str | Iterable[str] | None = None, given: object = None) -> Problem:
    """422 for a single field."""
    choices = allowed if allowed is None or isinstance(allowed, str) else list(allowed)
    return invalid([FieldError(field=field, message=message, allowed=choices, given=shown(given))])


def shown(value: object) -> str | None:
    """A value as an error may repeat it: short, and never a file's bytes."""
    if value is None or isinstance(value, (bytes, bytearray, memoryview)):
        return None
    text = str(value).encode("utf-8", "replace").decode()  # JSON may hold half a character
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"`, or nothing where no known name is near."""
    close = difflib.get_close_matches(name.lower(), {k.lower(): k for k in known}, n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def from_validation(error: ValidationError, known: Iterable[str]) -> Problem:
    """A pydantic error as a 422 that names each field and what it allows."""
    known = list(known)
    errors: list[FieldError] = []
    found = error.errors(include_url=False)
    for item in found[:MOST_TOLD]:
        field = ".".join(str(part) for part in item["loc"]).encode("utf-8", "replace").decode() or "request"
        if item["type"] == "extra_forbidden":
            message = f"unknown parameter{nearest(field[:80], known)}"
            errors.append(FieldError(field=field[:80], message=message, allowed=sorted(known)))
        else:
            message = item["msg"].removeprefix("Value error, ")
            limits = {k: v for k, v in item.get("ctx", {}).items() if isinstance(v, (int, float, str))}
            allowed = ", ".join(f"{k} {v}" for k, v in limits.items()) or None
            errors.append(FieldError(field=field, message=message, allowed=allowed, given=shown(item.get("input"))))
    return invalid(errors, len(found))


def renamed(problem: Problem, names: Mapping[str, str]) -> Problem:
    """The same problem, its fields under the names that a contract has for them."""
    errors = [e.model_copy(update={"field": names.get(e.field, e.field)}) for e in problem.details.errors]
    return Problem(_invalid(errors).details, problem.headers) if errors and problem.details.status == 422 else problem


def too_large(limit: int) -> Problem:
    return problem(413, "too-large", "Content too large", f"The request body may have at most {limit} bytes.")


def too_slow(rate: int) -> Problem:
    """The rest of the body is not waited for, so that the connection ends too."""
    detail = f"The body came too slowly: after server.patience_s it must bring {rate} bytes a second (server.least_rate)."
    return problem(408, "too-slow", "Request timeout", detail, headers={"Connection": "close"})


def cancelled() -> Problem:
    return problem(499, "cancelled", "Cancelled", "The request was cancelled; the work was stopped.")


def deadline_passed(seconds: float) -> Problem:
    return problem(
        504,
        "deadline-passed",
        "Deadline passed",
        f"The picture was not ready within {seconds:g} s; the work was stopped. "
        "Ask for fewer steps or a smaller size, or allow more time with deadline_s.",
    )


GONE = "runner-gone"


def runner_gone() -> Problem:
    """503 for work whose runner died."""
    return unavailable("The runner is not answering; it is being restarted.", retry_after=10, slug=GONE)


def unavailable(detail: str, retry_after: int | None = None, slug: str = "unavailable") -> Problem:
    return problem(503, slug, "Service unavailable", detail, retry_after=retry_after)
