"""Embeddings (textual inversion, Gal et al. 2022): vectors that stand where a token's would, for one prompt.

Nothing is added to a model. A prompt's text has a mark (one private-use character) in an embedding's
place; `Vocabulary` gives it ids beyond the model's own, and `taught` puts the vectors there while the
text encoder runs. So a request without embeddings gets the very bytes that it got before. Called by
runners.prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import BatchEncoding

from core.generation import AppliedEmbedding
from core.loras.contents import MAX_VECTORS
from core.plans import PlannedEmbedding
from core.problems import problem, unavailable

_BYTES = 16 * 1024 * 1024  # far beyond MAX_VECTORS of the widest encoder
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Embedding:
    """One that was read: its mark, and its vectors by text encoder, each (vectors, width)."""

    planned: PlannedEmbedding
    mark: str
    sha256: str
    tensors: dict[str, Tensor]

    @property
    def applied(self) -> AppliedEmbedding:
        count = max(len(t) for t in self.tensors.values())
        return AppliedEmbedding(
            name=self.planned.name, sha256=self.sha256, vectors=count, commercial_use=self.planned.commercial_use, credit=self.planned.credit
        )


def read(planned: list[PlannedEmbedding], prompts: str, widths: list[int], model_id: str) -> list[Embedding]:
    """The embeddings of a plan, each with a mark that `prompts` does not have.

    Args:
        widths: of the model's text encoders, in their order.

    Raises:
        Problem: 503 for a file that is missing or broken, 422 for one of another width.
    """
    marks = (c for c in map(chr, _PRIVATE_USE) if c not in prompts)
    found = []
    for one in planned:
        try:
            stat = Path(one.path).stat()
            sha256, tensors = _load(one.path, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            raise unavailable(f"The vectors of the embedding {one.name} are gone from {one.path}.", slug="embedding-missing") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise unavailable(f"The embedding {one.name} cannot be read from {one.path}: {' '.join(str(error).split())[:300]}. Add it again.", slug="embedding-broken") from error
        ordered = [tensors[key] for key in ("clip_l", "clip_g") if key in tensors] if len(tensors) > 1 else list(tensors.values())
        if (has := [t.shape[1] for t in ordered]) != widths:
            detail = f"The embedding {one.name} has vectors of width {' and '.join(map(str, has))}; {model_id} reads {' and '.join(map(str, widths))}. Leave it out, or use the model that it was made for."
            raise problem(422, "embedding-unfit", "Embedding does not fit", detail)
        found.append(Embedding(one, next(marks), sha256, dict(zip(("text_encoder", "text_encoder_2"), ordered, strict=False))))
    return found


@lru_cache(maxsize=64)
def _load(path: str, _modified: int, _size: int) -> tuple[str, dict[str, Tensor]]:
    """The SHA-256 and the tensors, (vectors, width) in float32, of a file as it is.

    Raises:
        OSError, SafetensorError, ValueError: where it cannot be an embedding.
    """
    if _size > _BYTES:
        raise ValueError(f"it has {_size} bytes")
    content = Path(path).read_bytes()
    tensors = {key: (t[None] if t.ndim == 1 else t).float() for key, t in load(content).items()}
    if not tensors or any(t.ndim != 2 or not 1 <= len(t) <= MAX_VECTORS for t in tensors.values()):
        raise ValueError(f"it has no tensors of 1 to {MAX_VECTORS} vectors")
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError("it holds values that are not finite numbers")
    return hashlib.sha256(content).hexdigest(), tensors


class Vocabulary:
    """A CLIP tokenizer that knows marks too: each becomes as many ids, from `first` on, as it has vectors.
    What else is asked of it is the tokenizer's own."""

    def __init__(self, tokenizer: Any, first: int, sizes: dict[str, int]) -> None:
        self._tokenizer, self._first = tokenizer, first
        self._ids: dict[str, list[int]] = {}
        for mark, size in sizes.items():
            self._ids[mark] = list(range(first, first + size))
            first += size
        self._last = {ids[-1] for ids in self._ids.values()}
        self._parts = re.compile(f"([{''.join(sizes)}])")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: str | list[str], truncation: bool = False, **_: Any) -> BatchEncoding:
        if isinstance(texts, str):
            return BatchEncoding({"input_ids": self._encode(texts, truncation)})
        return BatchEncoding({"input_ids": [self._encode(text, truncation) for text in texts]})

    def _encode(self, text: str, truncation: bool) -> list[int]:
        ids: list[int] = []
        for part in self._parts.split(text):
            ids += self._ids.get(part) or self._tokenizer(part, add_special_tokens=False).input_ids
        if truncation:
            ids = ids[: self._tokenizer.model_max_length - 2]
        return [self._tokenizer.bos_token_id, *ids, self._tokenizer.eos_token_id]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """As the tokenizer writes them; an embedding is one word, so that it is not split between windows."""
        return [
            ("*</w>" if i in self._last else "*") if i >= self._first else self._tokenizer.convert_ids_to_tokens(i) for i in ids
        ]


@contextlib.contextmanager
def taught(tokenizer: Any, encoder: nn.Module, embeddings: list[Embedding], component: str) -> Iterator[Any]:
    """The tokenizer that knows the embeddings' marks, while the text encoder knows their vectors."""
    if not embeddings:
        yield tokenizer
        return
    table = encoder.get_input_embeddings()
    first = table.num_embeddings
    vectors = torch.cat([e.tensors[component] for e in embeddings]).to(table.weight.dtype)
    asked: list[Tensor] = []

    def hide(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The encoder sees an ordinary id in their place: it looks for the end of the text by the ids."""
        ids = args[0] if args else named["input_ids"]
        asked[:] = [ids]
        known = ids.masked_fill(ids >= first, 0)
        return ((known, *args[1:]), named) if args else (args, {**named, "input_ids": known})

    def put(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = asked[0].to(output.device)
        new = ids >= first
        output = output.clone()
        output[new] = vectors.to(output.device)[ids[new] - first]  # where the encoder runs, not where an offloaded one waits
        return output

    hooks = [encoder.register_forward_pre_hook(hide, with_kwargs=True), table.register_forward_hook(put)]
    try:
        yield Vocabulary(tokenizer, first, {e.mark: len(e.tensors[component]) for e in embeddings})
    finally:
        for hook in hooks:
            hook.remove()
