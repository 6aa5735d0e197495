"""Train the starter upscaler, SRVGGNetCompact: pictures to four times their sides.

L1 on crops; the small versions are made with one of Pillow's kernels each, on white or a coloured
ground, and a fifth of them blurred and noisy, as generated pictures are. A moving average of the weights
is what is saved. Resumes from its own checkpoint. The time limit is of CPU time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import torch
import upscaler_data
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from runners.compact import SRVGGNetCompact

CROP = 128
KERNELS = (Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BOX)


def pair(rgba: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A small crop and what it was made of: uint8, (CROP/4, CROP/4, 3) and (CROP, CROP, 3)."""
    top, left = random.integers(0, upscaler_data.LARGE - CROP + 1, 2)
    crop = np.rot90(rgba[top : top + CROP, left : left + CROP], random.integers(4))
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    ground = (255, 255, 255) if random.random() < 0.6 else tuple(int(v) for v in random.integers(0, 256, 3))
    large = upscaler_data.on(np.ascontiguousarray(crop), ground)
    small = upscaler_data.smaller(large, KERNELS[random.integers(len(KERNELS))])
    pixels = np.asarray(small)
    if random.random() < 0.2:
        blurred = np.asarray(small.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.6))), dtype=np.float32)
        pixels = (blurred + random.normal(0, random.uniform(0, 4), blurred.shape)).clip(0, 255).round().astype(np.uint8)
    return pixels, np.asarray(large)


def batch_of(pictures: list[np.ndarray], size: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Small and large crops in 0..1: (size, 3, CROP/4, CROP/4) and (size, 3, CROP, CROP)."""
    pairs = [pair(pictures[random.integers(len(pictures))], random) for _ in range(size)]
    small, large = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2).float() / 255 for side in zip(*pairs, strict=True))
    return small.contiguous(memory_format=torch.channels_last), large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--num-feat", type=int, default=48)
    parser.add_argument("--num-conv", type=int, default=8)
    parser.add_argument("--work", type=Path, default=data.CACHE / "upscaler.pt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "upscaler" / "emoji_x4.safetensors")
    args = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = upscaler_data.parts()
    pictures = list(training.values())
    network = SRVGGNetCompact(args.num_feat, args.num_conv, upscaler_data.SCALE).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in network.parameters())} parameters, {len(pictures)} pictures, {len(held_out)} held out", flush=True)
    average = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=args.rate, betas=(0.9, 0.99))
    step = 0
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]

    random = np.random.default_rng(step)
    started, shown, losses = time.process_time(), time.monotonic(), []
    while (used := (time.process_time() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 100) * (1 if used < 0.3 else max(0.01, (1 - used) / 0.7))
        small, large = batch_of(pictures, args.batch, random)
        with torch.autocast("cpu", torch.bfloat16):
            made = network(small)
        loss = (made.float() - large).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.995, step / (step + 20))
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if time.monotonic() - shown > 60:
            print(f"step {step} loss {np.mean(losses):.5f} {time.process_time() - started:.0f} s", flush=True)
            shown, losses = time.monotonic(), []
            torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, args.work)

    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, args.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in average.items()}, args.out)
    print(f"{step} steps")


if __name__ == "__main__":
    main()
