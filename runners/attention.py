"""What a network's attention layers need not do again at every step. The pictures are the same to the bit.

- Keys and values of the texts are made once for all steps. In cross-attention they are projections of the prompts' embeddings (Rombach
  et al. 2022, section 3.3), which no step changes. They are kept as long as the very tensor of embeddings that they were made of: a run's own, or
  that of the runs which share passes (runners.stepping), a new one whenever one of them comes or goes. So they hold what the LoRAs of these
  rows add to them, too, and go with them.
- diffusers asks at every call of a layer which arguments its processor takes (`inspect.signature`), which takes longer than calling it. What
  every processor takes is passed on without asking.
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


def repeat_nothing(network: nn.Module) -> None:
    """Of a network (a UNet, a ControlNet) that is not compiled; one without such layers stays as it is."""
    crossing = _crossing(network)
    for layer in network.modules():
        if isinstance(layer, Attention) and type(layer).forward is Attention.forward:
            layer.forward = partial(_attend, layer, Kept(layer) if layer in crossing else layer)


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """A network as diffusers has it, to compare with."""
    changed = {layer: vars(layer).pop("forward") for layer in network.modules() if isinstance(layer, Attention) and "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in changed.items():
            layer.forward = forward


def numbers(network: nn.Module) -> int:
    """How many are kept for each row and token of text."""
    return sum(layer.to_k.out_features + layer.to_v.out_features for layer in _crossing(network))


class Kept:
    """Stands for a layer of cross-attention before its processor, whichever that is."""

    def __init__(self, layer: Attention) -> None:
        self._layer = layer
        self._keys, self._values = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def to_k(self, texts: Tensor) -> Tensor:
        """(N, tokens, C) of (N, tokens, D)."""
        return _once(self._keys, texts, self._layer.to_k)

    def to_v(self, texts: Tensor) -> Tensor:
        """As `to_k`."""
        return _once(self._values, texts, self._layer.to_v)


def _attend(layer: Attention, stand: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
    """As `Attention.forward`."""
    if more:
        return Attention.forward(stand, hidden_states, encoder_hidden_states, attention_mask, **more)
    attended: Tensor = layer.processor(stand, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    return attended


def _once(kept: WeakTensorKeyDictionary, texts: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    made: Tensor | None = kept.get(texts)
    if made is None:
        made = kept[texts] = make(texts)
    return made


def _crossing(network: nn.Module) -> list[Attention]:
    return [block.attn2 for block in network.modules() if isinstance(block, BasicTransformerBlock) and isinstance(block.attn2, Attention)]
