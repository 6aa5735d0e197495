"""The OpenAPI document (GET /openapi.json), made from the models that really read requests and write answers.

A route says with `takes_*`, `gives` and `refuses` what only it knows; `complete` adds what holds for all of them: what the
gate refuses, the shape of errors, the headers of answers, and the routes of health. Schemas carry the
definitions that they refer to in `$defs`, which `complete` moves to the document's components.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api import answering, errors
from core.jobs import JobSnapshot

Json = dict[str, Any]
Responses = dict[int | str, Json]
FILE: Json = {"type": "string", "format": "binary"}
FORM = "multipart/form-data"
_REFUSALS = {
    400: "The body cannot be read.",
    401: "No valid key.",
    403: "The key may not do this.",
    404: "There is no such thing here.",
    406: "It cannot be had in a form that Accept names.",
    408: "The body came too slowly.",
    409: "It stands in the way of another, or leaves a choice among `candidates`.",
    410: "It is no longer there.",
    413: "Too many bytes or pixels.",
    415: "Not a picture, or an unknown body type.",
    422: "What cannot be honoured, each field named.",
    429: "The queue is full, or the key has had what it may; see Retry-After.",
    499: "It was cancelled.",
    500: "The work failed on the device (generation-failed), or hung (hung, queue.hang_timeout_s), and its runner is started anew.",
    502: "What was asked elsewhere did not answer as it should.",
    503: "Not available now, and why.",
    504: "The deadline passed.",
    507: "Out of memory on the device, or of room on the disk.",
}
# What may stand in the way of work on a device, beside what holds for every POST.
_WORK = (404, 409, 500, 503, 504, 507)


def refuses(*statuses: int) -> Responses:
    """Error answers of a route, for `responses`."""
    return {status: {"description": _REFUSALS[status]} for status in statuses}


def works(*statuses: int) -> Responses:
    """The answers of a route that has something made, beside what is made: a job, where its client prefers that, and errors."""
    return refuses(*statuses, *_WORK) | gives("The job, where `Prefer: respond-async` asks for it.", {"application/json": JobSnapshot}, 202, ("Location", "Preference-Applied"))


def gives(description: str, content: Mapping[str, Json | type[BaseModel]], status: int = 200, headers: Iterable[str] = ()) -> Responses:
    """A good answer by its media types, for `responses`: each with a schema or a model, as it is written."""
    made: Json = {"description": description, "content": {kind: {"schema": schema(given, "serialization") if isinstance(given, type) else given} for kind, given in content.items()}}
    if headers:
        made["headers"] = {name: _header(name) for name in headers}
    return {status: made}


def takes_query(model: type[BaseModel], parts: Mapping[str, int] | None = None, needs: Iterable[str] = (), name: str = "") -> Json:
    """For a route that takes a model's fields in the query, and pictures in a form.

    Args:
        parts: the files, and how many of each at most; those that it `needs`; `name` is the form's own.
    """
    own = _plain(model.model_json_schema())
    required = own.get("required", ())
    made: Json = {"parameters": [{"name": field, "in": "query", "required": field in required, "description": given.pop("description", ""), "schema": given} for field, given in own["properties"].items()]}
    if parts:
        form = {"type": "object", "title": name, "properties": _files(parts), "required": list(needs), "additionalProperties": False}
        made["requestBody"] = {"required": bool(form["required"]), "content": {FORM: {"schema": _named(name, form)}}}
    return made


def takes_form(model: type[BaseModel], name: str, parts: Mapping[str, int], needs: Iterable[str] = (), **changed: Json) -> Json:
    """For a route that takes a model's fields and files in a form called `name`. `changed`: fields beside the model's,
    or that a form has in another way."""
    own = _plain(model.model_json_schema())
    own |= {"title": name, "properties": own["properties"] | _plain(changed) | _files(parts), "additionalProperties": False, "required": [*own.get("required", ()), *needs]}
    return {"requestBody": {"required": True, "content": {FORM: {"schema": _named(name, own)}}}}


def takes_json(model: type[BaseModel], needed: bool = True, **more: Json) -> Json:
    """For a route that takes a model as JSON; `more`: fields that it takes beside the model's."""
    own = schema(model)
    if more:
        own["$defs"][model.__name__]["properties"] |= more
        own["$defs"][model.__name__]["additionalProperties"] = False
    return {"requestBody": {"required": needed, "content": {"application/json": {"schema": own}}}}


def takes_either(first: Json, second: Json) -> Json:
    """For a route that takes what both do, by the type of its body. None is needed where all stands in the query; and
    openapi-python-client forgets an import where a body of several types is."""
    return {"requestBody": {"required": False, "content": first["requestBody"]["content"] | second["requestBody"]["content"]}}


def schema(model: type[BaseModel], mode: Any = "validation") -> Json:
    """A model, as a reference with its definitions beside it."""
    return _named(model.__name__, model.model_json_schema(mode=mode, ref_template="#/components/schemas/{model}"))


def operation_id(route: APIRoute) -> str:
    """Its name, behind its contract's; a page has none."""
    return f"{route.tags[0]}_{route.name}" if route.tags else route.name


def complete(app: FastAPI) -> None:
    """Give the application its whole document, made once when it is first asked for: a megabyte of small parts, which is not to be put together
    for each client."""
    sent = b""

    def openapi() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _completed(made)
        return app.openapi_schema

    async def answer(_: Request) -> Response:
        nonlocal sent
        sent = sent or json.dumps(openapi(), ensure_ascii=False, separators=(",", ":")).encode()
        return Response(sent, media_type="application/json")

    app.openapi = openapi  # type: ignore[method-assign]
    app.router.routes = [Route(r.path, answer) if isinstance(r, Route) and r.path == app.openapi_url else r for r in app.router.routes]


def _completed(made: Json) -> Json:
    for path, operations in _HEALTH.items():
        made["paths"][path] = {"get": {"tags": ["health"], "operationId": f"health_{path[1:]}", "summary": path[1:].title(), **deepcopy(operations)}}
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _preferences(path, operation)
            _refusals(path, method, operation)
            for status, answer in operation["responses"].items():
                answer["headers"] = {name: _header(name) for name in _HEADERS_OF.get(status, ("X-Request-Id",))} | answer.get("headers", {})
    schemas = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _hoist(made, schemas)
    made["components"]["schemas"] = dict(sorted(schemas.items()))
    return made


def _preferences(path: str, operation: Json) -> None:
    """The headers that routes heed which may answer a job of /jobs."""
    if "JobSnapshot" not in json.dumps(operation["responses"].get("202", {}).get("content", {})):
        return
    heeded = [("Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, "A key of the request's own, for what leaves a job: sent again within a day, the answer is the job that there is.")]
    if path != "/jobs":
        heeded.insert(0, ("Prefer", {"type": "string"}, "respond-async: answer 202 with a job at once."))
    operation.setdefault("parameters", []).extend({"name": name, "in": "header", "required": False, "schema": kind, "description": told} for name, kind, told in heeded)


def _refusals(path: str, method: str, operation: Json) -> None:
    """What holds for every route: it needs a key; a POST counts and is refused by a server that shuts down; what is sent is checked."""
    answers: Json = operation["responses"]
    if "HTTPValidationError" in json.dumps(answers.get("422", {})):  # FastAPI's, which it puts to every route with a parameter
        answers.pop("422")
    own = {int(status) for status in answers if int(status) >= 400}
    if operation.get("security") and {} not in operation["security"]:
        own |= {401, 403}
    if method == "post":
        own |= {429, 503}
    checked = any(one["in"] != "path" for one in operation.get("parameters", ()))
    if "requestBody" in operation or (checked and method == "post"):  # what is listed for the query may come in a body
        own |= {400, 408, 413, 415}
    if "requestBody" in operation or checked:
        own.add(422)
    told = {errors.translated(path, status): _REFUSALS[status] for status in sorted(own)}
    for status in own:
        answers.pop(str(status), None)
    kind, shape = errors.media_type(path), schema(errors.shape(path))
    answers |= {str(status): {"description": text, "content": {kind: {"schema": shape}}} for status, text in sorted(told.items())}


def _files(parts: Mapping[str, int]) -> Json:
    return {name: FILE if most == 1 else {"type": "array", "items": FILE, "maxItems": most} for name, most in parts.items()}


def _plain(node: Any) -> Any:
    """A schema as queries and forms can have it: without null, which they cannot send."""
    if isinstance(node, list):
        return [_plain(one) for one in node]
    if not isinstance(node, dict):
        return node
    if {"type": "null"} in (choices := node.get("anyOf", [])):
        rest = [one for one in choices if one != {"type": "null"}]
        node = {name: given for name, given in node.items() if name not in ("anyOf", "default")} | (rest[0] if len(rest) == 1 else {"anyOf": rest})
    return {name: _plain(given) for name, given in node.items()}


def _named(name: str, own: Json) -> Json:
    """A schema as a component, with those that it refers to."""
    return {"$ref": f"#/components/schemas/{name}", "$defs": {**own.pop("$defs", {}), name: own}}


def _hoist(node: Any, schemas: Json) -> None:
    """Move all definitions to the components.

    Raises:
        ValueError: where two models of one name differ.
    """
    if isinstance(node, list):
        for one in node:
            _hoist(one, schemas)
    elif isinstance(node, dict):
        if node.get("default", node) is None:  # FastAPI leaves it out of what it makes itself
            del node["default"]
        for name, own in node.pop("$defs", {}).items():
            _hoist(own, schemas)
            if schemas.setdefault(name, own) != own:
                raise ValueError(f"two schemas are called {name}")
        for one in list(node.values()):
            _hoist(one, schemas)


def _header(name: str) -> Json:
    return {"description": _HEADERS[name], "schema": {"type": "integer" if name == "Retry-After" else "string"}}


_HEADERS = {
    "X-Request-Id": "The request, as the server's log has it.",
    "Retry-After": "Seconds to wait before another try.",
    "WWW-Authenticate": "How to send a key.",
    "Location": "Where what was begun or made is.",
    "Preference-Applied": "respond-async, where that was asked for.",
    "Deprecation": "Since when the route is deprecated (RFC 9745).",
    **answering.HEADERS,
}
_HEADERS_OF = {"401": ("X-Request-Id", "WWW-Authenticate"), "429": ("X-Request-Id", "Retry-After"), "503": ("X-Request-Id", "Retry-After")}
_STATUS: Json = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
_READY: Json = {"type": "object", "properties": {"status": {"type": "string"}, "runners": {"type": "object", "additionalProperties": {"type": "string"}}}, "required": ["status", "runners"]}
_ALIVE: Json = {"description": "Whether the process answers; no key is needed.", "responses": {"200": {"description": "It does.", "content": {"application/json": {"schema": _STATUS}}}}}
_HEALTH: Json = {
    "/livez": _ALIVE,
    "/healthz": _ALIVE,
    "/readyz": {
        "description": "Whether requests can be served, and each runner's state; no key is needed.",
        "responses": {"200": {"description": "They can.", "content": {"application/json": {"schema": _READY}}}, "503": {}},
    },
}
