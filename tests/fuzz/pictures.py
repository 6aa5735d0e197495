"""The picture decoder under mutated real files of every format: a picture or a 4xx problem, within 2 s of CPU time and 512 MiB.

tests/test_fuzz.py tries some hundred inputs; `make fuzz` has `python -m tests.fuzz.pictures` try INPUTS in a process of their own, so that a
crash of a decoder is seen too. The input in hand lies in a file, and stays there where it was the last.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from core import images
from core.problems import Problem
from core.settings import Limits
from tests.test_images import saved

MEBIBYTE = 1024 * 1024
MOST_S, MOST_BYTES = 2.0, 512 * MEBIBYTE
LIMITS = Limits()
ENTRIES: list[Callable[..., object]] = [images.decode, images.decode_mask, images.transparency, images.describe]
# What length fields and counters break on.
EDGES = [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0", b"\xff\xff", b"\0\x01\0\0", b"\0\0\xff\xff"]


def corpus() -> list[bytes]:
    """Small files of every format and mode that the decoder reads."""
    noise = random.Random(0).randbytes
    rgb, alpha = Image.frombytes("RGB", (48, 32), noise(48 * 32 * 3)), Image.frombytes("RGBA", (48, 32), noise(48 * 32 * 4))
    grey, palette, wide = rgb.convert("L"), rgb.convert("P"), Image.new("I;16", (48, 32), 30000)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    profile = images.ImageCms.ImageCmsProfile(images.ImageCms.createProfile("sRGB")).tobytes()
    frames = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    return [
        *(saved(picture, "PNG") for picture in (rgb, alpha, grey, palette, wide, rgb.convert("1"), grey.convert("LA"))),
        saved(rgb, "PNG", exif=exif.tobytes(), icc_profile=profile, optimize=True), saved(rgb, "PNG", **frames), saved(palette, "PNG", transparency=3),
        *(saved(rgb, "JPEG", **more) for more in ({}, {"progressive": True}, {"quality": 5}, {"exif": exif.tobytes(), "icc_profile": profile}, {"subsampling": 2})),
        saved(grey, "JPEG"), saved(rgb.convert("CMYK"), "JPEG"),
        *(saved(picture, "WEBP", **more) for picture in (rgb, alpha) for more in ({}, {"lossless": True}, frames, {"exif": exif.tobytes(), "icc_profile": profile})),
        saved(palette, "GIF"), saved(rgb, "GIF", **frames), saved(palette, "GIF", transparency=3, interlace=1),
        *(saved(picture, "BMP") for picture in (rgb, alpha, grey, palette, rgb.convert("1"))),
        *(saved(rgb, "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        *(saved(picture, "TIFF") for picture in (alpha, grey, wide, rgb.convert("CMYK"), palette, Image.new("F", (48, 32), 0.5))),
        saved(rgb.convert("1"), "TIFF", compression="group4"), saved(rgb, "TIFF", exif=exif.tobytes(), icc_profile=profile),
    ]  # fmt: skip


def mutated(files: list[bytes], chance: random.Random) -> bytes:
    """One of the files with one to eight things wrong with it."""
    data = bytearray(chance.choice(files))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        if chance.random() < 0.5:  # headers are at the beginning
            at = min(at, chance.randrange(64))
        match chance.randrange(8):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                edge = chance.choice(EDGES)
                data[at : at + len(edge)] = edge
            case 3:
                del data[at : at + chance.randrange(1, 64)]
            case 4:
                data[at:at] = chance.randbytes(chance.randrange(1, 64))
            case 5:
                data = data[:at] if at > 12 else data
            case 6:
                start = chance.randrange(len(data) + 1)
                data[at:at] = data[start : start + chance.randrange(1, 200)]
            case _:
                other = chance.choice(files)
                data[at:] = other[chance.randrange(len(other)) :]
    return bytes(data)


def inputs(seed: int) -> Iterator[bytes]:
    files, chance = corpus(), random.Random(seed)
    while True:
        yield mutated(files, chance)


def tried(data: bytes) -> str:
    """What became of an input: "picture", or the problem's status, of the first entry.

    Raises:
        AssertionError: where it took too long or too much memory, or a problem is no 4xx. Whatever else the decoder raises.
    """
    said = []
    for entry in ENTRIES:
        started = time.process_time()
        try:
            entry(data, LIMITS)
            said.append("picture")
        except Problem as problem:
            assert problem.details.status in (413, 415, 422), problem
            said.append(str(problem.details.status))
        took = time.process_time() - started
        assert took < MOST_S, f"{entry.__name__} took {took:.1f} s"
    return said[0]


def peak() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(count: int, seed: int, last: Path) -> None:
    """Try so many inputs, and print what became of them."""
    faulthandler.enable()
    before, outcomes, slowest = peak(), Counter[str](), 0.0
    stream = inputs(seed)
    for _ in range(count):
        data = next(stream)
        last.write_bytes(data)
        faulthandler.dump_traceback_later(60, exit=True)
        started = time.process_time()
        outcomes[tried(data)] += 1
        slowest = max(slowest, time.process_time() - started)
        assert peak() - before < MOST_BYTES, f"{(peak() - before) // MEBIBYTE} MiB"
    print(f"{count} inputs: {dict(outcomes)}; the slowest took {slowest:.2f} s for all {len(ENTRIES)} entries; {(peak() - before) // MEBIBYTE} MiB at the most")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--in-this-process", type=Path, help="the file for the input in hand")
    asked = parser.parse_args()
    if asked.in_this_process:
        child(asked.inputs, asked.seed, asked.in_this_process)
        return 0
    last = Path(tempfile.mkdtemp(prefix="easel-fuzz-")) / "last"
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.pictures", "--inputs", str(asked.inputs), "--seed", str(asked.seed), "--in-this-process", str(last)], check=False)
    if done.returncode:
        print(f"failed ({done.returncode}) at the input in {last}")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
