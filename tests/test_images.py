"""Untrusted pictures become safe RGB or a clear problem, whatever they are."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from core import images
from core.plans import Pixels
from core.problems import Problem
from core.settings import Limits

LIMITS = Limits()


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    return images.to_pil(images.decode(data, LIMITS))


def refused(data: bytes, limits: Limits = LIMITS) -> int:
    with pytest.raises(Problem) as caught:
        images.decode(data, limits)
    return caught.value.details.status


def png_bomb(side: int) -> bytes:
    """A PNG that says it is side x side, with next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", images.FORMATS)
def test_each_known_format_keeps_its_colour(format: str) -> None:
    image = decoded(saved(Image.new("RGB", (8, 6), (200, 30, 40)), format))
    assert image.size == (8, 6)
    assert all(abs(a - b) < 8 for a, b in zip(image.getpixel((4, 3)), (200, 30, 40), strict=True))


def test_alpha_is_laid_on_white() -> None:
    assert decoded(saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(saved(Image.new("LA", (4, 4), (0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


def test_cmyk_becomes_rgb() -> None:
    red, green, blue = decoded(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = Image.new("I;16", (4, 4), 32768)
    assert abs(decoded(saved(grey, "PNG")).getpixel((0, 0))[0] - 128) <= 1


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    assert decoded(saved(Image.new("RGB", (10, 4)), "JPEG", exif=exif.tobytes())).size == (4, 10)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    red, _, blue = decoded(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((4, 4))
    assert red > 200
    assert blue < 50


def test_colour_profiles_are_converted_and_broken_ones_left_out() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (profile, b"not a profile"):
        image = decoded(saved(Image.new("RGB", (4, 4), (10, 200, 30)), "PNG", icc_profile=icc))
        assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((0, 0)), (10, 200, 30), strict=True))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (b"<!doctype html><html></html>", 415),
        (b"GIF89a", 415),
        (bytes(1000), 415),
        (saved(Image.new("RGB", (64, 64)), "PNG")[:60], 422),
        (saved(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:700], 422),
        (png_bomb(50_000), 413),
        (png_bomb(2_000), 422),
        (saved(Image.new("L", (1, 500)), "PNG"), 422),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 415),
    ],
)
def test_what_is_no_whole_picture_is_refused(data: bytes, status: int) -> None:
    assert refused(data) == status


def test_too_many_bytes_are_refused_before_decoding() -> None:
    assert refused(saved(Image.new("RGB", (8, 8)), "PNG"), Limits(image_bytes=10)) == 413


WHOLE = {f: saved(Image.linear_gradient("L").resize((24, 24)).convert("RGB"), f) for f in images.FORMATS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_files_never_raise_anything_but_a_problem(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(images.FORMATS))
    whole = bytearray(WHOLE[format])
    for _ in range(data.draw(st.integers(1, 12))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = images.decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]), LIMITS)
    except Problem as problem:
        assert 400 <= problem.details.status < 500
    else:
        assert len(pixels.data) == pixels.width * pixels.height * 3


def test_a_contact_sheet_holds_every_picture_in_its_place() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = images.to_pil(images.contact_sheet([Pixels(width=2, height=2, data=bytes(c) * 4) for c in colours]))
    assert sheet.size == (4, 4)
    assert [sheet.getpixel(p) for p in ((0, 0), (2, 0), (0, 2), (2, 2))] == [*colours, (255, 255, 255)]
