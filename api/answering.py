"""From a generation to an HTTP answer: by `Accept`, one picture, a contact sheet, ZIP, multipart or JSON.

Headers tell what ran. Their values are ours or checked; a prompt never goes into a header.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
import zipfile
from typing import Any

import mimeparse
from pydantic import BaseModel
from starlette.responses import Response

from core import animation, images, metadata
from core.animation import AnimationFormat, AnimationRequest
from core.generation import Generation, Ran
from core.multimodal import PicturesRequest
from core.problems import problem
from core.requests import GenerationRequest, ImageFormat
from core.upscaling import UpscaleRequest

_IMAGES: dict[str, ImageFormat] = {"image/webp": "webp", "image/jpeg": "jpeg", "image/png": "png"}
_OTHERS = ("application/zip", "multipart/mixed", "application/json")
# The headers of `describe`, and what they say.
HEADERS = {
    "X-Easel-Seeds": "The pictures' seeds.",
    "X-Easel-Model": "The model that ran.",
    "X-Easel-Model-Sha256": "Of its weights.",
    "X-Easel-Scheduler": "As diffusers calls it.",
    "X-Easel-Size": "Width x height of what was drawn, pixels.",
    "X-Easel-Dtype": "The precision.",
    "X-Easel-Device": "Where it ran.",
    "X-Easel-Steps": "Denoising steps that were run.",
    "X-Easel-Guidance-Scale": "Classifier-free guidance.",
    "X-Easel-Prompt-Tokens": "Tokens of the prompt.",
    "X-Easel-Prompt-Tokens-Cut": "Tokens that the model could not read.",
    "X-Easel-Licence": "The model's.",
    "X-Easel-Commercial-Use": "allowed or not allowed, by the licences of all that ran.",
    "X-Easel-Credit": "Who must be named.",
    "Server-Timing": "Milliseconds in each stage.",
    "X-Easel-Hires": "The second pass of hires-fix.",
    "X-Easel-Upscale": "What was made larger, and how.",
    "X-Easel-Loras": "The LoRAs that acted: weight, layers reached, layers unmatched.",
    "X-Easel-Embeddings": "The embeddings that acted.",
    "X-Easel-Worker": "The worker that drew it, of several.",
    "X-Easel-Degraded": "How it ran with less memory than usual.",
    "X-Easel-Flagged": "Seeds of the pictures that the safety checker replaced.",
    "X-Easel-Experiment": "The experiment, and the subject's variant.",
    "X-Easel-Controlnets": "The ControlNets that acted.",
    "X-Easel-Ip-Adapter": "The IP-Adapter that acted.",
    "X-Easel-Notes": "What else is to be known.",
}


class GenerationResponse(BaseModel):
    """The JSON answer: each picture in base64 with its seed, and what ran."""

    images: list[str]
    media_type: str
    seeds: list[int]
    ran: Ran


class CaptionResponse(BaseModel):
    """`captions[i][k]` is caption k of picture i, made with `seeds[k]`."""

    captions: list[list[str]]
    seeds: list[int]
    ran: Ran


class TextsResponse(BaseModel):
    texts: list[str]
    seeds: list[int]
    ran: Ran


class JointResponse(GenerationResponse):
    """Pictures, each with its text."""

    texts: list[str]


def choose(accept: str, request: GenerationRequest | PicturesRequest | UpscaleRequest) -> tuple[str, ImageFormat]:
    """The media type to answer with and the pictures' format.

    An `Accept` that names a picture type chooses the format, unless `format` was asked for.

    Raises:
        Problem: 406 where nothing that `accept` names can be had.
    """
    asked = "format" in request.model_fields_set
    own = images.MEDIA_TYPES[request.format]
    best = negotiate(accept, [own, *(() if asked else reversed(_IMAGES)), *_OTHERS])
    return best, _IMAGES.get(best, request.format)


def negotiate(accept: str, offers: list[str]) -> str:
    """The media type that `accept` likes best; of equals, the first.

    Raises:
        Problem: 406 where it likes none.
    """
    try:
        best = mimeparse.best_match(offers[::-1], accept or "*/*")
    except mimeparse.MimeTypeParseException:
        best = offers[0]
    if not best:
        raise problem(406, "not-acceptable", "Not acceptable", f"This can be had as {', '.join(dict.fromkeys(offers))}.")
    return str(best)


def answer(generation: Generation, request: GenerationRequest | PicturesRequest | UpscaleRequest, accept: str, embed: bool) -> Response:
    """Encode the pictures and build the response; for a worker thread."""
    media_type, format = choose(accept, request)
    return _build(generation, media_type, format, request.quality, embed)


def as_json(generation: Generation, request: GenerationRequest | PicturesRequest, embed: bool) -> GenerationResponse:
    """The JSON answer as a model, for the typed APIs; for a worker thread."""
    assert generation.ran is not None
    files = encode_all(generation, request.format, request.quality, embed)
    return GenerationResponse(
        images=[base64.b64encode(f).decode() for f in files],
        media_type=images.MEDIA_TYPES[request.format],
        seeds=generation.seeds,
        ran=generation.ran,
    )


def captions(generation: Generation) -> CaptionResponse:
    assert generation.ran is not None
    each, made = len(generation.seeds), generation.texts
    return CaptionResponse(captions=[made[i : i + each] for i in range(0, len(made), each)], seeds=generation.seeds, ran=generation.ran)


def texts(generation: Generation) -> TextsResponse:
    assert generation.ran is not None
    return TextsResponse(texts=generation.texts, seeds=generation.seeds, ran=generation.ran)


def animation_file(generation: Generation, request: AnimationRequest, format: AnimationFormat, embed: bool) -> bytes:
    text = metadata.texts(generation, 0).get("parameters") if embed else None
    return animation.encode(generation.pictures, request.fps, format, request.quality, text)


def _build(generation: Generation, media_type: str, format: ImageFormat, quality: int, embed: bool) -> Response:
    started = time.perf_counter()
    ran = generation.ran
    assert ran is not None
    many = len(generation.pictures) > 1
    if media_type in _IMAGES:
        picture = images.contact_sheet(generation.pictures) if many else generation.pictures[0]
        texts = metadata.texts(generation, 0) if embed else None
        body = images.encode(picture, format, quality, texts)
    else:
        files = encode_all(generation, format, quality, embed)
        body, media_type = _bundle(generation, files, media_type, format)
    ran.timing.encode = 1000 * (time.perf_counter() - started)
    headers = describe(ran, generation.seeds)
    if media_type in _IMAGES:
        headers["Content-Disposition"] = f'inline; filename="easel-{generation.seeds[0]}.{format}"'
    return Response(body, media_type=media_type, headers=headers)


def encode_all(generation: Generation, format: ImageFormat, quality: int, embed: bool) -> list[bytes]:
    """Each picture as a file, with its own metadata where `embed` says so."""
    return [encode(generation, i, format, quality, embed) for i in range(len(generation.pictures))]


def encode(generation: Generation, index: int, format: ImageFormat, quality: int, embed: bool) -> bytes:
    """One of the pictures, as `encode_all` does."""
    return images.encode(generation.pictures[index], format, quality, metadata.texts(generation, index) if embed else None)


def _bundle(generation: Generation, files: list[bytes], media_type: str, format: ImageFormat) -> tuple[bytes, str]:
    names = [f"{i:02d}-{seed}.{format}" for i, seed in enumerate(generation.seeds)]
    kind = images.MEDIA_TYPES[format]
    assert generation.ran is not None
    if media_type == "application/json":
        content: dict[str, Any] = {
            "images": [base64.b64encode(f).decode() for f in files],
            "media_type": kind,
            "seeds": generation.seeds,
            "ran": generation.ran.model_dump(),
        }
        return json.dumps(content, ensure_ascii=False).encode(), media_type
    if media_type == "application/zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, file in zip(names, files, strict=True):
                archive.writestr(name, file)
        return out.getvalue(), media_type
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Type: {kind}\r\nContent-Disposition: attachment; filename="{name}"\r\n\r\n'.encode() + file + b"\r\n"
        for name, file in zip(names, files, strict=True)
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/mixed; boundary={boundary}"


def describe(ran: Ran, seeds: list[int]) -> dict[str, str]:
    """What ran, as headers; stages' times as Server-Timing, in milliseconds."""
    timing = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in ran.timing.model_dump().items())
    headers = {
        "X-Easel-Seeds": ",".join(map(str, seeds)),
        "X-Easel-Model": ran.model_id,
        "X-Easel-Model-Sha256": ran.model_sha256,
        "X-Easel-Scheduler": f"{ran.scheduler} {ran.schedule}" if ran.schedule else ran.scheduler,
        "X-Easel-Size": f"{ran.width}x{ran.height}",
        "X-Easel-Dtype": ran.torch_dtype,
        "X-Easel-Device": ran.device,
        "X-Easel-Steps": str(ran.steps_run),
        "X-Easel-Guidance-Scale": f"{ran.guidance_scale:g}",
        "X-Easel-Prompt-Tokens": str(ran.prompt_tokens),
        "X-Easel-Prompt-Tokens-Cut": str(ran.prompt_tokens_cut),
        "X-Easel-Licence": ran.licence,
        "X-Easel-Commercial-Use": "allowed" if ran.commercial_use else "not allowed",
        "X-Easel-Credit": ", ".join(ran.credit) or "not required",
        "Server-Timing": timing,
    }
    if ran.hires:
        headers["X-Easel-Hires"] = f"{ran.hires.first[0]}x{ran.hires.first[1]};scale={ran.hires.scale:g};upscaler={ran.hires.upscaler};steps={ran.hires.steps};strength={ran.hires.strength:g}"
    if ran.upscale:
        headers["X-Easel-Upscale"] = f"{ran.upscale.first[0]}x{ran.upscale.first[1]};scale={ran.width / ran.upscale.first[0]:.4g};tiles={ran.upscale.tiles}"
    if ran.loras:
        headers["X-Easel-Loras"] = ", ".join(f"{x.name}:{x.weight:g};layers={x.layers};unmatched={x.unmatched}" for x in ran.loras)
    if ran.embeddings:
        headers["X-Easel-Embeddings"] = ", ".join(f"{x.name};vectors={x.vectors}" for x in ran.embeddings)
    if ran.worker:
        headers["X-Easel-Worker"] = ran.worker
    if ran.degraded:
        headers["X-Easel-Degraded"] = ran.degraded
    if ran.flagged is not None:
        headers["X-Easel-Flagged"] = ",".join(map(str, ran.flagged)) or "none"
    if ran.experiment:
        headers["X-Easel-Experiment"] = f"{ran.experiment}; variant={ran.variant}"
    if ran.controls:
        headers["X-Easel-Controlnets"] = ", ".join(f"{x.id}:{x.scale:g};preprocessor={x.preprocessor};start={x.start:g};end={x.end:g}" for x in ran.controls)
    if ran.ip_adapter:
        headers["X-Easel-Ip-Adapter"] = f"{ran.ip_adapter.id}:{ran.ip_adapter.scale:g};images={ran.ip_adapter.images}"
    if ran.notes:
        headers["X-Easel-Notes"] = "; ".join(ran.notes)
    return {name: _safe(value) for name, value in headers.items()}


def _safe(value: str) -> str:
    """Printable ASCII only: model ids and licences come from a file that people edit."""
    return "".join(c if " " <= c <= "~" else "?" for c in value)
