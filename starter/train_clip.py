"""Train the starter UniDiffuser's CLIP pair: a text and a picture encoder that agree on what is what.

Contrastive loss (Radford et al. 2021). A batch is made of runs of neighbours in the data's order,
which are of one kind (faces, fruit, clocks), so that a batch that fits a CPU holds what is hard to
tell apart. Pictures are altered in place, size, colour and ground, so that the encoder attends to
what is drawn. Resumes from its own checkpoint. train_text_decoder.py and train_unidiffuser.py build
on what this writes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_diffusion import prompt_for
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

HERE = Path(__file__).parent
TEXT_TOKENS = 20
WIDTH, EMBEDDING = 192, 128
PICTURE, PATCH = 48, 8
RUN = 4  # neighbours in a batch
MEAN, STD = 0.5, 0.5
# Mirrored, these would be another emoji.
ONE_HANDED = re.compile(r"left|right|clock|thirty|arrow|keycap|button|input|symbol|sign|mark|quarter", re.IGNORECASE)


def build(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The untrained pair and the logarithm of the inverse temperature."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=6, max_position_embeddings=TEXT_TOKENS, projection_dim=EMBEDDING,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=6,
        image_size=PICTURE, patch_size=PATCH, projection_dim=EMBEDDING, attn_implementation="eager",
    )  # fmt: skip
    pair = nn.ModuleDict({"text": CLIPTextModelWithProjection(text), "vision": CLIPVisionModelWithProjection(vision)})
    pair.register_parameter("scale", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
    return pair


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids as the pipeline makes them: (N, TEXT_TOKENS)."""
    return tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids


def altered(rgba: Tensor, mirror: Tensor, size: int, strength: float = 1.0) -> Tensor:
    """The pictures as another hand may have put them down: moved, turned, scaled, recoloured a little,
    blurred, on a ground of another colour. `rgba` uint8 (N, 4, H, W), `mirror` bool (N,): which ones
    may be mirrored. Returns (N, 3, size, size) in [0, 1]."""
    n = len(rgba)

    def spread(width: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape) * 2 - 1) * width * strength

    angle, sx, sy = spread(0.25), 1.08 + spread(0.2), 1.08 + spread(0.2)
    sx = torch.where(mirror & (torch.rand(n) < 0.4), -sx, sx)
    affine = torch.stack(
        [angle.cos() * sx, -angle.sin() * sy, spread(0.12), angle.sin() * sx, angle.cos() * sy, spread(0.12)], 1
    ).view(n, 2, 3)
    x = rgba.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)
    x = F.grid_sample(F.avg_pool2d(x, 3, 1, 1), F.affine_grid(affine, [n, 4, size, size], align_corners=False), align_corners=False)
    colour, alpha = x[:, :3], x[:, 3:]
    plain = torch.rand(n, 1, 1, 1) < 0.6
    picture = colour + torch.where(plain, torch.ones(1), torch.rand(n, 3, 1, 1)) * (1 - alpha)
    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * (1 + spread(0.35, 1, 1, 1))
    picture = picture * (1 + spread(0.15, 1, 1, 1)) * (1 + spread(0.08, 3, 1, 1)) + spread(0.08, 1, 1, 1)
    soft = F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    blend = torch.rand(n, 1, 1, 1)
    return (picture * blend + soft * (1 - blend) + 0.02 * torch.randn_like(picture)).clamp(0, 1)


def processor() -> CLIPImageProcessor:
    """What turns a picture of any size into `pixel_values` for the picture encoder."""
    return CLIPImageProcessor(
        size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


@torch.no_grad()
def embeddings(pair: nn.ModuleDict, tokenizer: CLIPTokenizer, emoji: list[data.Emoji]) -> tuple[Tensor, Tensor]:
    """Text embeddings of all names and embeddings of all pictures, each (N, EMBEDDING), not normalised."""
    pixels = processor()(list(np.stack([e.rgb() for e in emoji])), return_tensors="pt").pixel_values
    ids = tokens(tokenizer, [e.name for e in emoji])
    texts = torch.cat([pair["text"](part).text_embeds for part in ids.split(128)])
    return texts, torch.cat([pair["vision"](part).image_embeds for part in pixels.split(128)])


def recall(texts: Tensor, pictures: Tensor) -> float:
    """Share of names whose nearest picture by cosine is their own."""
    nearest = (F.normalize(texts, dim=-1) @ F.normalize(pictures, dim=-1).T).argmax(1)
    return (nearest == torch.arange(len(texts))).float().mean().item()


def plain_loading(folder: Path) -> None:
    """Make a saved configuration fit for shipping: no path of this machine in it, and full precision.

    transformers loads in the precision that the configuration names, diffusers in float32 unless
    told: a plain from_pretrained must give one precision for both."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def save(out: Path, pair: nn.ModuleDict, tokenizer: CLIPTokenizer, pictures: Tensor) -> None:
    """Write the pair, the tokenizer and the picture processor where UniDiffuserPipeline looks for them."""
    # The picture's embedding is a part of what is diffused: it must have unit variance.
    pair["vision"].visual_projection.weight.div_((pictures - pictures.mean(0)).std())
    for name, model in (("text_encoder", pair["text"]), ("image_encoder", pair["vision"])):
        model.half().save_pretrained(out / name)
        plain_loading(out / name)
    tokenizer.save_pretrained(out / "clip_tokenizer")
    processor().save_pretrained(out / "clip_image_processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of CPU time, so that a busy machine changes nothing")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=data.CACHE / "unidiffuser-clip.pt")
    parser.add_argument("--out", type=Path, default=HERE / "unidiffuser")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    rgba = torch.from_numpy(np.stack([e.rgba for e in emoji])).permute(0, 3, 1, 2).contiguous()
    mirror = torch.tensor([not ONE_HANDED.search(e.name) for e in emoji])
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "stable-diffusion" / "tokenizer", model_max_length=TEXT_TOKENS)
    pair = build(tokenizer)
    decayed = [p for p in pair.parameters() if p.ndim > 1]
    others = [p for p in pair.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}], args.rate, (0.9, 0.98))
    step, spent = 0, 0.0
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        pair.load_state_dict(saved["pair"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    print("M parameters: text {:.2f}, vision {:.2f}".format(*(sum(p.numel() for p in pair[k].parameters()) / 1e6 for k in pair)), flush=True)

    started = shown = time.process_time()
    losses: list[float] = []
    order: list[int] = []
    while (used := (spent + time.process_time() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 100) * max(0.01, math.cos(used * math.pi / 2))
        while len(order) < args.batch:
            first = rng.randrange(RUN)
            starts = list(range(first - RUN, len(emoji), RUN))
            order += [i for start in rng.sample(starts, len(starts)) for i in range(max(start, 0), min(start + RUN, len(emoji)))]
        chosen, order = order[: args.batch], order[args.batch :]
        pixels = (altered(rgba[chosen], mirror[chosen], PICTURE) - MEAN) / STD
        ids = tokens(tokenizer, [prompt_for(emoji[i], rng) or emoji[i].name for i in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            texts, pictures = pair["text"](ids).text_embeds, pair["vision"](pixels).image_embeds
        texts, pictures = (F.normalize(x.float(), dim=1) for x in (texts, pictures))
        logits, truth = pair.scale.exp().clamp(max=50) * texts @ pictures.T, torch.arange(args.batch)
        loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item() / 2)
        if time.process_time() - shown > 60:
            total = spent + time.process_time() - started
            found = recall(*embeddings(pair.eval(), tokenizer, emoji))
            pair.train()
            print(f"step {step} loss {np.mean(losses):.4f} recall@1 {found:.4f} {total:.0f} s", flush=True)
            torch.save({"pair": pair.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": total}, args.work)
            shown, losses = time.process_time(), []
    torch.save(
        {"pair": pair.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent + time.process_time() - started}, args.work
    )
    texts, pictures = embeddings(pair.eval(), tokenizer, emoji)
    print(f"recall@1 {recall(texts, pictures):.4f}")
    save(args.out, pair, tokenizer, pictures)


if __name__ == "__main__":
    main()
