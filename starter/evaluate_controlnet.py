"""How well the starter ControlNet is followed: do a picture's edges lie on the edges that were asked for?

Rule for the prompts: as evaluate.py's, every (N / 100)-th emoji in the data's order, one seed each. The condition is
the Canny edges of the named emoji mirrored, turned, scaled and moved as train_controlnet.py does it, with other random
numbers, so that the prompt does not tell where they are. An edge pixel is right when one of the other picture's lies
within a pixel of it; the score is F1, the harmonic mean of the shares of right pixels in both directions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import cv2
import data
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from train_controlnet import HERE, altered, edges

SHOWN = (3, 12, 25, 38, 47, 60, 71, 88)  # of the prompts, for the picture


def f1(wanted: np.ndarray, drawn: np.ndarray) -> float:
    """Of two (H, W) edge maps, with a tolerance of one pixel."""
    if not wanted.any() or not drawn.any():
        return 0.0
    near = np.ones((3, 3), np.uint8)
    precision = (cv2.dilate(wanted, near)[drawn > 0] > 0).mean()
    recall = (cv2.dilate(drawn, near)[wanted > 0] > 0).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "stable-diffusion")
    parser.add_argument("--controlnet", type=Path, default=HERE / "controlnet-canny")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--json", type=Path, default=HERE / "evaluation-controlnet.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs/pictures/control.png")
    args = parser.parse_args()

    net = ControlNetModel.from_pretrained(args.controlnet, torch_dtype=torch.bfloat16)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(args.model, controlnet=net, torch_dtype=torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    emoji, rng = data.load(), random.Random(1)
    chosen = [emoji[i * len(emoji) // args.prompts] for i in range(args.prompts)]
    wanted = [edges(altered(e.rgb(), rng)) for e in chosen]
    drawn: dict[float, list[np.ndarray]] = {}
    for scale in (1.0, 0.0):
        made: list[np.ndarray] = []
        for start in range(0, len(chosen), 25):
            some = range(start, min(start + 25, len(chosen)))
            pictures = pipe(
                [chosen[i].name for i in some], image=[Image.fromarray(wanted[i]).convert("RGB") for i in some],
                generator=[torch.Generator("cpu").manual_seed(i) for i in some], num_inference_steps=args.steps,
                guidance_scale=args.guidance, controlnet_conditioning_scale=scale, output_type="np",
            ).images  # fmt: skip
            made += list((pictures * 255).round().astype(np.uint8))
        drawn[scale] = made
    scores = {scale: float(np.mean([f1(w, edges(p)) for w, p in zip(wanted, made, strict=True)])) for scale, made in drawn.items()}
    report = {
        "prompts": args.prompts, "steps": args.steps, "guidance_scale": args.guidance,
        "edge_f1_with_control": round(scores[1.0], 4), "edge_f1_without": round(scores[0.0], 4),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    shown = [i for i in SHOWN if i < len(chosen)]
    lines = [np.repeat(wanted[i][..., None], 3, 2) for i in shown]
    sheet = np.concatenate([np.concatenate(row, 1) for row in (lines, [drawn[1.0][i] for i in shown], [drawn[0.0][i] for i in shown])], 0)
    image = Image.fromarray(sheet)
    args.picture.parent.mkdir(exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(args.picture)


if __name__ == "__main__":
    main()
