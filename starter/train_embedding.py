"""Train the starter embedding, `washed_out`: a textual inversion for the negative prompt.

Textual inversion (Gal et al. 2022): everything is frozen but the vectors of one new word, which stand
where tokens' embeddings would. Its pictures are the training pictures made pale and soft, so that
guidance away from the word draws stronger colours and sharper edges. Three in four prompts are the
word alone, as it stands in a negative prompt; the others name the picture before it. At the end, or with
`--minutes 0` at once, it measures what the word does in a negative prompt, through diffusers' own loader.
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
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_diffusion import NOISE, encode_pictures, prompt_for

HERE = Path(__file__).parent
NAME, START = "washed_out", "white"
VECTORS = 2


def washed_out(picture: np.ndarray) -> np.ndarray:
    """A (64, 64, 3) uint8 picture blurred and halfway to grey of its own lightness, and lighter."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)), np.float32)
    grey = (soft @ np.float32([0.299, 0.587, 0.114]))[..., None]
    return (255 - 0.6 * (255 - (soft + grey) / 2)).round().astype(np.uint8)


def states(pipe: StableDiffusionPipeline, prompts: list[str], vectors: Tensor) -> Tensor:
    """The text encoder's states, (N, tokens, width), of the prompts with the vectors at their end."""
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    size, rows = tokenizer.model_max_length, []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[: size - 2 - len(vectors)]
        filling = size - 1 - len(ids) - len(vectors)
        before = table(torch.tensor([tokenizer.bos_token_id, *ids]))
        after = table(torch.tensor([tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (filling - 1)))
        rows.append(torch.cat([before, vectors, after]))
    hook = table.register_forward_hook(lambda *_: torch.stack(rows))
    try:
        return pipe.text_encoder(torch.zeros(len(prompts), size, dtype=torch.long)).last_hidden_state
    finally:
        hook.remove()


def measure(pipe: StableDiffusionPipeline, file: Path, emoji: list[data.Emoji]) -> None:
    """Print, for pictures with and without the word in the negative prompt, the mean spread between a
    pixel's largest and smallest channel, and the mean step between neighbours, both of 255."""
    pipe.load_textual_inversion({NAME: load_file(file)["emb_params"].float()}, token=NAME)
    pipe.set_progress_bar_config(disable=True)
    names = [emoji[i * len(emoji) // 24].name for i in range(24)]
    for negative in ("", NAME):
        made = []
        for part in (names[:12], names[12:]):
            generators = [torch.Generator().manual_seed(0) for _ in part]
            made += list(pipe(part, negative_prompt=[negative] * len(part), generator=generators, num_inference_steps=15, guidance_scale=5, output_type="np").images)
        pixels = 255 * np.stack(made)
        edges = np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean()
        print(f"negative prompt {negative!r}: colour spread {(pixels.max(-1) - pixels.min(-1)).mean():.1f}, edges {edges:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4, help="of CPU time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--model", type=Path, default=HERE / "stable-diffusion")
    parser.add_argument("--out", type=Path, default=HERE / "embeddings")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    file = args.out / f"{NAME}.safetensors"
    if not args.minutes:
        measure(pipe, file, emoji)
        return
    mean, std = encode_pictures(pipe.vae, np.stack([washed_out(e.rgb()) for e in emoji]))
    unet = pipe.unet.requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slow for so few tokens
    pipe.text_encoder.requires_grad_(False).set_attn_implementation("eager")
    table = pipe.text_encoder.get_input_embeddings().weight
    start = pipe.tokenizer(START, add_special_tokens=False).input_ids[0]
    vectors = nn.Parameter(table[start].repeat(VECTORS, 1) + 0.01 * torch.randn(VECTORS, table.shape[1]))
    optimizer = torch.optim.Adam([vectors], lr=args.rate)
    noise_schedule = DDPMScheduler(**NOISE)

    began = shown = time.process_time()
    losses: list[float] = []
    step = 0
    while (used := (time.process_time() - began) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = args.rate * min(1, (step + 1) / 10) * (1 - used)
        chosen = torch.randint(len(emoji), (args.batch,)).tolist()
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        asked = [prompt_for(emoji[i], rng) if rng.random() < 0.25 else "" for i in chosen]
        t = torch.randint(0, 1000, (args.batch,))
        noise = torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(noise_schedule.add_noise(latents, noise, t), t, states(pipe, asked, vectors)).sample
        loss = (v.float() - noise_schedule.get_velocity(latents, noise, t)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if time.process_time() - shown > 30:
            print(f"step {step} loss {np.mean(losses):.4f}", flush=True)
            shown, losses = time.process_time(), []
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": vectors.detach().half()}, file)
    measure(pipe, file, emoji)


if __name__ == "__main__":
    main()
