"""From an HTTP request to a checked model (a `GenerationRequest`, say) and safe pictures.

Parameters may stand in the query, a form or a JSON object, each name once; one that is a list may come
once for each of its values. A file is only taken
from a multipart part; a string where a file belongs (a URL, say) is refused, never fetched.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from core import images
from core.guides import MAX_IMAGES
from core.inpainting import SIDES
from core.plans import Inputs
from core.problems import from_validation, invalid_field, nearest, problem
from core.requests import GenerationRequest
from core.settings import Limits

Checked = TypeVar("Checked", bound=BaseModel)
_BODIES = "multipart/form-data, application/x-www-form-urlencoded, application/json"


# The form parts of a request for pictures, and how many of each.
GUIDES = {"control_image": MAX_IMAGES, "ip_adapter_image": MAX_IMAGES}
MOST_VALUES = 50_000  # of JSON, by its commas, those of prompts among them: each may be an error to tell
PARTS = {"image": 1, "mask": 1, **GUIDES}


async def read(request: Request, limits: Limits, parts: dict[str, int] = PARTS) -> tuple[GenerationRequest, Inputs]:
    """The request and the pictures that came with it.

    Raises:
        Problem: 400 for a body that cannot be read, 413, 415, or 422 naming each wrong field.
    """
    parsed, uploads = await read_as(GenerationRequest, request, parts)
    return parsed, await asyncio.to_thread(pictures, uploads, limits)


def pictures(uploads: dict[str, list[bytes]], limits: Limits) -> Inputs:
    """The uploads of a request for pictures, by the names of their parts, decoded.

    Raises:
        Problem: 413, 415 or 422 as core.images says.
    """
    image, mask = (files[0] if (files := uploads.get(name)) else None for name in ("image", "mask"))
    return Inputs(
        image=images.decode(image, limits) if image is not None else None,
        mask=images.decode_mask(mask, limits) if mask is not None else None,
        **{name: [images.decode(file, limits, name) for file in uploads.get(name, [])] for name in GUIDES},
    )


def painted(wanted: GenerationRequest, uploads: dict[str, list[bytes]], limits: Limits) -> Inputs:
    """As `pictures`, for inpainting: without a mask and sides to grow, what is transparent in the image is repainted.

    Raises:
        Problem: as `pictures`; 422 where there is nothing to repaint.
    """
    inputs = pictures(uploads, limits)
    if inputs.image is None:
        raise invalid_field("image", "is missing", "a multipart file part")
    if inputs.mask is None and not any(getattr(wanted, side) for side in SIDES):
        inputs = inputs.model_copy(update={"mask": images.transparency(uploads["image"][0], limits)})
        if inputs.mask is None:
            raise invalid_field("mask", "is missing, and nothing of image is transparent", "a multipart file part, or outpaint_*")
    return inputs


async def read_as(kind: type[Checked], request: Request, parts: dict[str, int]) -> tuple[Checked, dict[str, list[bytes]]]:
    """The request as `kind`, and its uploads by the names of their parts, at most so many of each.

    Raises:
        Problem: as `read`.
    """
    values: dict[str, Any] = {}
    lists = {name for name, field in kind.model_fields.items() if "list[" in str(field.annotation)}
    _take(values, _gathered(request.query_params.multi_items(), lists))
    uploads: dict[str, list[bytes]] = {}
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields, uploads = await _read_form(request, parts)
        _take(values, _gathered(fields, lists))
    elif media_type == "application/json":
        _take(values, (await read_json(request)).items())
    elif body := await request.body():
        raise problem(415, "unsupported-media-type", "Unsupported media type", f"The body ({len(body)} bytes) has the type {media_type[:80] or 'none'!r}; allowed: {_BODIES}.")
    for name in PARTS.keys() & values.keys():
        raise invalid_field(name, "must be a file, not text", "a multipart file part", values[name])
    return check(kind, values), uploads


def prefers_async(request: Request) -> bool:
    """Whether the client would rather not wait for the work (RFC 7240)."""
    return "respond-async" in (p.strip().lower() for p in request.headers.get("prefer", "").split(","))


def idempotency_key(request: Request) -> str | None:
    """The request's own key, by which jobs know that it was sent before.

    Raises:
        Problem: 422 where it is not fit for one.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise invalid_field("Idempotency-Key", "is not fit for one", "1 to 255 printable ASCII characters")
    return key


def parse(values: dict[str, Any]) -> GenerationRequest:
    """Check plain values as a GenerationRequest; raises as `check`."""
    return check(GenerationRequest, values)


def check(kind: type[Checked], values: dict[str, Any]) -> Checked:
    """Check plain values.

    Raises:
        Problem: 422 naming each wrong field, unknown names with the nearest known one.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise from_validation(error, kind.model_fields) from None


def _take(values: dict[str, Any], items: Any) -> None:
    for name, value in items:
        if name in values:
            raise invalid_field(name[:80], "is given more than once", "once")
        values[name] = value


def _gathered(items: list[tuple[str, Any]], lists: set[str]) -> list[tuple[str, Any]]:
    """The values of a list that come one by one, as one."""
    each: dict[str, list[Any]] = {}
    for name, value in items:
        if name in lists:
            each.setdefault(name, []).append(value)
    together = [(name, values[0] if len(values) == 1 else values) for name, values in each.items()]
    return [*together, *((name, value) for name, value in items if name not in lists)]


async def _read_form(request: Request, parts: dict[str, int]) -> tuple[list[tuple[str, Any]], dict[str, list[bytes]]]:
    fields: list[tuple[str, Any]] = []
    uploads: dict[str, list[bytes]] = {}
    try:
        form = await request.form(max_files=sum(parts.values()) + 3, max_fields=100)
    except HTTPException as error:
        raise problem(400, "bad-form", "Malformed form", f"The form cannot be read: {error.detail}") from None
    except (ValueError, KeyError, RuntimeError):
        raise problem(400, "bad-form", "Malformed form", "The form cannot be read.") from None
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields.append((name, _plain(value)))
            elif name not in parts:
                message = f"unknown file{nearest(name, list(parts))}" if parts else "takes no file here"
                raise invalid_field(name[:80] or "file", message, list(parts) or None)
            elif len(uploads.setdefault(name, [])) == parts[name]:
                raise invalid_field(name, "is given more than once", "once") if parts[name] == 1 else invalid_field(name, "is given too often", f"at most {parts[name]} times")
            else:
                uploads[name].append(await value.read())
    finally:
        await form.close()
    return fields, uploads


def _plain(text: str) -> str | None:
    """BentoML's client sends form values as JSON: `null`, `"text"`. Others mean what they say."""
    if text == "null":
        return None
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of its names once."""
    values: dict[str, Any] = {}
    _take(values, pairs)
    return values


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Problem: 400 where it is none, 422 where it has more values than any request.
    """
    data = await request.body()
    if data.count(b",") > MOST_VALUES:
        raise invalid_field("body", "has too many values", f"at most {MOST_VALUES}")
    try:
        body = json.loads(data, parse_constant=float, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise problem(400, "bad-json", "Malformed JSON", "The body is not JSON.") from None
    if not isinstance(body, dict):
        raise problem(400, "bad-json", "Malformed JSON", "The body must be a JSON object.")
    return body
