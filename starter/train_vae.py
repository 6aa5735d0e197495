"""Train the starter AutoencoderKL: 64x64 pictures to 16x16x4 latents.

The losses are L1 on a Laplacian pyramid (edges count as much as areas) and a small KL term;
a moving average of the weights is what is saved. Resumes from its own checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

CONFIG = dict(
    block_out_channels=(32, 64, 128),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=data.SIZE,
)


def batch_of(rgba: Tensor, size: int) -> Tensor:
    """A random batch in [-1, 1], (size, 3, H, W). Half are altered (mirrored, recoloured, on a
    coloured ground) so that img2img meets a decoder that has seen more than white margins."""
    x = rgba[torch.randint(len(rgba), (size,))].float() / 255
    colour, alpha = x[:, :3], x[:, 3:]
    altered = torch.rand(size, 1, 1, 1) < 0.5
    ground = torch.where(altered, torch.rand(size, 3, 1, 1), torch.ones(1))
    order = torch.stack([torch.randperm(3) for _ in range(size)])[:, :, None, None].expand_as(colour)
    colour = torch.where(altered & (torch.rand(size, 1, 1, 1) < 0.5), colour.gather(1, order), colour)
    picture = colour * alpha + ground * (1 - alpha)
    picture = torch.where(altered & (torch.rand(size, 1, 1, 1) < 0.5), picture.flip(3), picture)
    return picture * 2 - 1


def pyramid_l1(a: Tensor, b: Tensor, levels: int = 4) -> Tensor:
    """L1 between Laplacian pyramids: each level's band weighs the same as the picture itself."""
    difference, loss = a - b, (a - b).abs().mean()
    for _ in range(levels):
        smaller = F.avg_pool2d(difference, 2)
        loss = loss + (difference - F.interpolate(smaller, scale_factor=2.0)).abs().mean()
        difference = smaller
    return loss + difference.abs().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=data.CACHE / "vae.pt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stable-diffusion" / "vae")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rgba = torch.from_numpy(np.stack([e.rgba for e in data.load()])).permute(0, 3, 1, 2)
    vae = AutoencoderKL(**CONFIG).to(device, memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(rgba)} pictures", flush=True)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step = 0
    if args.work.exists():
        saved = torch.load(args.work, map_location=device, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]

    started, shown, losses = time.monotonic(), time.monotonic(), []
    while (used := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        rate = args.rate * min(1, (step + 1) / 100) * (1 if used < 0.6 else max(0.02, (1 - used) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = batch_of(rgba, args.batch).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        reconstruction = pyramid_l1(decoded.float(), x)
        loss = reconstruction + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.998, step / (step + 20))
        for key, value in vae.state_dict().items():
            average[key].lerp_(value, 1 - keep)
        losses.append(reconstruction.item())
        if time.monotonic() - shown > 60:
            print(f"step {step} loss {np.mean(losses):.4f} {time.monotonic() - started:.0f} s", flush=True)
            shown, losses = time.monotonic(), []
            torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, args.work)

    torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, args.work)
    vae.load_state_dict(average)
    # The latents' spread, so that the diffusion model sees unit variance (Rombach et al. 2022, appendix G).
    with torch.no_grad():
        white = torch.from_numpy(np.stack([e.rgb() for e in data.load()])).permute(0, 3, 1, 2).float() / 127.5 - 1
        spread = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in white.split(32)]).std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 5))
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
