"""What is logged, and how: lines of text or of JSON, with the request's id and the job's, in the entry and in its runners.

service.py calls `configure`; api.gate begins each request, and others `note` what they learn of it for its one line
"answered". No prompt is logged, and no query string, unless server.log_prompts is on.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from bentoml._internal.configuration import get_debug_mode, get_quiet_mode
from bentoml._internal.context import server_context
from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from core.plans import Plan
from core.settings import Server, load

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
_noted: ContextVar[dict[str, Any] | None] = ContextVar("noted", default=None)
_TEXT = "%(asctime)s [%(levelname)s] [%(service)s] %(message)s"
JOB = "easel.job_id"  # the attribute of spans
_OURS = {*RESERVED_ATTRS, "service", "message", "asctime"}


def configure(server: Server) -> None:
    """Have this process log as the settings say, whatever BentoML has set up before."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(_tell)
    handler.setFormatter(_json() if server.log_format == "json" else _Text(_TEXT, "%Y-%m-%dT%H:%M:%S%z"))
    level = logging.ERROR if get_quiet_mode() else logging.DEBUG if get_debug_mode() else logging.INFO
    # Other libraries stay at warnings, in debug mode too: httpx tells addresses, and with them what was asked.
    for name, at in (("", logging.WARNING), ("easel", level), ("bentoml", level), ("uvicorn.error", logging.WARNING), ("circus", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if not name else [], True
        logger.setLevel(at)
    uvicorns = logging.getLogger("uvicorn.access")  # it would tell query strings, and so prompts
    uvicorns.handlers, uvicorns.propagate = [], False


def begin(request: str | None, job: str | None = None) -> None:
    """A request, or the work on a job, begins in this context: what is logged for it has its ids, and its span the job's."""
    request_id.set(request)
    _noted.set({})
    of_job(job)


def of_job(job: str | None) -> None:
    """What is logged from here on in this context is about a job."""
    job_id.set(job)
    if job:
        note(job_id=job)  # a route's context may end before its request's line
        trace.get_current_span().set_attribute(JOB, job)


def note(**fields: Any) -> None:
    """Tell more in the line that the request in hand ends with; without one, nothing happens."""
    if (noted := _noted.get()) is not None:
        noted.update(fields)


def of_plan(plan: Plan) -> dict[str, Any]:
    """What a line tells of a plan: its prompts too, where the settings say so."""
    prompts = {"prompt": plan.prompt, "negative_prompt": plan.negative_prompt} if load().server.log_prompts else {}
    return {"plan": plan.id, "model": plan.model_id, "task": plan.task, **prompts}


def noted() -> Mapping[str, Any]:
    """What was noted of the request in hand."""
    return _noted.get() or {}


def _tell(record: logging.LogRecord) -> bool:
    """Add to a record what its place and context know."""
    record.service = server_context.service_name or "easel"
    if id := request_id.get():
        record.request_id = id
    if job := job_id.get():
        record.job_id = job
    span = trace.get_current_span().get_span_context()
    if span.is_valid and span.trace_flags.sampled:
        record.trace_id, record.span_id = format(span.trace_id, "032x"), format(span.span_id, "016x")
    return True


def _json() -> JsonFormatter:
    return JsonFormatter(["levelname", "service", "name", "message"], rename_fields={"levelname": "level", "name": "logger"}, timestamp=True)


class _Text(logging.Formatter):
    """A line with what else is known of it at its end, in brackets."""

    def format(self, record: logging.LogRecord) -> str:
        more = " ".join(f"{name}={_one_word(value)}" for name, value in vars(record).items() if name not in _OURS)
        said = "".join(c if c.isprintable() else " " for c in record.getMessage())  # what callers send makes no line and no colour of its own
        record = logging.makeLogRecord({**vars(record), "msg": said + (f" ({more})" if more else ""), "args": None})
        return super().format(record)


def _one_word(value: object) -> str:
    """A value as it is, or as JSON where it would read as several, as the line's end or as another line."""
    text = str(value)
    return text if text.isprintable() and not re.search(r'[ "()=]', text) else json.dumps(value, default=str)
