"""Motion adapters (AnimateDiff): what makes a resident Stable Diffusion model draw frames that belong together.

The animating UNet is put together from the model's own layers and the adapter's, not copies of them: the
adapter's bytes are all that it takes, and LoRAs act on it as on the model. runners.residency keeps one beside a model.
Source: Guo et al. 2023, "AnimateDiff" (https://arxiv.org/abs/2307.04725).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter, UNetMotionModel

from core.model_settings import MotionAdapter as Adapter
from core.problems import unavailable
from runners import weights

# What stays the model's: around the blocks, and in each of them.
_ENDS = ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out")
_OWN = ("resnets", "attentions", "downsamplers", "upsamplers")


@dataclass(frozen=True)
class Motion:
    """A motion adapter beside its model. `max_frames`: how many frames it can see at once."""

    id: str
    pipeline: AnimateDiffPipeline
    max_frames: int
    bytes: int
    sha256: str

    def follow(self, own: Any) -> None:
        """Take the model's first and last layers as they are now: a LoRA may have put itself in their place."""
        for name in _ENDS:
            setattr(self.pipeline.unet, name, getattr(own, name))


def load(base: DiffusionPipeline, adapter: Adapter, path: Path) -> Motion:
    """Put an adapter's layers between those of a model.

    Raises:
        Problem: 503 where the adapter's files are broken or it does not fit the model.
    """
    try:
        loaded = MotionAdapter.from_pretrained(path, dtype=base.unet.dtype, variant=adapter.variant, use_safetensors=True, local_files_only=True)
        loaded.to(base.unet.device)
        with init_empty_weights():
            unet = UNetMotionModel.from_unet2d(base.unet, loaded, load_weights=False)
        _share(unet, base.unet, loaded)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0][:200]
        raise unavailable(f"The motion adapter {adapter.id} cannot be used with this model: {first_line}", slug="model-broken") from error
    unet.eval()
    parts = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipeline = AnimateDiffPipeline(unet=unet, motion_adapter=loaded, **parts)
    pipeline.set_progress_bar_config(disable=True)
    size = sum(t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers()))
    return Motion(adapter.id, pipeline, int(loaded.config.motion_max_seq_length), size, weights.sha256_of(file(path, adapter)))


def file(path: Path, adapter: Adapter) -> Path:
    """The weights of an adapter whose folder is `path`."""
    return path / (f"diffusion_pytorch_model.{adapter.variant}.safetensors" if adapter.variant else "diffusion_pytorch_model.safetensors")


def _share(unet: UNetMotionModel, own: Any, motion: MotionAdapter) -> None:
    """Fill the empty animating UNet with the layers of the model and of the adapter."""
    if own.config.in_channels != unet.config.in_channels:
        raise ValueError(f"the adapter is for a UNet with {unet.config.in_channels} input channels")
    for name in _ENDS:
        setattr(unet, name, getattr(own, name))
    pairs = [*zip(unet.down_blocks, own.down_blocks, motion.down_blocks, strict=True), *zip(unet.up_blocks, own.up_blocks, motion.up_blocks, strict=True)]
    for block, from_model, from_adapter in [*pairs, (unet.mid_block, own.mid_block, motion.mid_block)]:
        for name in _OWN:
            if getattr(block, name, None) is not None:
                setattr(block, name, getattr(from_model, name))
        if from_adapter is not None and hasattr(block, "motion_modules"):
            block.motion_modules = from_adapter.motion_modules
    if empty := [name for name, tensor in (*unet.named_parameters(), *unet.named_buffers()) if tensor.is_meta]:
        raise ValueError(f"{len(empty)} of its layers have no weights, {empty[0]} for one")
