"""Teach the starter's text decoder to read what the U-ViT writes.

train_text_decoder.py gives the decoder states with noise that is the same everywhere; what the U-ViT
leaves in its own samples is not: it lies along other names' states, over all tokens at once. So the
U-ViT writes about every picture here (its altered copies too), as the pipeline would, and the decoder
learns the names from that, beside names as the text encoder gives them. Run after train_unidiffuser.py.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import data
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel
from torch import Tensor
from train_clip import HERE, TEXT_TOKENS
from train_diffusion import prompt_for
from train_text_decoder import loss_of, save, train, written
from train_unidiffuser import STEPS, Frozen


@torch.no_grad()
def sampled(unet: UniDiffuserModel, scheduler: DPMSolverMultistepScheduler, latents: Tensor, embeds: Tensor, steps: int, guidance: float) -> Tensor:
    """Narrow states that the U-ViT writes about pictures: (N, TEXT_TOKENS, NARROW), by the pipeline's
    classifier-free guidance, whose other half sees pure noise for a picture."""
    made = []
    for x, c in zip(latents.split(128), embeds.split(128), strict=True):
        scheduler.set_timesteps(steps)
        y = torch.randn(len(x), TEXT_TOKENS, unet.config.text_dim)
        clean, noise = torch.zeros(len(x), dtype=torch.long), torch.full((len(x),), STEPS)
        for t in scheduler.timesteps:
            at = t.expand(len(x))
            with torch.autocast("cpu", torch.bfloat16):
                seen = unet(x, c, y, clean, at)[2].float()
                blind = unet(torch.randn_like(x), torch.randn_like(c), y, noise, at)[2].float()
            y = scheduler.step(guidance * seen + (1 - guidance) * blind, t, y).prev_sample
        made.append(y)
    return torch.cat(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="of CPU time, after the sampling")
    parser.add_argument("--views", type=int, default=3, help="altered copies of each picture, beside itself")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=Path, default=data.CACHE / "unidiffuser-samples.pt")
    parser.add_argument("--out", type=Path, default=HERE / "unidiffuser")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    emoji, frozen = data.load(), Frozen.load(args.out, "cpu")
    decoder, tokenizer = frozen.text_decoder.train(), frozen.text_tokenizer
    if not args.samples.exists():
        unet = UniDiffuserModel.from_pretrained(args.out / "unet", torch_dtype=torch.float32).eval()
        scheduler = DPMSolverMultistepScheduler.from_pretrained(args.out / "scheduler")
        known = frozen.conditions(emoji, args.views)
        args.samples.parent.mkdir(exist_ok=True)
        pairs = zip(known["view_latents"], known["view_embeds"], strict=True)
        torch.save(torch.stack([sampled(unet, scheduler, x, c, args.steps, args.guidance) for x, c in pairs]), args.samples)
    samples = torch.load(args.samples, weights_only=True)  # (1 + views, N, TEXT_TOKENS, NARROW)
    print(f"{samples.shape[0]} samples of each of {samples.shape[1]} pictures", flush=True)

    def rate(step: int, used: float) -> float:
        return args.rate * min(1, (step + 1) / 50) * max(0.01, 1 - used)

    def loss() -> Tensor:
        places = rng.sample(range(len(emoji)), args.batch)
        read = args.batch * 3 // 4  # the rest is texts as the encoder gives them, so that they stay readable
        views = torch.randint(len(samples), (read,))
        seen = samples[views, torch.tensor(places[:read])]
        given = [prompt_for(emoji[i], rng) or emoji[i].name for i in places[read:]]
        narrowed = torch.cat([seen, frozen.texts(given)])
        narrowed = narrowed + 0.3 * torch.rand(len(narrowed), 1, 1) * torch.randn_like(narrowed)
        return loss_of(decoder, tokenizer, narrowed, [emoji[i].name for i in places[:read]] + given)

    train(decoder, args.minutes, rate, loss)
    save(args.out, decoder)
    decoder.eval()
    some = [e.name for e in emoji[::32]]
    print(f"names written back exactly: {np.mean([a == b for a, b in zip(written(decoder, tokenizer, frozen.texts(some)), some, strict=True)]):.3f}")


if __name__ == "__main__":
    main()
