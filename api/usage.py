"""Accounting: each answer is written into the usage log, and GET /admin/usage reports from it."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal

import mimeparse
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, BeforeValidator
from starlette.responses import JSONResponse, Response

from api import document
from core import settings
from core.generation import Generation
from core.plans import Plan
from core.problems import invalid_field, nearest, problem, unavailable
from core.usage import ERRORS, GROUPS, SCHEMA, Group, Ledger, address

router = APIRouter(tags=["admin"])


@lru_cache(maxsize=1)
def ledger() -> Ledger | None:
    """This process's log; None where there is to be none."""
    url = address(settings.load().usage)
    return Ledger(url) if url else None


def prepare() -> None:
    """Look at the log before anything starts. Raises: LaterVersion: where it is a later Easel's."""
    if log := ledger():
        SCHEMA.check(log.url)


async def record(plan: Plan, generation: Generation) -> None:
    """Write a request down, off the event loop; never raises."""
    if log := ledger():
        await asyncio.to_thread(log.append, plan, generation)


def made_today(client: str) -> int:
    """How many pictures a key has had made since the day (UTC) began, at every entry that shares the log.

    Raises:
        SQLAlchemyError, OSError: where the log cannot be read.
    """
    log, midnight = ledger(), datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return log.pictures_since(midnight, client) if log else 0


def _written(given: object) -> object:
    """Refuse a number, which pydantic would take for seconds of an epoch."""
    if isinstance(given, str) and given.strip().replace(".", "").lstrip("+-").isdigit():
        raise ValueError("is a number, and no date; allowed: ISO 8601, such as 2026-11-26T12:00:00Z")
    return given


Time = Annotated[datetime, BeforeValidator(_written)]


class UsageLine(BaseModel):
    """What was made for one group; of the group, what was asked for in group_by."""

    key: str | None = None
    model: str | None = None
    lora: str | None = None
    day: str | None = None
    commercial: str | None = None
    requests: int
    pictures: int
    picture_steps: int
    flagged: int


class UsageReport(BaseModel):
    since: str | None
    until: str | None
    group_by: list[str]
    usage: list[UsageLine]


_CONTENT = document.gives("The report, by `format` or Accept.", {"application/json": UsageReport, "text/csv": {"type": "string"}}) | document.refuses(406, 503)


@router.get("/admin/usage", response_class=Response, responses=_CONTENT)
async def usage(
    request: Request,
    since: Annotated[Time | None, Query(description="ISO 8601, included; UTC where it has no offset.")] = None,
    until: Annotated[Time | None, Query(description="ISO 8601, not included.")] = None,
    group_by: Annotated[str, Query(description=f"Of {', '.join(GROUPS)}; several separated by commas; empty for the total.")] = "key,model,lora",
    format: Annotated[Literal["json", "csv"] | None, Query(description="Instead of Accept.")] = None,
) -> Response:
    """Requests, pictures and picture-steps by key (hashed), model, LoRA, day (UTC) or commercial use (admin key)."""
    log = ledger()
    if log is None:
        raise unavailable("There is no usage log: usage.path and usage.store are null in configuration.yaml.", slug="usage-off")
    groups, chosen = _groups(group_by), format or _negotiate(request.headers.get("accept", "*/*"))
    since, until = (t.replace(tzinfo=t.tzinfo or UTC) if t else None for t in (since, until))
    try:
        lines = await asyncio.to_thread(log.report, since, until, groups)
    except ERRORS as error:
        reason = getattr(error, "orig", None) or error  # of SQLAlchemy's, without the statement
        raise unavailable(f"The usage log cannot be read: {reason}", slug="usage-unreadable") from error
    rows = [{**line.group, "requests": line.requests, "pictures": line.pictures, "picture_steps": line.picture_steps, "flagged": line.flagged} for line in lines]
    if chosen == "json":
        times = {name: t.isoformat() if t else None for name, t in (("since", since), ("until", until))}
        return JSONResponse({**times, "group_by": groups, "usage": rows})
    return Response(table(rows, [*groups, "requests", "pictures", "picture_steps", "flagged"]), media_type="text/csv", headers={"Content-Disposition": 'attachment; filename="usage.csv"'})


def table(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _no_formula(value: object) -> object:
    """A cell that a spreadsheet would compute (a LoRA's name is its maker's) with the mark of a text before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _groups(text: str) -> list[Group]:
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    found: list[Group] = [group for name in names for group in GROUPS if group == name]
    for name in names:
        if name not in GROUPS:
            raise invalid_field("group_by", f"there is no group {name[:40]!r}{nearest(name, GROUPS)}", GROUPS, name)
    if len(set(found)) < len(found):
        raise invalid_field("group_by", "names a group more than once", GROUPS, text)
    return found


def _negotiate(accept: str) -> str:
    try:
        best = mimeparse.best_match(["text/csv", "application/json"], accept or "*/*")
    except mimeparse.MimeTypeParseException:
        best = "application/json"
    if not best:
        raise problem(406, "not-acceptable", "Not acceptable", "This can be had as application/json or text/csv.")
    return "csv" if best == "text/csv" else "json"
