"""What `optimise` in the catalogue does to a pipeline, and what is done for one request that is short of memory.

runners.loading applies an entry's settings once, when the model is loaded; runners.device wraps a
request in `thrifty`. core.optimising says what goes together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from core.optimising import Optimise
from runners import attention

QUANTISED = ("transformer", "text_encoder_2")  # Flux's two large parts
_PLAIN_ATTENTION = (AttnProcessor, AttnProcessor2_0)
TILE = 256  # pixels, the side of a VAE tile where memory is short


def keep_compiled(folder: Path) -> None:
    """Let torch.compile keep its kernels in `folder`, for the next start; the environment's own choice goes first."""
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        if os.environ.get(name) in (None, default_cache_dir()):  # which torch has put there itself when it was imported
            os.environ[name] = str(folder / part)


def loading_options(optimise: Optimise) -> dict[str, Any]:
    """What `from_pretrained` has to know."""
    options: dict[str, Any] = {}
    if optimise.device_map:
        options["device_map"] = optimise.device_map
    if optimise.quantisation:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig as EncoderConfig

        kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[optimise.quantisation]
        configs = zip(QUANTISED, (TorchAoConfig(kind()), EncoderConfig(kind())), strict=True)
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=dict(configs))
    return options


def apply(pipe: DiffusionPipeline, optimise: Optimise, device: torch.device) -> None:
    """Put a pipeline that was just loaded onto the device, or beside it, with its optimisations.

    Other pipelines made of its components share them, since all but offloading by component is a
    property of the components; there, the hooks are theirs too.
    """
    denoiser = denoiser_of(pipe)
    if optimise.channels_last:
        for module in (denoiser, pipe.vae):
            module.to(memory_format=torch.channels_last)
    if optimise.attention_slicing:
        denoiser.set_attention_slice("auto")
    if optimise.attention_backend:
        _attend_by(denoiser, optimise.attention_backend)
    pipe.vae.use_slicing = optimise.vae_slicing
    pipe.vae.use_tiling = optimise.vae_tiling
    place(pipe, optimise, device)
    if optimise.compile:  # dynamic: one compilation for every size and batch
        denoiser.compile_repeated_blocks(dynamic=True)
    else:
        attention.repeat_nothing(denoiser)


def place(pipe: DiffusionPipeline, optimise: Optimise, device: torch.device) -> None:
    """The weights to where `offload` wants them."""
    if optimise.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif optimise.offload == "sequential":
        for module in modules(pipe):
            cpu_offload(module, device, offload_buffers=bool(module._parameters))
    elif optimise.offload == "group":
        # By leaf, not by block: VAEs are called by encode and decode, which block hooks do not see.
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda", low_cpu_mem_usage=True)
    elif not optimise.device_map:
        pipe.to(device)


@contextlib.contextmanager
def thrifty(pipe: DiffusionPipeline, optimise: Optimise, device: torch.device, offload: bool) -> Iterator[None]:
    """Run with as little memory as can be, and leave the pipeline as it was: attention in slices, the
    VAE in slices and tiles, and with `offload` the components on the device one at a time."""
    vae, denoiser = pipe.vae, denoiser_of(pipe)
    before = {name: getattr(vae, name) for name in ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size")}
    processors = dict(getattr(denoiser, "attn_processors", {}))
    # IP-Adapter's processors have weights of their own, and compiled blocks would be compiled anew.
    slicing = hasattr(denoiser, "set_attention_slice") and not optimise.compile and all(type(p) in _PLAIN_ATTENTION for p in processors.values())
    try:
        vae.use_slicing = vae.use_tiling = True
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile(vae), tile(vae) // _reduction(vae)
        if slicing:
            denoiser.set_attention_slice("max")
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
        if slicing:
            denoiser.set_attn_processor(processors)
        if offload:
            pipe.remove_all_hooks()
            pipe._all_hooks = []
            pipe.to(device)


def tile(vae: nn.Module) -> int:
    """The side of a tile, in pixels, where memory is short."""
    return min(int(vae.tile_sample_min_size), TILE)


def tensor_bytes(pipe: DiffusionPipeline) -> int:
    """Bytes of a pipeline's weights, wherever they are, quantised ones as they are stored."""
    return sum(_bytes(t) for m in modules(pipe) for t in (*m.parameters(), *m.buffers()))


def modules(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [c for c in pipe.components.values() if isinstance(c, nn.Module)]


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's tell the size of what they stand for
        inner, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in inner)
    return tensor.numel() * tensor.element_size()


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def _reduction(vae: nn.Module) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _attend_by(denoiser: Any, backend: str) -> None:
    """Set the backend of one model; diffusers makes it everybody's default as well."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        denoiser.set_attention_backend(backend)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
