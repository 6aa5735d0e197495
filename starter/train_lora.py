"""Train the starter LoRA, `pixel_art_style`: the starter's pictures as pixel art.

Its pictures are the training pictures of 16x16 pixels in 8 colours, enlarged again to 64x64 without
smoothing: one pixel is then one place of the latents. Low-rank adaptation (Hu et al. 2021) through
peft, on the UNet's attention and convolutions, and on the text encoder, which would otherwise read the
prompt differently after a word it does not know. The prompt starts with the trigger word, and is empty in a
tenth of the samples, so that both halves of classifier-free guidance draw pixels.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import data
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn
from train_diffusion import NOISE, encode_pictures, prompt_for

HERE = Path(__file__).parent
TRIGGER = "pixel_art_style"
CELLS, COLOURS, RANK = 16, 8, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def pixelated(picture: np.ndarray) -> np.ndarray:
    """A (64, 64, 3) uint8 picture of CELLS x CELLS flat squares in COLOURS colours."""
    small = Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX).quantize(COLOURS, dither=Image.Dither.NONE)
    return np.asarray(small.convert("RGB").resize((data.SIZE, data.SIZE), Image.Resampling.NEAREST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--model", type=Path, default=HERE / "stable-diffusion")
    parser.add_argument("--out", type=Path, default=HERE / "loras")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(device)
    mean, std = encode_pictures(pipe.vae, np.stack([pixelated(e.rgb()) for e in emoji]))
    unet, text_encoder = pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    for part, targets in ((unet, TARGETS), (text_encoder, TEXT_TARGETS)):
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets), part)
    learnt = [p for part in (unet, text_encoder) for p in part.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in learnt) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(learnt, lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    noise_schedule = DDPMScheduler(**NOISE)

    started = shown = time.monotonic()
    losses: list[float] = []
    step = 0
    while (used := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 20) * (1 - used)
        chosen = torch.randint(len(emoji), (args.batch,)).tolist()
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        asked = [prompt_for(emoji[i], rng) for i in chosen]
        ids = pipe.tokenizer(
            [f"{TRIGGER}, {a}" if a else "" for a in asked], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        t = torch.randint(0, 1000, (args.batch,), device=device)
        noise = torch.randn_like(latents)
        with torch.autocast(device, torch.bfloat16):
            states = text_encoder(ids).last_hidden_state
            v = unet(noise_schedule.add_noise(latents, noise, t), t, states).sample
        loss = (v.float() - noise_schedule.get_velocity(latents, noise, t)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if time.monotonic() - shown > 30:
            print(f"step {step} loss {np.mean(losses):.4f}", flush=True)
            shown, losses = time.monotonic(), []

    layers = {
        f"{name}_lora_layers": {k: v.half() for k, v in convert_state_dict_to_diffusers(get_peft_model_state_dict(part)).items()}
        for name, part in (("unet", unet), ("text_encoder", text_encoder))
    }
    StableDiffusionPipeline.save_lora_weights(args.out, **layers, weight_name=f"{TRIGGER}.safetensors")


if __name__ == "__main__":
    main()
