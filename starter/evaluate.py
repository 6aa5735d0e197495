"""How good the starter Stable Diffusion is: does it draw what was named, in the colour that was named?

Rule for the prompts: every (N / 100)-th emoji in the data's order, each with seeds 0, 1 and 2. A
picture counts as right when, among all training pictures, the nearest one is the one named. The
distance is Euclidean between RGB pictures averaged to 16x16: at that size a shift by a pixel or a
softer edge costs little, while shape, place and colour, which tell emoji apart, remain; and no
network that we trained ourselves marks our own work.
"""

from __future__ import annotations

import argparse
import colorsys
import json
from pathlib import Path

import data
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
COLOURED_THINGS = ("apple", "heart", "circle", "square", "book")
GRID = (
    "red apple", "green apple", "red heart", "blue heart", "cat face", "dog face", "pizza", "rocket",
    "crown", "lady beetle", "hot beverage", "bicycle", "house", "evergreen tree", "sunflower", "fire",
)  # fmt: skip


def features(pictures: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) uint8 to (N, 768) floats: means over 4x4 pixels."""
    n, size, _, channels = pictures.shape
    cells = pictures.reshape(n, 16, size // 16, 16, size // 16, channels).astype(np.float32)
    return cells.mean((2, 4)).reshape(n, -1)


def nearest(picture: np.ndarray, known: np.ndarray, count: int = 1) -> list[int]:
    """Indices of the nearest of `known` (features of the training pictures), nearest first."""
    distances = np.square(known - features(picture[None])).sum(1)
    return [int(i) for i in np.argsort(distances)[:count]]


def dominant_colour(picture: np.ndarray) -> str:
    """The name of the colour that most coloured pixels of a uint8 (H, W, 3) picture have."""
    votes: dict[str, int] = {}
    for red, green, blue in picture.reshape(-1, 3)[::3] / 255.0:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        name = _name(hue * 360, saturation, value)
        if name:
            votes[name] = votes.get(name, 0) + 1
    return max(votes, key=lambda name: votes[name]) if votes else "white"


def _name(hue: float, saturation: float, value: float) -> str | None:
    if value < 0.35 and saturation < 0.5:
        return "black"
    if saturation < 0.3 or value < 0.2:
        return None
    if 8 < hue < 40 and (value < 0.65 or (value < 0.8 and saturation < 0.7)):
        return "brown"
    limits = ((20, "red"), (42, "orange"), (70, "yellow"), (170, "green"), (255, "blue"), (320, "purple"), (361, "red"))
    return next(name for limit, name in limits if hue < limit)


def draw(pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], args: argparse.Namespace) -> np.ndarray:
    """One picture for each prompt and seed, (N, 64, 64, 3) uint8."""
    made = []
    for start in range(0, len(prompts), 30):
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + 30]]
        pictures = pipe(
            prompts[start : start + 30], generator=generators, num_inference_steps=args.steps,
            guidance_scale=args.guidance, output_type="np",
        ).images  # fmt: skip
        made.append((pictures * 255).round().astype(np.uint8))
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "stable-diffusion")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "evaluation.json")
    parser.add_argument("--grid", type=Path, default=Path(__file__).parent / "samples.png")
    args = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    emoji = data.load()
    known = features(np.stack([e.rgb() for e in emoji]))
    chosen = [i * len(emoji) // args.prompts for i in range(args.prompts)]
    seeds = list(range(args.seeds))

    pictures = draw(pipe, [emoji[i].name for i in chosen for _ in seeds], seeds * len(chosen), args)
    ranks = [nearest(p, known, 5) for p in pictures]
    truth = [i for i in chosen for _ in seeds]
    names = [f"{c} {t}" for t in COLOURED_THINGS for c in COLOURS if f"{c} {t}" in {e.name for e in emoji}]
    real = {e.name: e for e in emoji}
    # Only what the classifier reads rightly off the real picture can measure the drawn one.
    usable = [n for n in names if dominant_colour(real[n].rgb()) == n.split()[0]]
    coloured = draw(pipe, [n for n in usable for _ in seeds], seeds * len(usable), args)
    hits = [dominant_colour(p) == n.split()[0] for p, n in zip(coloured, [n for n in usable for _ in seeds], strict=True)]
    report = {
        "prompts": args.prompts,
        "seeds": args.seeds,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "nearest_is_named": round(float(np.mean([t == r[0] for t, r in zip(truth, ranks, strict=True)])), 4),
        "named_in_nearest_5": round(float(np.mean([t in r for t, r in zip(truth, ranks, strict=True)])), 4),
        "colour_hits": round(float(np.mean(hits)), 4),
        "colour_prompts": len(usable),
        "colour_prompts_left_out": sorted(set(names) - set(usable)),
    }
    print(json.dumps(report, indent=2))
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    sheet = draw(pipe, list(GRID), [1] * len(GRID), args)
    rows = [np.concatenate(list(sheet[i : i + 8]), 1) for i in range(0, len(GRID), 8)]
    image = Image.fromarray(np.concatenate(rows, 0))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(args.grid)


if __name__ == "__main__":
    main()
