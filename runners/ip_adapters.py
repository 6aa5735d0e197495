"""IP-Adapters: pictures as a prompt. Loaded beside a model's UNet, put in and out of it by exchanging attention processors.

The processors and the projection that an adapter brings are kept apart while it does not act, and the UNet's own
ones are put back as the very objects they were: what runs without an adapter is what ran before there was one.
Source: Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter"; diffusers' IPAdapterMixin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from core.model_settings import IpAdapter
from runners import weights


@dataclass(frozen=True)
class Attention:
    """What an adapter exchanges in a UNet."""

    processors: dict[str, Any]
    projection: Any
    projection_type: str | None

    @classmethod
    def of(cls, unet: Any) -> Attention:
        return cls(dict(unet.attn_processors), unet.encoder_hid_proj, unet.config.encoder_hid_dim_type)

    def put_into(self, unet: Any) -> None:
        unet.encoder_hid_proj = self.projection
        unet.config.encoder_hid_dim_type = self.projection_type
        unet.set_attn_processor(dict(self.processors))  # which empties the dictionary that it is given


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory: its part of the UNet, its picture encoder, and the SHA-256 of its file."""

    attention: Attention
    encoder: CLIPVisionModelWithProjection
    sha256: str

    @property
    def modules(self) -> list[nn.Module]:
        return [self.encoder, self.attention.projection, *(p for p in self.attention.processors.values() if isinstance(p, nn.Module))]

    def scale(self, scale: float) -> None:
        """How strongly it acts from now on."""
        for processor in self.attention.processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]

    @torch.inference_mode()
    def embed(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """The pictures as the projection takes them, and what stands for no picture: each (1, N, ...)."""
        size = self.encoder.config.image_size
        prepare = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pixels = prepare(pictures, return_tensors="pt").pixel_values.to(self.encoder.device, self.encoder.dtype)
        if isinstance(self.attention.projection.image_projection_layers[0], ImageProjection):
            embeds = self.encoder(pixels).image_embeds
            return embeds[None], torch.zeros_like(embeds)[None]
        # The "plus" adapters look at every patch.
        states = [self.encoder(p, output_hidden_states=True).hidden_states[-2] for p in (pixels, torch.zeros_like(pixels))]
        return states[0][None], states[1][None]


def files(path: Path, adapter: IpAdapter) -> list[Path]:
    """The weight files of an adapter whose source is at `path`: its own first."""
    return [path / adapter.subfolder / adapter.weight_name, *sorted((path / adapter.image_encoder).glob("*.safetensors"))]


def load(unet: Any, path: Path, adapter: IpAdapter, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Load an adapter for a UNet, which is left as it was.

    Raises:
        OSError, ValueError, RuntimeError, KeyError: for files that are missing, broken or of another architecture.
    """
    file = files(path, adapter)[0]
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    with safe_open(file, framework="pt", device="cpu") as opened:
        for key in opened.keys():  # noqa: SIM118, a file is no dictionary
            part, _, name = key.partition(".")
            if part not in state or "lora" in name:
                raise ValueError(f"{key} is no tensor of a plain or plus IP-Adapter (FaceID adapters are not supported)")
            state[part][name] = opened.get_tensor(key)
    encoder = CLIPVisionModelWithProjection.from_pretrained(path / adapter.image_encoder, dtype=dtype, use_safetensors=True, local_files_only=True).to(device)
    own = Attention.of(unet)
    try:
        unet.set_attn_processor(AttnProcessor2_0())
        # What IPAdapterMixin.load_ip_adapter calls; that one would also keep a picture encoder in the pipeline.
        unet._load_ip_adapter_weights([state])
        attention = Attention.of(unet)
    finally:
        own.put_into(unet)
    return Loaded(attention, encoder.eval(), weights.sha256(file, None))
