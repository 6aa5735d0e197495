"""Train the starter ControlNet: Canny edges that the starter Stable Diffusion's pictures follow.

A copy of the UNet's encoder with zero convolutions (Zhang et al. 2023); the UNet itself stays as it is. Since the
prompt alone already tells the starter what the usual outline is, the pictures are mirrored, turned, moved and scaled,
so that only the edges tell where things go; for the same reason the prompt is empty in a third of the samples.
Resumes from its own checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import cv2
import data
import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from train_diffusion import NOISE, encode_pictures, prompt_for

HERE = Path(__file__).parent
VARIANTS = 3  # of each picture, beside the picture itself


def edges(picture: np.ndarray) -> np.ndarray:
    """The Canny edges of a (H, W, 3) uint8 picture, 0 or 255, (H, W): what the service's preprocessor does."""
    return cv2.Canny(picture, 100, 200)


def altered(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """A (64, 64, 3) uint8 picture mirrored, turned, scaled and moved on its white ground."""
    size = picture.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-30, 30), rng.uniform(0.6, 1.05))
    turn[:, 2] += [rng.uniform(-8, 8), rng.uniform(-8, 8)]
    source = np.ascontiguousarray(picture[:, ::-1] if rng.random() < 0.5 else picture)
    return cv2.warpAffine(source, turn, (size, size), flags=cv2.INTER_AREA, borderValue=(255, 255, 255))


def examples(vae: nn.Module, emoji: list[data.Emoji]) -> tuple[Tensor, Tensor, Tensor]:
    """Means and deviations of the latents, (N, 4, 16, 16), and edges, (N, 64, 64) uint8, of every picture and its variants."""
    path = data.CACHE / "controlnet-data.pt"
    if not path.exists():
        rng = random.Random(0)
        pictures = np.stack([e.rgb() for e in emoji] + [altered(e.rgb(), rng) for _ in range(VARIANTS) for e in emoji])
        with torch.autocast("cpu", torch.bfloat16):
            mean, std = encode_pictures(vae, pictures)
        torch.save((mean.float(), std.float(), torch.from_numpy(np.stack([edges(p) for p in pictures]))), path)
    mean, std, lines = torch.load(path, weights_only=True)
    return mean, std, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="CPU time in all, of earlier runs too")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--model", type=Path, default=HERE / "stable-diffusion")
    parser.add_argument("--work", type=Path, default=data.CACHE / "controlnet.pt")
    parser.add_argument("--out", type=Path, default=HERE / "controlnet-canny")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    unet, text_encoder = pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    mean, std, lines = examples(pipe.vae.requires_grad_(False), emoji)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96)).requires_grad_(True).train()
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slow on a CPU for so few tokens
    control.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    for model in (unet, control):
        model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(control).requires_grad_(False)
    optimizer = torch.optim.AdamW(control.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, spent = 0, 0.0
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        control.load_state_dict(saved["control"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    print(f"{sum(p.numel() for p in control.parameters()) / 1e6:.2f} M parameters, {len(lines)} pictures", flush=True)
    noise_schedule = DDPMScheduler(**NOISE)

    def checkpoint() -> None:
        state = {"control": control.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state | {"spent": spent + time.process_time() - started}, args.work.with_suffix(".tmp"))
        args.work.with_suffix(".tmp").replace(args.work)
        copy.deepcopy(average).half().to(memory_format=torch.contiguous_format).save_pretrained(args.out)

    started = shown = saved_at = time.process_time()
    losses: list[float] = []
    while (used := (spent + time.process_time() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * min(1, max(0.02, (1 - used) / 0.4))
        chosen = torch.randint(len(lines), (args.batch,))
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        asked = ["" if rng.random() < 0.25 else prompt_for(emoji[i % len(emoji)], rng) for i in chosen.tolist()]
        ids = pipe.tokenizer(asked, padding="max_length", truncation=True, return_tensors="pt").input_ids
        condition = (lines[chosen].float() / 255)[:, None].expand(-1, 3, -1, -1)
        t = torch.randint(0, 1000, (args.batch,))
        noise = torch.randn_like(latents)
        noisy = noise_schedule.add_noise(latents, noise, t).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(ids).last_hidden_state
            down, mid = control(noisy, t, states, condition, return_dict=False)
            v = unet(noisy, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        loss = (v.float() - noise_schedule.get_velocity(latents, noise, t)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(list(average.parameters()), list(control.parameters()), 1 - min(0.995, (1 + step) / (10 + step)))
        losses.append(loss.item())
        now = time.process_time()
        if now - shown > 30:
            print(f"step {step} loss {np.mean(losses):.4f} {spent + now - started:.0f} s", flush=True)
            shown, losses = now, []
        if now - saved_at > 90:
            checkpoint()
            saved_at = now
    checkpoint()


if __name__ == "__main__":
    main()
