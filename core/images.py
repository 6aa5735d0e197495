"""Pictures in and out: untrusted bytes to safe RGB, RGB to PNG, JPEG or WebP.

The only place where Pillow opens what a client sent. The format is read from the bytes (never
from a name or a Content-Type), and size and frames are checked before pixels are decoded.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from core import png, tracing
from core.plans import Pixels
from core.problems import Problem, invalid_field, problem
from core.requests import ImageFormat
from core.settings import Limits

T = TypeVar("T")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

# The limit is ours, checked below with a clear answer, not Pillow's warning.
Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, limits: Limits, field: str = "image") -> Pixels:
    """Turn an upload into RGB: first frame, EXIF orientation applied, alpha laid on white, ICC to
    sRGB, 16 bits to 8.

    Raises:
        Problem: as `_decoded`.
    """
    return _decoded(data, limits, field, lambda opened: _pixels(_rgb(opened)))


def decode_mask(data: bytes, limits: Limits) -> Pixels:
    """As `decode`, for a mask, which must have no transparent pixels: some programs repaint those, and others keep them.

    Raises:
        Problem: as `_decoded`; 422 for transparent pixels.
    """

    def opaque(opened: Image.Image) -> Pixels:
        if _transparency(opened) is not None:
            raise invalid_field("mask", "has transparent pixels, which mean different things to different programs", "white where to repaint, black where to keep, no transparency")
        return _pixels(_rgb(opened))

    return _decoded(data, limits, "mask", opaque)


def transparency(data: bytes, limits: Limits, field: str = "image") -> Pixels | None:
    """What of a picture is transparent, as a mask: white for transparent, black for opaque; None where nothing is.

    Raises:
        Problem: as `_decoded`.
    """

    def inverted(opened: Image.Image) -> Pixels | None:
        ImageOps.exif_transpose(opened, in_place=True)
        alpha = _transparency(opened)
        opened.close()
        return None if alpha is None else _pixels(ImageOps.invert(alpha).convert("RGB"))

    return _decoded(data, limits, field, inverted)


@dataclass(frozen=True)
class Description:
    """What a picture file says of itself: its size as it is shown, and its texts by their keywords."""

    format: str  # of FORMATS
    width: int
    height: int
    texts: dict[str, str]


def describe(data: bytes, limits: Limits, field: str = "image") -> Description:
    """A picture's metadata: the text chunks of a PNG, and what is in EXIF UserComment as `parameters`.

    Raises:
        Problem: as `_decoded`.
    """

    def read(opened: Image.Image) -> Description:
        texts = {str(key): str(value) for key, value in opened.info.items() if isinstance(key, str) and isinstance(value, str)}
        exif = opened.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        if isinstance(comment, bytes) and (text := _user_comment(comment)):
            texts.setdefault("parameters", text)
        width, height = opened.size if exif.get(ExifTags.Base.Orientation, 1) not in (5, 6, 7, 8) else opened.size[::-1]
        return Description(opened.format or "", width, height, texts)

    return _decoded(data, limits, field, read)


def _user_comment(comment: bytes) -> str:
    """The text of an EXIF UserComment. A1111 writes UTF-16, big-endian; some write it the other way round, or plain text."""
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\x00":
        if body[:2] in (b"\xfe\xff", b"\xff\xfe"):
            return body.decode("utf-16", "replace")
        return body.decode("utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le", "replace")
    return (body if code in (b"ASCII\x00\x00\x00", bytes(8)) else comment).decode("utf-8", "replace").strip("\x00")


def _transparency(image: Image.Image) -> Image.Image | None:
    """The alpha channel, where it is not opaque all over."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = (image if image.mode == "RGBA" else image.convert("RGBA")).getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _decoded(data: bytes, limits: Limits, field: str, convert: Callable[[Image.Image], T]) -> T:
    """Open and load an upload within the limits, and convert it.

    Raises:
        Problem: 413 for too many bytes or pixels, 415 for what is no picture of a known format,
            422 for one that is broken.
    """
    if not data:
        raise invalid_field(field, "is empty", f"a picture as {', '.join(FORMATS)}")
    if len(data) > limits.image_bytes:
        raise problem(413, "image-too-large", "Image too large", f"{field} may have at most {limits.image_bytes} bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width < 1 or height < 1:
                    raise invalid_field(field, "has no pixels", "at least 1x1", f"{width}x{height}")
                if width * height > limits.image_pixels:
                    raise problem(
                        413, "image-too-large", "Image too large",
                        f"{field} is {width}x{height}; at most {limits.image_pixels} pixels are allowed.",
                    )
                if max(width, height) > 100 * min(width, height):
                    raise invalid_field(field, "is too narrow", "sides within 1:100", f"{width}x{height}")
                opened.load()
                return convert(opened)
    except Problem:
        raise
    except UnidentifiedImageError:
        raise problem(415, "not-an-image", "Not a picture", f"{field} is not a picture in {', '.join(FORMATS)}.") from None
    except MemoryError:
        raise problem(413, "image-too-large", "Image too large", f"{field} needs more memory than there is.") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise invalid_field(field, f"is broken: {_cause(error)}", f"a whole picture as {', '.join(FORMATS)}") from None


def _cause(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return text[:100] if text and isinstance(error, (OSError, SyntaxError, ValueError)) else "it cannot be decoded"


def _rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB. What it came from is closed on the way: of 50 million pixels, each copy is 190 MiB."""
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        _low, high = image.getextrema()
        top = 65535 if image.mode.startswith("I;16") or (isinstance(high, (int, float)) and high > 255) else 255
        image = image.convert("F").point(lambda value: value * (255 / top)).convert("L")
        profile = None
    if profile and image.mode in ("RGB", "RGBA", "L", "LA", "CMYK"):
        image = _to_srgb(image, profile)
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = _as(image, "RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        image.close()
        image = ground
    return _as(image, "RGB")


def _as(image: Image.Image, mode: str) -> Image.Image:
    """In another mode; in its own it is no copy."""
    if image.mode == mode:
        return image
    made = image.convert(mode)
    image.close()
    return made


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colour-managed to sRGB; a profile that cannot be used is left out, as browsers do."""
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    base = image.convert("RGB") if image.mode == "RGBA" else image.convert("L") if image.mode == "LA" else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        managed = ImageCms.profileToProfile(base, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if managed is None:
        return image
    if alpha is not None:
        managed.putalpha(alpha)
    return managed


def _pixels(image: Image.Image) -> Pixels:
    return Pixels(width=image.width, height=image.height, data=image.tobytes())


def resized(pixels: Pixels, width: int, height: int) -> Pixels:
    """By Lanczos; of another shape, what stands over on the longer side is cut off."""
    return _pixels(ImageOps.fit(to_pil(pixels), (width, height), Image.Resampling.LANCZOS))


def to_pil(pixels: Pixels) -> Image.Image:
    return Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)


@tracing.span("encode")
def encode(pixels: Pixels, format: ImageFormat, quality: int = 90, texts: dict[str, str] | None = None) -> bytes:
    """A picture file.

    Args:
        pixels: RGB.
        format: png, jpeg or webp; `quality` (1 to 100) is for the last two.
        texts: metadata; text chunks in a PNG, and its `parameters` in EXIF UserComment elsewhere.
    """
    if format == "png":
        info = PngImagePlugin.PngInfo()
        for key, text in (texts or {}).items():
            # A1111 writes tEXt where Latin-1 holds the text and iTXt where not; add_text does the same.
            info.add_text(key, text)
        return png.encode(pixels, [(kind, data) for kind, data, *_ in info.chunks])
    image, out = to_pil(pixels), io.BytesIO()
    comment = (texts or {}).get("parameters")
    exif = exif_user_comment(comment) if comment else b""
    image.save(out, format.upper(), quality=quality, exif=exif)
    return out.getvalue()


def exif_user_comment(text: str) -> bytes:
    """An EXIF block with one UserComment in Unicode (UTF-16, big-endian), as A1111 writes it."""
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"UNICODE\x00" + text.encode("utf-16-be", "surrogatepass")}
    return exif.tobytes()


def contact_sheet(pictures: list[Pixels]) -> Pixels:
    """All pictures (of one size) in one, row by row, as near a square as they go."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].width, pictures[0].height
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(to_pil(picture), (i % columns * width, i // columns * height))
    return _pixels(sheet)
