"""The training data of the starter models: emoji pictures with their names and keywords.

Pictures are the Noto emoji (Apache-2.0) as npm `emoji-datasource-google` ships them, names and
keywords come from npm `emojibase-data` (MIT). Flags and skin-tone variants are left out. The same
emoji as drawn for Twitter (CC-BY 4.0) serve to evaluate only and are not shipped.
Called by the training scripts and by evaluate.py; never by the service.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
NAMES = "emojibase-data@17.0.0"
CACHE = Path(__file__).parent / ".cache"
SIZE = 64


@dataclass(frozen=True)
class Emoji:
    """One picture and what it is called. `rgba` is uint8, (SIZE, SIZE, 4)."""

    name: str
    keywords: tuple[str, ...]
    rgba: np.ndarray

    def rgb(self) -> np.ndarray:
        """The picture on white: uint8, (SIZE, SIZE, 3)."""
        alpha = self.rgba[..., 3:].astype(np.float32) / 255
        return (self.rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def fetch(package: str) -> Path:
    """Download an npm package into the cache with the npm client; return its folder."""
    target = CACHE / package.replace("@", "-")
    if not target.exists():
        CACHE.mkdir(exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=CACHE, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(CACHE / packed) as archive:
            archive.extractall(target, filter="data")
        (CACHE / packed).unlink()
    return target / "package"


def load(vendor: str = "google") -> list[Emoji]:
    """All emoji of one vendor (the training data are Google's), in the data source's order, which is
    part of evaluate.py's rule."""
    pictures, names = fetch(PICTURES[vendor]), fetch(NAMES)
    by_code = {e["hexcode"].replace("-FE0F", ""): e for e in json.loads((names / "en/data.json").read_text())}
    sheet = Image.open(pictures / f"img/{vendor}/sheets/64.png").convert("RGBA")
    emoji = []
    for entry in json.loads((pictures / "emoji.json").read_text()):
        named = by_code.get(entry["unified"].replace("-FE0F", ""))
        if entry["category"] in ("Flags", "Component") or not entry[f"has_img_{vendor}"] or named is None:
            continue
        cell = SIZE + 2
        x, y = entry["sheet_x"] * cell + 1, entry["sheet_y"] * cell + 1
        emoji.append(
            Emoji(named["label"], tuple(named.get("tags", ())), np.asarray(sheet.crop((x, y, x + SIZE, y + SIZE))))
        )
    return emoji
