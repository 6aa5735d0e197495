"""Animations (AnimateDiff): what may be asked, what it means for a model, and frames to a file.

api.animate reads the requests; a runner draws the frames of what is planned here.
"""

from __future__ import annotations

import io
from fractions import Fraction
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BeforeValidator, Field

from core.catalogue import Catalogue
from core.images import exif_user_comment, to_pil
from core.plans import Animation, Pixels, Plan
from core.problems import FieldError, invalid, nearest
from core.requests import GenerationRequest

AnimationFormat = Literal["gif", "webp", "mp4"]
MEDIA_TYPES: dict[AnimationFormat, str] = {"gif": "image/gif", "webp": "image/webp"}
if find_spec("av"):  # an extra, since its wheel has x264, which is under the GPL (docs/container.md)
    MEDIA_TYPES["mp4"] = "video/mp4"
FORMATS = {kind: format for format, kind in MEDIA_TYPES.items()}


def _format(value: object) -> object:
    name = value.lower() if isinstance(value, str) else value
    if name == "mp4" and name not in MEDIA_TYPES:
        raise ValueError("mp4 needs the package av, an extra that is not installed here (pip install 'easel[video]'); there are gif and webp")
    return name


class AnimationRequest(GenerationRequest):
    """A request for an animation: what a request for pictures has, without input pictures."""

    num_frames: int = Field(16, ge=2, le=1024, description="Frames; the motion adapter sees at most so many (32 or 24) at once.")
    fps: float = Field(8, gt=0, le=50, allow_inf_nan=False, description="Frames a second.")
    motion_adapter: str | None = Field(None, max_length=300, description="A motion adapter of animation.motion_adapters; the first that fits if left out.")
    format: Annotated[AnimationFormat, BeforeValidator(_format)] = Field("gif", description="The file format.")  # type: ignore[assignment]


def plan(catalogue: Catalogue, request: AnimationRequest, client: str) -> Plan:
    """Check a request, and fill in every default.

    Raises:
        Problem: 422 that lists the fields that cannot be honoured.
    """
    made, settings = catalogue.plan(request, None, client), catalogue.settings.animation
    family = catalogue.find(made.model_id).model.family
    errors: list[FieldError] = []

    def refuse(field: str, message: str, allowed: str | list[str], given: object) -> None:
        errors.append(FieldError(field=field, message=message, allowed=allowed, given=str(given)[:80]))

    if len(made.seeds) != 1:
        refuse("count_returned", "an answer has one animation", "1", len(made.seeds))
    if made.hires:
        refuse("hr_scale", "is for pictures, not for animations", "leave it out", request.hr_scale)
    fitting = {a.id: a for a in settings.motion_adapters if a.family == family}
    adapter = fitting.get(request.motion_adapter) if request.motion_adapter else next(iter(fitting.values()), None)
    if adapter is None and request.motion_adapter:
        refuse("motion_adapter", f"{made.model_id} ({family}) has no motion adapter {request.motion_adapter!r}{nearest(request.motion_adapter, fitting)}", list(fitting), request.motion_adapter)
    elif adapter is None:
        families = sorted({a.family for a in settings.motion_adapters})
        refuse("model_id", f"there is no motion adapter for {made.model_id} ({family})", f"a model of a family that has one: {', '.join(families) or 'none is configured'}", made.model_id)
    if adapter and request.num_frames > adapter.max_frames:
        refuse("num_frames", f"is more than {adapter.id} sees at once", f"2 to {adapter.max_frames}", request.num_frames)
    if (pixels := request.num_frames * made.width * made.height) > settings.max_pixels:
        refuse("num_frames", f"{request.num_frames} frames of {made.width}x{made.height} are too many pixels", f"at most {settings.max_pixels} pixels in all", pixels)
    if adapter and request.commercial and not adapter.commercial_use:
        refuse("commercial", f"the motion adapter {adapter.id} ({adapter.licence}) does not allow commercial use", "false, or another motion adapter", True)
    if errors:
        raise invalid(errors)
    assert adapter is not None
    own = adapter.model_dump(include=set(Animation.model_fields))
    return made.model_copy(update={"animation": Animation(motion_adapter=adapter.id, num_frames=request.num_frames, fps=request.fps, **own)})


def encode(frames: list[Pixels], fps: float, format: AnimationFormat, quality: int, parameters: str | None) -> bytes:
    """An animation file, which plays again and again.

    Args:
        frames: RGB, of one size (even sides for mp4).
        quality: 1 to 100, for webp and mp4.
        parameters: metadata: a GIF's or MP4's comment, a WebP's EXIF UserComment.
    """
    if format == "mp4":
        return _mp4(frames, fps, quality, parameters)
    out = io.BytesIO()
    images = [to_pil(frame) for frame in frames]
    if format == "webp":
        ends = [round(1000 * (i + 1) / fps) for i in range(len(images))]  # milliseconds, so that rounding does not add up
        durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        extra: dict[str, Any] = {"exif": exif_user_comment(parameters)} if parameters else {}
        images[0].save(out, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, quality=quality, **extra)
    else:
        ends = [10 * round(100 * (i + 1) / fps) for i in range(len(images))]  # a GIF counts in hundredths of a second
        durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        palettes = [image.quantize(256, method=Image.Quantize.MEDIANCUT) for image in images]
        extra = {"comment": parameters.encode()} if parameters else {}
        palettes[0].save(out, "GIF", save_all=True, append_images=palettes[1:], duration=durations, loop=0, optimize=False, **extra)
    return out.getvalue()


def _mp4(frames: list[Pixels], fps: float, quality: int, parameters: str | None) -> bytes:
    """H.264, 4:2:0; `quality` 90 is a CRF of 18."""
    import av  # heavy, and not needed to start


    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        if parameters:
            container.metadata["comment"] = parameters
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.options = {"crf": str(round(51 - quality * 33 / 90) if quality <= 90 else round(18 - (quality - 90) * 1.7)), "preset": "medium"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(to_pil(frame))))  # type: ignore[no-untyped-call]
        container.mux(stream.encode(None))
    return out.getvalue()
