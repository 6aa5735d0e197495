"""Prompts to embeddings: A1111's weights, prompts of any length, clip skip, and textual inversions,
through compel.

`(words)` weighs 1.1, `[words]` 1/1.1, `(words:1.3)` what it says; `\\(` is a plain bracket. The
parsed fragments go to compel, which chunks long prompts into windows of 77 tokens.
Source of the syntax: A1111 wiki, "Attention/emphasis".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from core import embeddings
from core.generation import AppliedEmbedding
from core.model_settings import Family
from core.plans import Plan
from runners.textual_inversion import Embedding, read, taught

_TOKEN = re.compile(r"\\\\|\\[()\[\]]|:\s*+([+-]?(?:\d++(?:\.\d*+)?|\.\d++))\s*+\)|[()\[\]]|[^\\()\[\]:]+|:|\\")


Fragments = list[tuple[str, float]]  # a prompt in parts, each with its weight
Tensors = tuple[Tensor, ...]
Remember = Callable[[Hashable, Callable[[], Tensors]], Tensors]  # what was made for a key, or is made now


@dataclass(frozen=True)
class Embedded:
    """The pipeline's prompt arguments, how much of the prompt they hold, and the textual inversions in them."""

    arguments: dict[str, Tensor]
    tokens: int
    cut: int
    notes: list[str]
    used: list[AppliedEmbedding]


def parse_weights(prompt: str) -> Fragments:
    """A prompt as (text, weight) fragments. Unbalanced brackets are plain text's best reading:
    an open one weighs to the end, a stray closing one is text. Weights are kept within 0 to 10."""
    found = list(_TOKEN.finditer(prompt))
    texts: list[str] = []
    weights = np.ones(len(found))  # an array: brackets nested by the thousand would take a list seconds
    round_open: list[int] = []
    square_open: list[int] = []

    @np.errstate(all="ignore")
    def scale(start: int, factor: float) -> None:
        weights[start : len(texts)] *= factor

    for match in found:
        text, weight = match.group(0), match.group(1)
        if text.startswith("\\") and len(text) == 2:
            texts.append(text[1])
        elif text == "(":
            round_open.append(len(texts))
        elif text == "[":
            square_open.append(len(texts))
        elif weight is not None and round_open:
            scale(round_open.pop(), float(weight))
        elif text == ")" and round_open:
            scale(round_open.pop(), 1.1)
        elif text == "]" and square_open:
            scale(square_open.pop(), 1 / 1.1)
        else:
            texts.append(text)
    for start in round_open:
        scale(start, 1.1)
    for start in square_open:
        scale(start, 1 / 1.1)
    bounded = [min(10.0, max(0.0, w)) for w in weights[: len(texts)].tolist()]
    merged = [("".join(text for text, _ in alike), weight) for weight, alike in groupby(zip(texts, bounded, strict=True), lambda pair: pair[1])]
    return [(t, w) for t, w in merged if t.strip()] or [("", 1.0)]


def _anew(_: Hashable, make: Callable[[], Tensors]) -> Tensors:
    return make()


def embed(pipe: DiffusionPipeline, family: Family, plan: Plan, picture: int = 0, remember: Remember = _anew) -> Embedded:
    """Everything the pipeline needs of the prompts of a picture, as its keyword arguments: tensors, (1, ...). Without guidance
    the negative prompt is not needed, and left out.

    Args:
        remember: finds what a text encoder has made of a text before.

    Raises:
        Problem: as `textual_inversion.read`.
    """
    texts = plan.words(picture)
    with torch.inference_mode():
        if family == "flux":
            return _for_flux(pipe, texts[0], remember)
        encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if family == "sdxl" else [])]
        widths = [encoder.config.hidden_size for encoder in encoders]
        words = "\n".join(texts)
        named = embeddings.named(words, [one.name for one in plan.embeddings])
        new = read([one for one in plan.embeddings if one.name in named], words, widths, plan.model_id)
        marks = {one.planned.name: one.mark for one in new}
        # Marked before the weights are read: a name may have brackets.
        prompts = [parse_weights(embeddings.replace(text, marks, marks.__getitem__)) for text in texts[: 2 if plan.guidance_scale > 1 else 1]]
        return (_for_sdxl if family == "sdxl" else _for_sd)(pipe, prompts, plan.clip_skip, new, remember)


def _for_sd(pipe: DiffusionPipeline, prompts: list[Fragments], clip_skip: int, new: list[Embedding], remember: Remember) -> Embedded:
    known = _known(remember, "text_encoder", clip_skip, new)
    with taught(pipe.tokenizer, pipe.text_encoder, new, "text_encoder") as tokenizer:
        with _fewer_layers(pipe.text_encoder, clip_skip):
            embeds = _weighted(tokenizer, pipe.text_encoder, prompts, ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED, pipe._execution_device, known)
        tokens = _count(tokenizer, prompts[0])
    return Embedded(_halves("prompt_embeds", embeds), tokens, 0, [], [one.applied for one in new])


def _for_sdxl(pipe: DiffusionPipeline, prompts: list[Fragments], clip_skip: int, new: list[Embedding], remember: Remember) -> Embedded:
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    texts = ["".join(text for text, _ in fragments) for fragments in prompts]
    with (
        taught(pipe.tokenizer, pipe.text_encoder, new, "text_encoder") as tokenizer,
        taught(pipe.tokenizer_2, pipe.text_encoder_2, new, "text_encoder_2") as tokenizer_2,
    ):
        parts = []
        for name, words, encoder in (("text_encoder", tokenizer, pipe.text_encoder), ("text_encoder_2", tokenizer_2, pipe.text_encoder_2)):
            with _fewer_layers(encoder, clip_skip):
                parts.append(_weighted(words, encoder, prompts, kind, pipe._execution_device, _known(remember, name, clip_skip, new)))
        provider, known = EmbeddingsProvider(tokenizer_2, _Placed(pipe.text_encoder_2, pipe._execution_device)), _known(remember, "pooled", 0, new)
        pooled = torch.cat([known(text, lambda text=text: (provider.get_pooled_embeddings([text]),))[0] for text in texts])
        tokens = _count(tokenizer, prompts[0])
    embeds = torch.cat(parts, dim=-1)
    notes = ["the pooled text embedding holds the prompt's first 75 tokens; all tokens reach cross-attention"] if tokens > 75 else []
    return Embedded(_halves("prompt_embeds", embeds) | _halves("pooled_prompt_embeds", pooled), tokens, 0, notes, [one.applied for one in new])


def _halves(name: str, rows: Tensor) -> dict[str, Tensor]:
    """The prompt's, and of two rows the negative prompt's."""
    return {name: rows[:1]} | ({f"negative_{name}": rows[1:]} if len(rows) > 1 else {})


def _known(remember: Remember, what: str, clip_skip: int, new: list[Embedding]) -> Remember:
    """`remember` for one encoder's embeddings of a text, or of its fragments, in which marks mean what they mean here."""
    return lambda text, make: remember((what, clip_skip, text, tuple((one.mark, one.sha256) for one in new)), make)


def _for_flux(pipe: DiffusionPipeline, prompt: str, remember: Remember) -> Embedded:
    limit = 512
    tokens = len(pipe.tokenizer_2(prompt, truncation=False).input_ids) - 1
    notes = []
    if any(weight != 1 for _, weight in parse_weights(prompt)):
        notes.append("prompt weights are plain text to this model")
    if len(pipe.tokenizer(prompt, truncation=False).input_ids) > pipe.tokenizer.model_max_length:
        notes.append("the CLIP embedding holds the prompt's first 75 tokens; T5 reads up to 512")
    embeds, pooled = remember(prompt, lambda: pipe.encode_prompt(prompt, None, device=pipe._execution_device, max_sequence_length=limit)[:2])
    return Embedded({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, tokens, max(0, tokens - (limit - 1)), notes, [])


def _weighted(tokenizer: Any, encoder: nn.Module, prompts: list[Fragments], kind: ReturnedEmbeddingsType, device: torch.device, known: Remember) -> Tensor:
    """Embeddings of all prompts, (N, 77 * windows, width), padded to one length with the empty prompt's.
    `device` is where the encoder runs: offloaded, it waits elsewhere."""
    provider = EmbeddingsProvider(tokenizer, _Placed(encoder, device), truncate=False, returned_embeddings_type=kind)

    def embedded(fragments: Fragments) -> Tensors:
        texts, weights = [t for t, _ in fragments], [w for _, w in fragments]
        return (provider.get_embeddings_for_weighted_prompt_fragments(text_batch=[texts], fragment_weights_batch=[weights], device=str(device)),)

    each = [known(tuple(fragments), partial(embedded, fragments))[0] for fragments in prompts]
    longest = max(e.shape[1] for e in each)
    if all(e.shape[1] == longest for e in each):
        return torch.cat(each)
    empty = known("", lambda: (provider.empty_z,))[0].to(each[0].dtype).reshape(1, -1, each[0].shape[-1])
    return torch.cat([torch.cat([e, *[empty] * ((longest - e.shape[1]) // empty.shape[1])], dim=1) for e in each])


class _Placed:
    """A text encoder on the device where it runs; offloaded, its weights are elsewhere and `encoder.device` says so."""

    def __init__(self, encoder: nn.Module, device: torch.device) -> None:
        self._encoder, self.device = encoder, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoder(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


@contextlib.contextmanager
def _fewer_layers(encoder: Any, skip: int) -> Iterator[None]:
    """The text encoder without its last `skip` layers: its final norm then sits on an earlier one,
    which is what diffusers' clip_skip computes."""
    maybe_install_capturing_hooks(encoder)  # else transformers would do so now, for the layers that are left, once and for all
    stack = getattr(encoder, "text_model", encoder).encoder
    layers = stack.layers
    kept = max(1, len(layers) - skip)
    stack.layers = layers[:kept]
    try:
        yield
    finally:
        stack.layers = layers


def _count(tokenizer: Any, fragments: Fragments) -> int:
    return len(tokenizer("".join(text for text, _ in fragments), truncation=False).input_ids) - 2
