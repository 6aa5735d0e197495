"""A UNet's keys and values of the texts, made once for all steps.

Cross-attention's keys and values are projections of the prompts' embeddings (Rombach et al. 2022, section 3.3), which no
step changes. They are kept as long as the very tensor of embeddings that they were made of: a run's own, or that of the runs which share
passes (runners.stepping), a new one whenever one of them comes or goes. So they hold what the LoRAs of these rows add to
them, too, and go with them. What is found is what would have been made, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class Kept:
    """Stands for a layer of cross-attention in its own forward, whoever its processor is."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._keys, self._values = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def to_k(self, texts: Tensor) -> Tensor:
        """(N, tokens, C) of (N, tokens, D)."""
        return _once(self._keys, texts, self._attention.to_k)

    def to_v(self, texts: Tensor) -> Tensor:
        """As `to_k`."""
        return _once(self._values, texts, self._attention.to_v)


def _once(kept: WeakTensorKeyDictionary, texts: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    made: Tensor | None = kept.get(texts)
    if made is None:
        made = kept[texts] = make(texts)
    return made


def keep_texts(network: nn.Module) -> None:
    """Let a network (a UNet, a ControlNet) keep them; one without cross-attention stays as it is."""
    for layer in _layers(network):
        layer.forward = partial(Attention.forward, Kept(layer))


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """A network as diffusers has it, to compare with."""
    kept = {layer: vars(layer).pop("forward") for layer in _layers(network) if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in kept.items():
            layer.forward = forward


def numbers(network: nn.Module) -> int:
    """How many are kept for each row and token of text."""
    return sum(layer.to_k.out_features + layer.to_v.out_features for layer in _layers(network))


def _layers(network: nn.Module) -> list[Attention]:
    return [block.attn2 for block in network.modules() if isinstance(block, BasicTransformerBlock) and isinstance(block.attn2, Attention)]
