"""Pictures in the making, as OpenAI's clients are sent them: server-sent events with partial images, then each picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

from fastapi.sse import format_sse_event
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api import errors, tasks
from api.routing import Runner
from core import images
from core.generation import Generation
from core.plans import Pixels, Plan
from core.problems import Problem
from core.requests import ImageFormat

POLL_S = 0.2
PREVIEW_QUALITY = 80  # of jpeg and webp
_drawing: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly
Kind = Literal["image_generation", "image_edit"]


class Streaming(BaseModel):
    """How a request wants its events, beside what it wants drawn."""

    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="With stream: at most so many pictures of how the first one is so far.")


async def streamed(plan: Plan, request: Request, kind: Kind, partial_images: int, format: ImageFormat, told: dict[str, Any], completed: Callable[[Generation], Awaitable[list[dict[str, Any]]]]) -> Response:
    """The answer, once there is something to send: what is refused before that is refused by its status.

    Args:
        told: what each event says of the picture.
        completed: what the event of each finished picture says beside its type.

    Raises:
        Problem: as `tasks.drawn`, as long as nothing is sent.
    """
    made = _made(plan, request, partial_images)
    first = await anext(made)

    async def events() -> AsyncIterator[bytes]:
        index, item = 0, first
        try:
            while not isinstance(item, Generation):
                file = await asyncio.to_thread(images.encode, item, format, PREVIEW_QUALITY)
                yield _event(f"{kind}.partial_image", b64_json=base64.b64encode(file).decode(), partial_image_index=index, created_at=int(time.time()), **told)
                index, item = index + 1, await anext(made)
            for picture in await completed(item):
                yield _event(f"{kind}.completed", created_at=int(time.time()), **picture)
        except Problem as problem:
            yield format_sse_event(event="error", data_str=errors.openai(problem).model_dump_json())
        finally:
            await made.aclose()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _made(plan: Plan, request: Request, partial_images: int) -> Any:
    """Previews of a plan's first picture, evenly over its steps as far as there is time to make them, and last what came of it."""
    items: asyncio.Queue[Pixels | Generation | Exception] = asyncio.Queue()
    gone = asyncio.Event()

    async def follow(runner: Runner) -> None:
        seen, given = None, 0
        while given < partial_images:
            with contextlib.suppress(Exception):  # a runner that does not answer is looked after elsewhere
                now = await asyncio.wait_for(runner.progress(plan.id, True), 3)
                if now.preview and now.preview_step != seen and now.progress and now.progress.steps and now.progress.steps_done / now.progress.steps >= (given + 1) / (partial_images + 1):
                    seen, given = now.preview_step, given + 1
                    items.put_nowait(now.preview)
            await asyncio.sleep(POLL_S)

    async def draw() -> None:
        try:
            items.put_nowait(await tasks.drawn(plan, request, gone=gone, follow=follow))
        except Exception as error:
            items.put_nowait(error)

    drawing = asyncio.create_task(draw())
    _drawing.add(drawing)
    drawing.add_done_callback(_drawing.discard)
    try:
        while True:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Generation):
                return
    finally:
        gone.set()  # not a cancel, which would not reach the runner


def _event(kind: str, **values: Any) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **values}))
