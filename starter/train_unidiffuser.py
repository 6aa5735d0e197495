"""Train the starter UniDiffuser's U-ViT and write the pipeline's folder.

One transformer learns every direction by giving picture and text timesteps of their own (Bao et al.
2023): 0 is clean, 1000 is pure noise, so text to image, image to text, both marginals and the joint
are the edges and the inside of one square. The paper draws both timesteps evenly; as the edges are
what people ask for and the time is short, over half of the samples here lie on an edge. v-prediction with min-SNR
weights as for the starter Stable Diffusion, and a moving average of the weights, which is what is
saved. Run after train_vae.py, train_clip.py and train_text_decoder.py; resumes from its own checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import data
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UniDiffuserPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder
from torch import Tensor, nn
from train_clip import EMBEDDING, HERE, ONE_HANDED, TEXT_TOKENS, altered, plain_loading, processor, tokens
from train_diffusion import NOISE, encode_pictures, prompt_for
from train_text_decoder import NARROW, states
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    GPT2Tokenizer,
)

STEPS = 1000
VAE = HERE / "stable-diffusion" / "vae"  # shared with the starter Stable Diffusion
# How often each part of the square of timesteps is drawn.
TASKS = {"joint": 0.40, "text2img": 0.34, "img2text": 0.16, "img": 0.05, "text": 0.05}


@dataclass
class Frozen:
    """What train_vae.py, train_clip.py and train_text_decoder.py left, as the pipeline names it."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    clip_tokenizer: CLIPTokenizer
    text_decoder: UniDiffuserTextDecoder
    text_tokenizer: GPT2Tokenizer

    @classmethod
    def load(cls, out: Path, device: str) -> Frozen:
        full = dict(dtype=torch.float32)
        return cls(
            AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).to(device),
            CLIPTextModelWithProjection.from_pretrained(out / "text_encoder", **full).to(device),
            CLIPVisionModelWithProjection.from_pretrained(out / "image_encoder", **full).to(device),
            CLIPTokenizer.from_pretrained(out / "clip_tokenizer"),
            UniDiffuserTextDecoder.from_pretrained(out / "text_decoder", torch_dtype=torch.float32).to(device).eval(),
            GPT2Tokenizer.from_pretrained(out / "text_tokenizer"),
        )

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """The narrow states of the texts: (N, TEXT_TOKENS, NARROW)."""
        ids = tokens(self.clip_tokenizer, texts).to(self.text_encoder.device)
        return self.text_decoder.encode(states(self.text_encoder, ids))

    @torch.no_grad()
    def pictures(self, pictures: list[np.ndarray]) -> Tensor:
        """CLIP embeddings of uint8 (H, W, 3) pictures: (N, 1, EMBEDDING)."""
        pixels = processor()(pictures, return_tensors="pt").pixel_values.to(self.image_encoder.device)
        return torch.cat([self.image_encoder(part).image_embeds for part in pixels.split(128)])[:, None]

    def wordings(self, emoji: list[data.Emoji], count: int) -> Tensor:
        """Ways to ask for each picture, as conditions for drawings: (count, N, TEXT_TOKENS, NARROW)."""
        rng = random.Random(0)
        return torch.stack([self.texts([prompt_for(e, rng) or e.name for e in emoji]) for _ in range(count)])

    @torch.no_grad()
    def views(self, emoji: list[data.Emoji], count: int) -> tuple[Tensor, Tensor]:
        """The pictures and `count` - 1 altered copies of each, as conditions for captions:
        latents (count, N, 4, 16, 16) and CLIP embeddings (count, N, 1, EMBEDDING)."""
        rgba = torch.from_numpy(np.stack([e.rgba for e in emoji])).permute(0, 3, 1, 2).contiguous()
        mirror = torch.tensor([not ONE_HANDED.search(e.name) for e in emoji])
        latents, embeds = [], []
        for i in range(count):
            if i == 0:
                pixels = torch.from_numpy(np.stack([e.rgb() for e in emoji])).permute(0, 3, 1, 2) / 255
            else:
                pixels = altered(rgba, mirror, data.SIZE, strength=0.8)
            device, scale = self.vae.device, self.vae.config.scaling_factor
            latents.append(torch.cat([self.vae.encode(p.to(device) * 2 - 1).latent_dist.mean * scale for p in pixels.split(64)]))
            embeds.append(self.pictures(list((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())))
        return torch.stack(latents), torch.stack(embeds)


def build(width: int, depth: int, patch: int) -> UniDiffuserModel:
    """The untrained U-ViT of `depth` blocks (odd), `patch` latents to a token's side."""
    return UniDiffuserModel(
        text_dim=NARROW, clip_img_dim=EMBEDDING, num_text_tokens=TEXT_TOKENS, num_attention_heads=8,
        attention_head_dim=width // 8, in_channels=4, out_channels=4, num_layers=depth - 1, sample_size=data.SIZE // 4,
        patch_size=patch, activation_fn="gelu", block_type="standard", pre_layer_norm=True, use_timestep_embedding=True,
    )  # fmt: skip


def save(out: Path, frozen: Frozen, unet: UniDiffuserModel) -> None:
    """Write a folder that UniDiffuserPipeline.from_pretrained loads, in float16."""
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float16)
    UniDiffuserPipeline(
        vae=copy.deepcopy(frozen.vae).half(),
        text_encoder=text_encoder,
        image_encoder=copy.deepcopy(frozen.image_encoder).half(),
        clip_image_processor=processor(),
        clip_tokenizer=frozen.clip_tokenizer,
        text_decoder=copy.deepcopy(frozen.text_decoder).half(),
        text_tokenizer=frozen.text_tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=DPMSolverMultistepScheduler(**NOISE, steps_offset=1),
    ).save_pretrained(out)
    shutil.copytree(VAE, out / "vae", dirs_exist_ok=True)  # byte for byte, so that git keeps it once
    # The same encoder again with its text projection, which retrieval needs and the pipeline skips.
    copy.deepcopy(frozen.text_encoder).half().save_pretrained(out / "text_encoder")
    for name in ("text_encoder", "image_encoder", "text_decoder", "unet"):
        plain_loading(out / name)


class Trainer:
    """Draws batches from the square of timesteps and measures the loss on them."""

    def __init__(self, frozen: Frozen, emoji: list[data.Emoji], device: str, variants: int) -> None:
        self.device = device
        self.rng = random.Random(0)
        self.mean, self.std = encode_pictures(frozen.vae, emoji)
        self.view_latents, self.view_embeds = frozen.views(emoji, variants)
        self.wordings = frozen.wordings(emoji, 2 * variants)
        self.names = frozen.texts([e.name for e in emoji])
        self.schedule = DDPMScheduler(**NOISE)
        spread = {"latents": self.mean, "clip": self.view_embeds[0], "text": self.names}
        print("spread of what is diffused:", {k: round(v.std().item(), 3) for k, v in spread.items()}, flush=True)
        snr = (self.schedule.alphas_cumprod / (1 - self.schedule.alphas_cumprod)).to(device)
        # Clean parts teach nothing (what noise was added cannot be seen), nor does pure noise.
        self.weight = torch.cat([(snr.clamp(max=5) / (snr + 1)), torch.zeros(1, device=device)])
        self.weight[0] = 0

    def noised(self, clean: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`clean` at timesteps `t`, and the velocity there."""
        noise, shape = torch.randn_like(clean), (-1,) + (1,) * (clean.ndim - 1)
        inside = t.clamp(max=STEPS - 1)
        noisy = self.schedule.add_noise(clean, noise, inside)
        noisy = torch.where((t == 0).view(shape), clean, torch.where((t == STEPS).view(shape), noise, noisy))
        return noisy, self.schedule.get_velocity(clean, noise, inside)

    def loss(self, unet: nn.Module, chosen: list[int]) -> dict[str, Tensor]:
        """Mean weighted squared error of the velocity of latents, CLIP embedding and text."""
        n = len(chosen)
        tasks = self.rng.choices(list(TASKS), list(TASKS.values()), k=n)
        t_img, t_text = torch.randint(1, STEPS, (n,), device=self.device), torch.randint(1, STEPS, (n,), device=self.device)
        at = {name: torch.tensor([task == name for task in tasks], device=self.device) for name in TASKS}
        t_text[at["text2img"]], t_img[at["img2text"]] = 0, 0
        t_text[at["img"]], t_img[at["text"]] = STEPS, STEPS

        latents = self.mean[chosen] + self.std[chosen] * torch.randn_like(self.mean[chosen])
        clip, text = self.view_embeds[0][chosen], self.names[chosen]
        place = torch.tensor(chosen, device=self.device)
        asked, shown = at["text2img"].nonzero()[:, 0], at["img2text"].nonzero()[:, 0]
        variant = torch.randint(len(self.wordings), (len(asked),), device=self.device)
        text = text.index_put((asked,), self.wordings[variant, place[asked]])
        variant = torch.randint(len(self.view_latents), (len(shown),), device=self.device)
        latents = latents.index_put((shown,), self.view_latents[variant, place[shown]])
        clip = clip.index_put((shown,), self.view_embeds[variant, place[shown]])

        (x, x_v), (c, c_v), (y, y_v) = self.noised(latents, t_img), self.noised(clip, t_img), self.noised(text, t_text)
        with torch.autocast(self.device, torch.bfloat16):
            guesses = unet(x, c, y, t_img, t_text)
        errors = [(g.float() - v).square().flatten(1).mean(1) for g, v in zip(guesses, (x_v, c_v, y_v), strict=True)]
        weights = self.weight[t_img], self.weight[t_img], self.weight[t_text]
        return {k: (w * e).mean() for k, w, e in zip(("latents", "clip", "text"), weights, errors, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--settle", type=float, default=0.4, help="the share of the time in which the rate falls to 0")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--variants", type=int, default=5, help="altered copies and, twice as many, wordings of each")
    parser.add_argument("--work", type=Path, default=data.CACHE / "unidiffuser-uvit.pt")
    parser.add_argument("--out", type=Path, default=HERE / "unidiffuser")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    emoji = data.load()
    frozen = Frozen.load(args.out, device)
    trainer = Trainer(frozen, emoji, device, args.variants)
    unet = build(args.width, args.depth, args.patch).to(device)
    for module in unet.modules():
        if device == "cpu" and hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())  # the fused one is slow for short sequences here
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    step, spent = 0, 0.0
    if args.work.exists():
        saved = torch.load(args.work, map_location=device, weights_only=True)
        unet.load_state_dict(saved["unet"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)

    started = shown = saved_at = time.monotonic()
    losses: list[dict[str, float]] = []
    order: list[int] = []

    def checkpoint() -> None:
        state = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state | {"spent": spent + time.monotonic() - started}, args.work.with_suffix(".tmp"))
        args.work.with_suffix(".tmp").replace(args.work)
        save(args.out, frozen, average)

    while (used := (spent + time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 200) * min(1, max(0.01, (1 - used) / args.settle))
        while len(order) < args.batch:  # every picture once an epoch, in a new order
            order += torch.randperm(len(emoji)).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        parts = trainer.loss(unet, chosen)
        loss = parts["latents"] + 0.3 * parts["clip"] + parts["text"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - keep)
        losses.append({k: v.item() for k, v in parts.items()})
        if not math.isfinite(sum(losses[-1].values())):
            raise SystemExit(f"loss is {losses[-1]} at step {step}")
        now = time.monotonic()
        if now - shown > 60:
            mean = " ".join(f"{k} {np.mean([x[k] for x in losses]):.4f}" for k in parts)
            print(f"step {step} {mean} {spent + now - started:.0f} s", flush=True)
            shown, losses = now, []
        if now - saved_at > 300:
            checkpoint()
            saved_at = now
    checkpoint()


if __name__ == "__main__":
    main()
