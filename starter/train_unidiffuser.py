"""Train the starter UniDiffuser's U-ViT and write the pipeline's folder.

One transformer learns every direction by giving picture and text timesteps of their own (Bao et al.
2023): 0 is clean, 1000 is pure noise, so text to image, image to text, both marginals and the joint
are the edges and the inside of one square. The paper draws both timesteps evenly; as the edges are
what people ask for and the time is short, most of the samples here lie on an edge, and most of those
on the one that is hardest to learn, text to image. v-prediction, every timestep weighing the same, as
for the starter Stable Diffusion, and a moving average of the weights, which is what is saved.
Run after train_vae.py, train_clip.py and train_text_decoder.py; resumes from its own checkpoint.
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
TASKS = {"joint": 0.06, "text2img": 0.52, "img2text": 0.37, "img": 0.03, "text": 0.02}


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

    def views(self, emoji: list[data.Emoji], count: int) -> tuple[Tensor, Tensor]:
        """Altered copies of the pictures, as conditions for captions: latents (count, N, 4, 16, 16)
        and CLIP embeddings (count, N, 1, EMBEDDING)."""
        rgba = torch.from_numpy(np.stack([e.rgba for e in emoji])).permute(0, 3, 1, 2).contiguous()
        mirror = torch.tensor([not ONE_HANDED.search(e.name) for e in emoji])
        latents, embeds = [], []
        for _ in range(count):
            pixels = altered(rgba, mirror, data.SIZE, strength=0.8)
            pictures = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
            with torch.autocast(self.vae.device.type, torch.bfloat16):
                latents.append(encode_pictures(self.vae, pictures)[0].float())
            embeds.append(self.pictures(list(pictures)))
        return torch.stack(latents), torch.stack(embeds)

    def conditions(self, emoji: list[data.Emoji], variants: int) -> dict[str, Tensor]:
        """All that the U-ViT learns from: what it makes (latents' mean and std, CLIP embeddings, names)
        and what it is given beside them (altered copies, and wordings with keywords)."""
        pictures = np.stack([e.rgb() for e in emoji])
        mean, std = encode_pictures(self.vae, pictures)
        clip, names = self.pictures(list(pictures)), self.texts([e.name for e in emoji])
        latents, embeds = self.views(emoji, variants)
        return {
            "mean": mean, "std": std, "clip": clip, "names": names, "wordings": self.wordings(emoji, 2 * variants),
            "view_latents": torch.cat([mean[None], latents]), "view_embeds": torch.cat([clip[None], embeds]),
        }  # fmt: skip


def build(width: int, depth: int, patch: int) -> UniDiffuserModel:
    """The untrained U-ViT of `depth` blocks (odd), `patch` latents to a token's side."""
    return UniDiffuserModel(
        text_dim=NARROW, clip_img_dim=EMBEDDING, num_text_tokens=TEXT_TOKENS, num_attention_heads=8,
        attention_head_dim=width // 8, in_channels=4, out_channels=4, num_layers=depth - 1, sample_size=data.SIZE // 4,
        patch_size=patch, activation_fn="gelu", block_type="standard", pre_layer_norm=True, use_timestep_embedding=True,
    )  # fmt: skip


def save(out: Path, unet: UniDiffuserModel) -> None:
    """Write what is trained here, in float16, and what makes a pipeline of it and the parts that the
    other scripts left in the folder."""
    scheduler = DPMSolverMultistepScheduler(**NOISE, steps_offset=1)
    unet = copy.deepcopy(unet).half()
    unet.save_pretrained(out / "unet")
    plain_loading(out / "unet")
    scheduler.save_pretrained(out / "scheduler")
    shutil.copytree(VAE, out / "vae", dirs_exist_ok=True)  # byte for byte, so that git keeps it once
    frozen = Frozen.load(out, "cpu")
    UniDiffuserPipeline(
        vae=frozen.vae,
        text_encoder=CLIPTextModel(frozen.text_encoder.config),  # only its class is written
        image_encoder=frozen.image_encoder,
        clip_image_processor=processor(),
        clip_tokenizer=frozen.clip_tokenizer,
        text_decoder=frozen.text_decoder,
        text_tokenizer=frozen.text_tokenizer,
        unet=unet,
        scheduler=scheduler,
    ).save_config(out)


def optimizers_of(unet: UniDiffuserModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for all else. A step takes 1.4 times as
    long as with AdamW alone, and brings the loss down more than that."""
    matrices = [p for name, p in unet.named_parameters() if p.ndim == 2 and name.startswith("transformer.")]
    known = {id(p) for p in matrices}
    others = [p for p in unet.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=1e-2),
    ]


class Trainer:
    """Draws batches from the square of timesteps and measures the loss on them."""

    def __init__(self, conditions: dict[str, Tensor], device: str) -> None:
        self.device, self.rng = device, random.Random()
        self.known = {name: value.to(device) for name, value in conditions.items()}
        self.schedule = DDPMScheduler(**NOISE)
        print("spread of what is diffused:", {k: round(self.known[k].std().item(), 3) for k in ("mean", "clip", "names")}, flush=True)
        # Clean parts teach nothing (what noise was added cannot be seen), nor does pure noise.
        self.weight = torch.ones(STEPS + 1, device=device)
        self.weight[[0, STEPS]] = 0

    def noised(self, clean: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`clean` at timesteps `t`, and the velocity there."""
        noise, shape = torch.randn_like(clean), (-1,) + (1,) * (clean.ndim - 1)
        inside = t.clamp(max=STEPS - 1)
        noisy = self.schedule.add_noise(clean, noise, inside)
        noisy = torch.where((t == 0).view(shape), clean, torch.where((t == STEPS).view(shape), noise, noisy))
        return noisy, self.schedule.get_velocity(clean, noise, inside)

    def loss(self, unet: nn.Module, chosen: list[int]) -> dict[str, Tensor]:
        """Mean squared error of the velocity of latents, CLIP embedding and text, where there is noise."""
        n = len(chosen)
        tasks = self.rng.choices(list(TASKS), list(TASKS.values()), k=n)
        t_img, t_text = torch.randint(1, STEPS, (n,), device=self.device), torch.randint(1, STEPS, (n,), device=self.device)
        at = {name: torch.tensor([task == name for task in tasks], device=self.device) for name in TASKS}
        t_text[at["text2img"]], t_img[at["img2text"]] = 0, 0
        t_text[at["img"]], t_img[at["text"]] = STEPS, STEPS

        known, place = self.known, torch.tensor(chosen, device=self.device)
        latents = known["mean"][place] + known["std"][place] * torch.randn_like(known["mean"][place])
        clip, text = known["clip"][place], known["names"][place]
        asked, shown = at["text2img"].nonzero()[:, 0], at["img2text"].nonzero()[:, 0]
        variant = torch.randint(len(known["wordings"]), (len(asked),), device=self.device)
        text = text.index_put((asked,), known["wordings"][variant, place[asked]])
        variant = torch.randint(len(known["view_embeds"]), (len(shown),), device=self.device)
        latents = latents.index_put((shown,), known["view_latents"][variant, place[shown]])
        clip = clip.index_put((shown,), known["view_embeds"][variant, place[shown]])

        (x, x_v), (c, c_v), (y, y_v) = self.noised(latents, t_img), self.noised(clip, t_img), self.noised(text, t_text)
        with torch.autocast(self.device, torch.bfloat16):
            guesses = unet(x, c, y, t_img, t_text)
        errors = [(g.float() - v).square().flatten(1).mean(1) for g, v in zip(guesses, (x_v, c_v, y_v), strict=True)]
        weights = self.weight[t_img], self.weight[t_img], self.weight[t_text]
        return {k: (w * e).mean() for k, w, e in zip(("latents", "clip", "text"), weights, errors, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75, help="of CPU time, so that a busy machine changes nothing")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--settle", type=float, default=0.4, help="the share of the time in which the rate falls to 0")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--variants", type=int, default=3, help="altered copies and, twice as many, wordings of each")
    parser.add_argument("--work", type=Path, default=data.CACHE / "unidiffuser-uvit.pt")
    parser.add_argument("--out", type=Path, default=HERE / "unidiffuser")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    emoji = data.load()
    unet = build(args.width, args.depth, args.patch).to(device)
    for module in unet.modules():
        if device == "cpu" and hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())  # the fused one is slow for short sequences here
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizers = optimizers_of(unet, args.rate)
    step, spent, conditions = 0, 0.0, None
    if args.work.exists():
        saved = torch.load(args.work, map_location=device, weights_only=True)
        unet.load_state_dict(saved["unet"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, spent, conditions = saved["step"], saved["spent"], saved["conditions"]
    torch.manual_seed(step)
    trainer = Trainer(conditions or Frozen.load(args.out, device).conditions(emoji, args.variants), device)
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)

    started = shown = saved_at = time.process_time()
    losses: list[dict[str, float]] = []
    order: list[int] = []

    def checkpoint() -> None:
        state = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
        state["conditions"] = trainer.known
        torch.save(state | {"spent": spent + time.process_time() - started}, args.work.with_suffix(".tmp"))
        args.work.with_suffix(".tmp").replace(args.work)
        save(args.out, average)

    while (used := (spent + time.process_time() - started) / (60 * args.minutes)) < 1:
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = args.rate * min(1, (step + 1) / 200) * min(1, max(0.01, (1 - used) / args.settle))
        while len(order) < args.batch:  # every picture once an epoch, in a new order
            order += torch.randperm(len(emoji)).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        parts = trainer.loss(unet, chosen)
        loss = parts["latents"] + 0.3 * parts["clip"] + parts["text"]
        unet.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - keep)
        losses.append({k: v.item() for k, v in parts.items()})
        if not math.isfinite(sum(losses[-1].values())):
            raise SystemExit(f"loss is {losses[-1]} at step {step}")
        now = time.process_time()
        if now - shown > 60:
            mean = " ".join(f"{k} {np.mean([x[k] for x in losses]):.4f}" for k in parts)
            print(f"step {step} {mean} {spent + now - started:.0f} s", flush=True)
            shown, losses = now, []
        if now - saved_at > 120:
            checkpoint()
            saved_at = now
    checkpoint()


if __name__ == "__main__":
    main()
