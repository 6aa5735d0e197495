"""Train the starter UniDiffuser's text decoder: a small GPT-2 that reads the text encoder's states
through a narrow linear layer and writes the caption they came from.

The narrow states are what the diffusion model makes, so they get noise here and the decoder learns
to write through it. UniDiffuserPipeline draws its starting noise at the text encoder's width and
sends it through the same narrow layer: the layer must therefore keep unit noise unit noise, so it
has orthonormal rows and no bias. It is the principal subspace of the states, turned at random so
that all its directions vary alike, and the text encoder's last norm is scaled so that they vary by
one. Bao et al. 2023 take the decoder's shape from Mokady et al. 2021.

Run after train_clip.py. Resumes from the decoder in the output folder. train_unidiffuser.py needs the
narrow layer only, which is written first, so both may run side by side.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserTextDecoder
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from train_clip import HERE, TEXT_TOKENS, WIDTH, plain_loading, tokens
from train_diffusion import TEMPLATES, prompt_for
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, GPT2Tokenizer

NARROW = 64
LONGEST = 24  # caption tokens, the end mark included
END = "<|EOS|>"
SEARCHED = 67  # tokens that the pipeline's beam search may go on for


def train_tokenizer(texts: list[str], vocabulary: int = 2000) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer of the GPT-2 kind, the end mark last."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    bpe.add_special_tokens([END])
    folder = data.CACHE / "unidiffuser-text-tokenizer"
    folder.mkdir(exist_ok=True)
    vocab, merges = bpe.save_model(str(folder))
    tokenizer = GPT2Tokenizer(vocab, merges, unk_token=END, bos_token=END, eos_token=END, pad_token=END)
    return tokenizer


@torch.no_grad()
def states(encoder: nn.Module, ids: Tensor) -> Tensor:
    """The text encoder's last hidden states, (N, TEXT_TOKENS, WIDTH)."""
    return torch.cat([encoder(part).last_hidden_state for part in ids.split(256)])


@torch.no_grad()
def narrow(encoder: CLIPTextModelWithProjection, ids: Tensor) -> Tensor:
    """Orthonormal rows (NARROW, WIDTH) that keep most of how the states vary; scales the encoder so
    that what they give has unit variance, and its text projection so that embeddings stay as they were."""
    seen = states(encoder, ids)[:, 1:]  # the start mark's state is the same for every text
    varied = (seen - seen.mean(0)).flatten(0, 1)
    _, vectors = torch.linalg.eigh(varied.T @ varied)
    turn, _ = torch.linalg.qr(torch.randn(NARROW, NARROW, generator=torch.Generator().manual_seed(0)))
    rows = turn @ vectors[:, -NARROW:].T
    spread = (varied @ rows.T).std()
    kept = (varied @ rows.T).square().sum() / varied.square().sum()
    print(f"the narrow layer keeps {kept:.3f} of the variance; states scaled by {1 / spread:.3f}", flush=True)
    encoder.text_model.final_layer_norm.weight.div_(spread)
    encoder.text_model.final_layer_norm.bias.div_(spread)
    encoder.text_projection.weight.mul_(spread)
    return rows


def build(tokenizer: GPT2Tokenizer) -> UniDiffuserTextDecoder:
    return UniDiffuserTextDecoder(
        prefix_length=TEXT_TOKENS, prefix_inner_dim=WIDTH, prefix_hidden_dim=NARROW, vocab_size=len(tokenizer),
        n_positions=TEXT_TOKENS + SEARCHED + 1, n_embd=192, n_layer=3, n_head=6, attn_pdrop=0.0,
    )  # fmt: skip


def save(out: Path, decoder: UniDiffuserTextDecoder) -> None:
    decoder = copy.deepcopy(decoder)
    # safetensors keeps no shared tensors: the output layer is written beside the embedding it is tied to.
    decoder.transformer.lm_head.weight = nn.Parameter(decoder.transformer.lm_head.weight.clone())
    decoder.half().save_pretrained(out / "text_decoder")
    plain_loading(out / "text_decoder")


def written(decoder: UniDiffuserTextDecoder, tokenizer: GPT2Tokenizer, narrowed: Tensor) -> list[str]:
    """Captions from narrow states, as the pipeline writes them (one by one: it stacks what a batch
    gives, which fails when captions differ in length)."""
    texts = []
    for one in narrowed.split(1):
        rows, lengths = decoder.generate_captions(one, tokenizer.eos_token_id, device=one.device)
        texts.append(tokenizer.decode(rows[0][: int(lengths[0])], skip_special_tokens=True))
    return texts


def loss_of(decoder: UniDiffuserTextDecoder, tokenizer: GPT2Tokenizer, narrowed: Tensor, texts: list[str]) -> Tensor:
    """Cross entropy of the texts' tokens, read from narrow states."""
    ids = [[*tokenizer(text).input_ids[: LONGEST - 1], tokenizer.eos_token_id] for text in texts]
    length = max(map(len, ids))
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in ids])
    with torch.autocast("cpu", torch.bfloat16):
        embedded = decoder.transformer.transformer.wte(labels[:, :-1].clamp(min=0))
        logits = decoder.transformer(inputs_embeds=torch.cat([decoder.decode_prefix(narrowed), embedded], 1)).logits
    return F.cross_entropy(logits[:, TEXT_TOKENS - 1 :].float().flatten(0, 1), labels.flatten())


def train(decoder: UniDiffuserTextDecoder, minutes: float, rate: Callable[[int, float], float], loss: Callable[[], Tensor]) -> None:
    """Train all but the narrow layer for so many minutes of CPU time; `rate` has the learning rate by the step
    and the share of the time that is used."""
    decoder.encode_prefix.requires_grad_(False)
    decoder.transformer.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], rate(0, 0), (0.9, 0.98), weight_decay=0.01)
    started = shown = time.process_time()
    step, losses = 0, []
    while (used := (time.process_time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, used)
        made = loss()
        optimizer.zero_grad(set_to_none=True)
        made.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(made.item())
        if time.process_time() - shown > 60:
            print(f"step {step} loss {np.mean(losses):.4f} {time.process_time() - started:.0f} s", flush=True)
            shown, losses = time.process_time(), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6, help="of CPU time, so that a busy machine changes nothing")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=HERE / "unidiffuser")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    emoji = data.load()
    clip_tokenizer = CLIPTokenizer.from_pretrained(args.out / "clip_tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(args.out / "text_encoder", dtype=torch.float32)
    if (args.out / "text_decoder").exists():
        tokenizer = GPT2Tokenizer.from_pretrained(args.out / "text_tokenizer")
        decoder = UniDiffuserTextDecoder.from_pretrained(args.out / "text_decoder", torch_dtype=torch.float32).train()
    else:
        tokenizer = train_tokenizer([t.format(e.name) for e in emoji for t in set(TEMPLATES)] + [k for e in emoji for k in e.keywords])
        decoder = build(tokenizer)
        rows = narrow(encoder, tokens(clip_tokenizer, [e.name for e in emoji]))
        with torch.no_grad():
            decoder.encode_prefix.weight.copy_(rows)
            decoder.encode_prefix.bias.zero_()
        copy.deepcopy(encoder).half().save_pretrained(args.out / "text_encoder")
        plain_loading(args.out / "text_encoder")
        tokenizer.save_pretrained(args.out / "text_tokenizer")
        save(args.out, decoder)
    print(f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)

    def rate(step: int, used: float) -> float:
        return args.rate * min(1, (step + 1) / 100) * max(0.01, math.cos(used * math.pi / 2))

    def loss() -> Tensor:
        texts = [e.name if rng.random() < 0.6 else prompt_for(e, rng) for e in rng.sample(emoji, args.batch)]
        wide = states(encoder, tokens(clip_tokenizer, texts))
        with torch.autocast("cpu", torch.bfloat16):
            narrowed = decoder.encode(wide)
            narrowed = narrowed + 0.6 * torch.rand(len(texts), 1, 1) * torch.randn_like(narrowed)
        return loss_of(decoder, tokenizer, narrowed, texts)

    train(decoder, args.minutes, rate, loss)
    save(args.out, decoder)
    decoder.eval()
    some = [e.name for e in emoji[::32]]
    clean = decoder.encode(states(encoder, tokens(clip_tokenizer, some)))
    for noise in (0.0, 0.4):
        texts = written(decoder, tokenizer, clean + noise * torch.randn_like(clean))
        print(f"written back exactly through noise of {noise}: {np.mean([a == b for a, b in zip(texts, some, strict=True)]):.3f}")
    print(texts[:20])


if __name__ == "__main__":
    main()
