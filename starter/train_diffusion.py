"""Train the starter Stable Diffusion: tokenizer, text encoder and UNet on the VAE's latents.

v-prediction (Salimans & Ho 2022), every timestep weighing the same: weights that favour little noise
(min-SNR) slow down what the prompt decides, which emoji it is. The prompt is dropped in a tenth of
the samples for classifier-free guidance (Ho & Salimans 2022); a moving average of the weights is what
is saved. Resumes from its own checkpoint, or else from the weights in the output folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import data
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
WIDTH = 192
NOISE = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
)
TEMPLATES = ("{}", "{}", "{}", "a {}", "a {}", "{} emoji", "an emoji of {}", "a picture of a {}")


def train_tokenizer(texts: list[str], vocabulary: int = 3000) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with end-of-word marks, so no text is unknown to it)."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2)
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two marks.
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def prompt_for(emoji: data.Emoji, rng: random.Random) -> str:
    """One of the ways in which a person may ask for this picture; empty in a tenth of the cases."""
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.70 or len(emoji.keywords) < 2:
        return rng.choice(TEMPLATES).format(emoji.name)
    some = rng.sample(emoji.keywords, rng.randint(1, min(4, len(emoji.keywords))))
    return ", ".join([emoji.name, *some] if kind < 0.90 else [*some, emoji.name])


def build(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The untrained text encoder and UNet."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return text_encoder, unet


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's latents, each (N, 4, 16, 16), scaled.
    `pictures` is uint8, (N, 64, 64, 3)."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    posteriors = [vae.encode(part.to(vae.device)).latent_dist for part in pixels.split(64)]
    scale = vae.config.scaling_factor
    return torch.cat([p.mean for p in posteriors]) * scale, torch.cat([p.std for p in posteriors]) * scale


def save(out: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: nn.Module, unet: nn.Module) -> None:
    """Write a folder that StableDiffusionPipeline.from_pretrained loads, in float16."""
    StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=DPMSolverMultistepScheduler(**NOISE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    # transformers loads in the precision that the configuration names, diffusers in float32 unless
    # told: a plain from_pretrained must give one precision for both.
    config = out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--settle", type=float, default=0.35, help="the share of the time in which the rate falls to 0")
    parser.add_argument("--work", type=Path, default=data.CACHE / "diffusion.pt")
    parser.add_argument("--out", type=Path, default=HERE / "stable-diffusion")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32).to(device)
    mean, std = encode_pictures(vae, np.stack([e.rgb() for e in emoji]))
    if (args.out / "tokenizer").exists():
        tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    else:
        tokenizer = train_tokenizer([t.format(e.name) for e in emoji for t in set(TEMPLATES)] + [k for e in emoji for k in e.keywords])
    text_encoder, unet = build(tokenizer)
    if not args.work.exists() and (args.out / "unet").exists():
        text_encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(args.out / "unet", torch_dtype=torch.float32)
    learner = nn.ModuleList([text_encoder, unet]).to(device).train()
    if device == "cpu":  # the fused attention's backward pass is slow there for so few tokens
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(learner).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step = 0
    if args.work.exists():
        saved = torch.load(args.work, map_location=device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (vae, text_encoder, unet)]
    print("M parameters: vae {:.2f}, text encoder {:.2f}, unet {:.2f}".format(*sizes), len(tokenizer), "tokens", flush=True)

    noise_schedule = DDPMScheduler(**NOISE)

    def checkpoint() -> None:
        state = {"learner": learner.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, args.work.with_suffix(".tmp"))
        args.work.with_suffix(".tmp").replace(args.work)
        save(args.out, vae, tokenizer, average[0], average[1])

    started = shown = saved_at = time.monotonic()
    losses: list[float] = []
    order: list[int] = []
    while (used := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 200) * min(1, max(0.01, (1 - used) / args.settle))
        while len(order) < args.batch:  # every picture once an epoch, in a new order
            order += torch.randperm(len(emoji)).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        ids = tokenizer(
            [prompt_for(emoji[i], rng) for i in chosen], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        t = torch.randint(0, 1000, (args.batch,), device=device)
        noise = torch.randn_like(latents)
        noisy = noise_schedule.add_noise(latents, noise, t).to(memory_format=torch.channels_last)
        target = noise_schedule.get_velocity(latents, noise, t)
        with torch.autocast(device, torch.bfloat16):
            v = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
        loss = (v.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.9993, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(learner.parameters()), 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {step}")
        now = time.monotonic()
        if now - shown > 60:
            print(f"step {step} loss {np.mean(losses):.4f} {now - started:.0f} s", flush=True)
            shown, losses = now, []
        if now - saved_at > 300:
            checkpoint()
            saved_at = now
    checkpoint()


if __name__ == "__main__":
    main()
