"""What a picture costs to encode, and how large it gets: core/png.py, Pillow's levels, OpenCV's encoder, and fpng where it is installed.

    python bench/encoding.py

Draws with the starter model, enlarges one picture to 1024x1024 by the starter upscaler and once more by Lanczos, and puts grain
(normal, of 4 levels) on another copy, since drawn pictures are smoother than photographs. Every file is read back and compared.
Times are CPU time of the one thread that encodes, so that a machine's other work does not count. Writes its table into bench/results.md.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, features

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import turns  # noqa: E402
from core import png  # noqa: E402
from core.catalogue import Catalogue  # noqa: E402
from core.model_settings import Model, Models  # noqa: E402
from core.plans import Pixels  # noqa: E402
from core.settings import Settings  # noqa: E402
from runners import loading, tiling  # noqa: E402

SECTION = "## Encoding"
PROMPTS = ("red apple", "cat face", "blue heart", "green leaf")
Encode = Callable[[np.ndarray], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    made = pictures()
    lines = [SECTION, "", turns.where("bench/encoding.py", load), ""]
    lines += [
        f"Pillow {Image.__version__} with zlib-ng {features.version('zlib_ng')}" if features.check("zlib_ng") else f"Pillow {Image.__version__}, zlib {features.version('zlib')}",
        f"OpenCV {cv2.__version__}. CPU ms of one thread, median of {options.rounds}, and KiB. 64x64: the mean of {len(PROMPTS)} pictures by the starter.",
    ]
    lines[-2:] = [", ".join(lines[-2:]), "", f"| encoder | {' | '.join(made)} |", f"| --- |{' ---: |' * len(made)}"]
    for name, encode in encoders().items():
        cells = [measured(encode, some, options.rounds, exact=name.startswith("PNG")) for some in made.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    turns.write(options.results, SECTION, "\n".join(lines) + "\n")


def pictures() -> dict[str, list[np.ndarray]]:
    """(H, W, 3), uint8, by what they are."""
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "starter/stable-diffusion", safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = [np.asarray(pipe(p, num_inference_steps=15, generator=torch.Generator().manual_seed(i)).images[0]) for i, p in enumerate(PROMPTS)]
    catalogue = Catalogue(Settings(models=Models(catalogue=[Model(id="starter/stable-diffusion", family="starter"), Model(id="starter/upscaler", family="upscaler")])))
    entry = catalogue.find("starter/upscaler")
    network = loading.load(entry, loading.fetch(entry, None), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        larger = tiling.enlarge(network, drawn[0], entry.scale, entry.size, lambda: None)
    large = np.asarray(Image.fromarray((255 * larger).round().astype(np.uint8)).resize((1024, 1024), Image.Resampling.LANCZOS))
    grain = np.random.default_rng(0).normal(0, 4, large.shape)
    return {"64x64": drawn, "1024x1024, smooth": [large], "1024x1024, with grain": [(large + grain).round().clip(0, 255).astype(np.uint8)]}


def encoders() -> dict[str, Encode]:
    found: dict[str, Encode] = {"PNG, Easel (core/png.py)": lambda a: png.encode(Pixels(width=a.shape[1], height=a.shape[0], data=a.tobytes()))}
    found |= {f"PNG, Pillow, level {level}": by_pillow("PNG", compress_level=level) for level in range(10)}
    for level in (1, 3, 6):
        found[f"PNG, OpenCV, level {level}"] = by_opencv(".png", cv2.IMWRITE_PNG_COMPRESSION, level)
    try:
        import fpng

        found["PNG, fpng"] = fpng.from_ndarray
    except ImportError:
        print("fpng is not installed; left out")
    found["JPEG 90, Pillow"] = by_pillow("JPEG", quality=90)
    found["JPEG 90, OpenCV"] = by_opencv(".jpg", cv2.IMWRITE_JPEG_QUALITY, 90)
    for method in (0, 2, 4, 6):
        found[f"WebP 90, Pillow, method {method}"] = by_pillow("WEBP", quality=90, method=method)
    return found


def by_pillow(format: str, **options: int) -> Encode:
    def encode(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format, **options)
        return out.getvalue()

    return encode


def by_opencv(suffix: str, *options: int) -> Encode:
    return lambda pixels: cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def measured(encode: Encode, some: list[np.ndarray], rounds: int, exact: bool) -> str:
    times, sizes = [], []
    for pixels in some:
        file = encode(pixels)
        back = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        assert np.array_equal(back, pixels) if exact else back.shape == pixels.shape
        sizes.append(len(file))
        took = []
        for _ in range(rounds):
            began = time.thread_time()
            encode(pixels)
            took.append(1000 * (time.thread_time() - began))
        times.append(statistics.median(took))
    return f"{statistics.mean(times):.2f} ms, {statistics.mean(sizes) / 1024:.1f}"


if __name__ == "__main__":
    main()
