"""How good the starter UniDiffuser is: does it say what is shown, draw what is said, find what is meant?

Everything goes through the plain UniDiffuserPipeline and the folder's own CLIP pair. The rules:

- Captions: every (N / captions)-th emoji, seed 0. A caption is right when it contains, as a whole
  word, the noun of the picture's name: the name's last word ("apple" of "red apple"). Stricter
  beside it: the caption is the whole name.
- Drawing: evaluate.py's rule, prompts and distance.
- Retrieval, recall@1 by cosine over all emoji: a name finds its picture; and on the same emoji drawn
  by another vendor, never trained on, a name finds its picture and a picture finds its twin.
- One emoji, two pictures: a moved, turned and recoloured copy is nearer to its original than any
  other emoji's picture is.
- Modes: a joint pair agrees when the text has the noun of the training picture nearest to its picture; a
  variation keeps to the subject when the nearest picture, or the noun, is still the same.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserPipeline
from evaluate import GRID, dominant_colour, features, nearest
from PIL import Image, ImageDraw
from torch import Tensor
from train_clip import altered
from transformers import CLIPTextModelWithProjection

HERE = Path(__file__).parent


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower().replace("’", ""))


class Model:
    """The plain pipeline, and the calls that the figures need of it."""

    def __init__(self, folder: Path, steps: int, guidance: float, caption_steps: int, caption_guidance: float) -> None:
        self.pipe = UniDiffuserPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
        self.steps, self.guidance = steps, guidance
        self.caption_steps, self.caption_guidance = caption_steps, caption_guidance

    def draw(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """One picture for each prompt and seed, uint8 (N, 64, 64, 3)."""
        self.pipe.set_text_to_image_mode()
        made = []
        for start in range(0, len(prompts), 30):
            generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + 30]]
            pictures = self.pipe(
                prompts[start : start + 30], generator=generators, num_inference_steps=self.steps,
                guidance_scale=self.guidance, output_type="np",
            ).images  # fmt: skip
            made.append((pictures * 255).round().astype(np.uint8))
        return np.concatenate(made)

    def caption(self, picture: np.ndarray, seed: int = 0) -> str:
        self.pipe.set_image_to_text_mode()
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(
            image=Image.fromarray(picture), generator=generator, num_inference_steps=self.caption_steps, guidance_scale=self.caption_guidance
        ).text[0]

    def sample(self, seed: int) -> tuple[np.ndarray | None, str]:
        """A picture and its text in the joint mode, a text alone in the text mode."""
        generator = torch.Generator().manual_seed(seed)
        made = self.pipe(generator=generator, num_inference_steps=self.steps, guidance_scale=self.guidance, output_type="np")
        return None if made.images is None else (made.images[0] * 255).round().astype(np.uint8), made.text[0]

    @torch.no_grad()
    def text_embeddings(self, texts: list[str]) -> Tensor:
        """(N, D), of unit length."""
        tokenizer = self.pipe.clip_tokenizer
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(torch.cat([self.text_encoder(part).text_embeds for part in ids.split(128)]), dim=-1)

    @torch.no_grad()
    def picture_embeddings(self, pictures: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) to (N, D), of unit length."""
        pixels = self.pipe.clip_image_processor(list(pictures), return_tensors="pt").pixel_values
        return F.normalize(torch.cat([self.pipe.image_encoder(part).image_embeds for part in pixels.split(128)]), dim=-1)


def share(true: Iterable[bool]) -> float:
    return round(float(np.mean(list(true))), 4)


def found(queries: Tensor, gallery: Tensor, count: int = 1) -> float:
    """Share of the queries whose own entry of the gallery is among the nearest `count`."""
    best = (queries @ gallery.T).topk(count, dim=1).indices
    return round((best == torch.arange(len(queries))[:, None]).any(1).float().mean().item(), 4)


def captions(model: Model, emoji: list[data.Emoji], count: int) -> dict[str, object]:
    chosen = [emoji[i * len(emoji) // count] for i in range(count)]
    started = time.perf_counter()
    said = [model.caption(e.rgb()) for e in chosen]
    seconds = time.perf_counter() - started
    return {
        "pictures": count,
        "steps": model.caption_steps,
        "guidance_scale": model.caption_guidance,
        "contains_noun": share(words(e.name)[-1] in words(s) for e, s in zip(chosen, said, strict=True)),
        "is_name": share(e.name.lower() == s.strip().lower() for e, s in zip(chosen, said, strict=True)),
        "seconds_each": round(seconds / count, 2),
        "wrong": {e.name: s for e, s in zip(chosen, said, strict=True) if words(e.name)[-1] not in words(s)},
    }


def drawings(model: Model, emoji: list[data.Emoji], count: int, seeds: int) -> dict[str, object]:
    known = features(np.stack([e.rgb() for e in emoji]))
    truth = [i * len(emoji) // count for i in range(count) for _ in range(seeds)]
    pictures = model.draw([emoji[i].name for i in truth], list(range(seeds)) * count)
    ranks = [nearest(p, known, 5) for p in pictures]
    hearts = model.draw(["red heart"] * 10, list(range(10)))
    return {
        "prompts": count,
        "seeds": seeds,
        "steps": model.steps,
        "guidance_scale": model.guidance,
        "nearest_is_named": share(t == r[0] for t, r in zip(truth, ranks, strict=True)),
        "named_in_nearest_5": share(t in r for t, r in zip(truth, ranks, strict=True)),
        "red_hearts_that_are_red": share(dominant_colour(p) == "red" for p in hearts),
    }


def modes(model: Model, emoji: list[data.Emoji], count: int) -> dict[str, object]:
    """The modes without an input, and the variations: `count` results of each."""
    known = features(np.stack([e.rgb() for e in emoji]))
    names = {e.name.lower() for e in emoji}
    joint, texts = [], []
    for seed in range(count):
        model.pipe.set_joint_mode()
        joint.append(model.sample(seed))
        model.pipe.set_text_mode()
        texts.append(model.sample(seed)[1])
    shown = [emoji[nearest(picture, known, 1)[0]].name for picture, _ in joint]
    chosen = [emoji[i * len(emoji) // count] for i in range(count)]
    redrawn = model.draw([model.caption(e.rgb()) for e in chosen], list(range(count)))
    retold = [model.caption(p) for p in model.draw([e.name for e in chosen], list(range(count)))]
    return {
        "each": count,
        "joint_text_has_the_noun_of_its_picture": share(words(name)[-1] in words(text) for name, (_, text) in zip(shown, joint, strict=True)),
        "joint_different_pictures": len(set(shown)),
        "text_is_a_name": share(text.strip().lower() in names for text in texts),
        "image_variation_is_of_the_same": share(emoji[nearest(p, known, 1)[0]].name == e.name for e, p in zip(chosen, redrawn, strict=True)),
        "text_variation_has_the_noun": share(words(e.name)[-1] in words(text) for e, text in zip(chosen, retold, strict=True)),
    }


def retrieval(model: Model, emoji: list[data.Emoji]) -> dict[str, object]:
    pictures = model.picture_embeddings(np.stack([e.rgb() for e in emoji]))
    texts = model.text_embeddings([e.name for e in emoji])
    rgba = torch.from_numpy(np.stack([e.rgba for e in emoji])).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(0)
    copies = altered(rgba, torch.zeros(len(emoji), dtype=torch.bool), data.SIZE)
    copied = model.picture_embeddings((copies * 255).round().byte().permute(0, 2, 3, 1).numpy())
    place = {e.name: i for i, e in enumerate(emoji)}
    others = [e for e in data.load("twitter") if e.name in place]
    at = [place[e.name] for e in others]
    foreign = model.picture_embeddings(np.stack([e.rgb() for e in others]))
    return {
        "emoji": len(emoji),
        "name_finds_picture": found(texts, pictures),
        "picture_finds_name": found(pictures, texts),
        "altered_copy_finds_original": found(copied, pictures),
        "other_vendor": {
            "emoji": len(others),
            "chance": round(1 / len(others), 5),
            "name_finds_picture": found(texts[at], foreign),
            "name_finds_picture_in_5": found(texts[at], foreign, 5),
            "picture_finds_twin": found(foreign, pictures[at]),
        },
    }


def grid(model: Model, path: Path) -> None:
    """Pictures of evaluate.py's prompts, with the model's own caption of each below it."""
    scale, line = 2, 24
    sheet = model.draw(list(GRID), [1] * len(GRID))
    cell = data.SIZE * scale
    image = Image.new("RGB", (8 * cell, 2 * (cell + line)), "white")
    pen = ImageDraw.Draw(image)
    for i, (prompt, picture) in enumerate(zip(GRID, sheet, strict=True)):
        x, y = i % 8 * cell, i // 8 * (cell + line)
        image.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 4, y + cell), f"{prompt}\n> {model.caption(picture)}", fill="black", font_size=10)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "unidiffuser")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--caption-steps", type=int, default=10)
    parser.add_argument("--caption-guidance", type=float, default=2.0)
    parser.add_argument("--modes", type=int, default=50)
    parser.add_argument("--json", type=Path, default=HERE / "evaluation-unidiffuser.json")
    parser.add_argument("--grid", type=Path, default=HERE / "samples-unidiffuser.png")
    args = parser.parse_args()

    emoji = data.load()
    model = Model(args.model, args.steps, args.guidance, args.caption_steps, args.caption_guidance)
    apple = next(e for e in emoji if e.name == "red apple")
    report = {
        "retrieval": retrieval(model, emoji),
        "captions": captions(model, emoji, args.captions) | {"red_apple": model.caption(apple.rgb())},
        "drawings": drawings(model, emoji, args.prompts, args.seeds),
        "modes": modes(model, emoji, args.modes),
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))
    args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    grid(model, args.grid)


if __name__ == "__main__":
    main()
