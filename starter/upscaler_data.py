"""The starter upscaler's data: Noto emoji drawn at 256x256 from vectors, and their 64x64 versions.

The vectors are the Noto emoji (Apache-2.0) as npm `@iconify-json/noto` ships them; `resvg_py`
(MPL-2.0, `pip install resvg_py==0.5.0`; nothing else needs it) draws them. Flags and skin-tone variants are left
out. A tenth is held out: `parts`. Called by train_upscaler.py and evaluate_upscaler.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import re

import numpy as np
from data import CACHE, fetch
from PIL import Image

VECTORS = "@iconify-json/noto@1.2.9"
LARGE, SCALE = 256, 4
_LEFT_OUT = re.compile(r"skin-tone|-tone\d|(^|-)flag(-|$)")
_PEOPLE = re.compile(r"\b(man|woman|person|men|women|people)\b")


def parts() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and held-out pictures by name: uint8, (LARGE, LARGE, 4). A tenth is held out, by a hash
    of the name without man, woman and person, so that none has a near twin among the others."""
    drawn = _drawn()
    hashes = {name: hashlib.sha256(_PEOPLE.sub("", name).strip("-").encode()).hexdigest() for name in drawn}
    last = sorted(hashes.values())[len(drawn) // 10]
    return {n: p for n, p in drawn.items() if hashes[n] > last}, {n: p for n, p in drawn.items() if hashes[n] <= last}


def on(rgba: np.ndarray, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture on a ground of one colour."""
    picture = Image.fromarray(rgba)
    ground = Image.new("RGBA", picture.size, (*colour, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def smaller(picture: Image.Image, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A quarter of its sides."""
    return picture.resize((picture.width // SCALE, picture.height // SCALE), kernel)


def _drawn() -> dict[str, np.ndarray]:
    cached = CACHE / "noto-256.npz"
    if not cached.exists():
        import resvg_py

        package = json.loads((fetch(VECTORS) / "icons.json").read_text())
        pictures = {}
        for name, icon in sorted(package["icons"].items()):
            if _LEFT_OUT.search(name) or icon.get("hidden"):
                continue
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {package["width"]} {package["height"]}">{icon["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=LARGE, height=LARGE))
            pictures[name] = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
        np.savez_compressed(cached, **pictures)
    with np.load(cached) as saved:
        return {name: saved[name] for name in saved.files}
