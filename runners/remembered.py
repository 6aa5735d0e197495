"""What a model in memory has made of texts and pictures, so that it is not made again.

Only the device's thread uses it. It belongs to a resident model, is counted with it and goes with it; where memory is
short it is the first to go (runners.residency). What is found is what would have been made, to the bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Remembered:
    """Tensors by what they were made of, the least recently used forgotten first.

    Args:
        limit: bytes that they may take together; what is larger alone is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Hashable, Tensors] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What was made for `key`, now if it is not there. Nobody may change it in place."""
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        # Copies, where they are parts of larger ones, which would stay in memory with them.
        made = tuple(t.clone() if t.untyped_storage().nbytes() > _bytes((t,)) else t for t in make())
        size = _bytes(made)
        if size <= self.limit:
            while self.bytes + size > self.limit:
                _, forgotten = self._kept.popitem(last=False)
                self.bytes -= _bytes(forgotten)
            self._kept[key] = made
            self.bytes += size
        return made

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0


class Encoder:
    """Stands in a pipeline for its VAE, and encodes no picture twice. What is kept is the distribution, from which each
    request draws with its own generator."""

    def __init__(self, vae: AutoencoderKL, remembered: Remembered) -> None:
        self._vae, self._remembered = vae, remembered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """(N, 3, H, W), one by one: a batch's arithmetic differs in the last bits, and most batches are one picture N times."""
        distribution = DiagonalGaussianDistribution(torch.cat([self._parameters(row) for row in x.split(1)]))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _parameters(self, row: Tensor) -> Tensor:
        vae = self._vae
        tiles = (vae.tile_sample_min_size, vae.tile_overlap_factor) if vae.use_tiling else None
        key = ("encoded", _digest(row), row.shape, row.dtype, tiles)
        return self._remembered.get(key, lambda: (vae.encode(row).latent_dist.parameters,))[0]


def remember_encodings(pipe: DiffusionPipeline, remembered: Remembered) -> DiffusionPipeline:
    """Let a pipeline that nobody else has encode no picture twice."""
    if type(vae := vars(pipe).get("vae")) is AutoencoderKL:  # of other kinds pipelines ask which they are
        vars(pipe)["vae"] = Encoder(vae, remembered)
    return pipe


def _digest(x: Tensor) -> bytes:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
