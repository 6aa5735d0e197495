"""A Stable Diffusion 1.x pipeline's weights under the names of the original checkpoint files.

The other way round than diffusers' `from_single_file`, to make files for it from the miniatures.
"""

from __future__ import annotations

import re

from diffusers import StableDiffusionPipeline
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
]


def original_layout(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights of the pipeline, by their original names."""
    tensors = {"model.diffusion_model." + _unet(pipe, k): v for k, v in pipe.unet.state_dict().items()}
    for name, tensor in pipe.vae.state_dict().items():
        renamed = _vae(name, len(pipe.vae.config.up_block_types))
        attention = ".attn_1." in renamed and renamed.endswith("weight") and tensor.ndim == 2
        tensors["first_stage_model." + renamed] = tensor[..., None, None] if attention else tensor
    text = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    tensors |= {"cond_stage_model.transformer.text_model." + k: v for k, v in text.items()}
    return {k: v.contiguous() for k, v in tensors.items()}


def _unet(pipe: StableDiffusionPipeline, name: str) -> str:
    for ours, original in _UNET.items():
        if name.startswith(ours + "."):
            rest = name.removeprefix(ours + ".")
            return f"{original}.{_resnet(rest) if 'resnets' in ours else rest}"
    way, level, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    layers = pipe.unet.config.layers_per_block
    if way == "down":
        block = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
        slot = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        rest = rest.replace("conv.", "op.", 1) if kind == "downsamplers" else rest
        return f"input_blocks.{block}.{slot}.{_resnet(rest) if kind == 'resnets' else rest}"
    block = int(level) * (layers + 1) + (layers if kind == "upsamplers" else int(index))
    attends = pipe.unet.config.up_block_types[int(level)].startswith("CrossAttn")
    slot = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attends else "1"}[kind]
    return f"output_blocks.{block}.{slot}.{_resnet(rest) if kind == 'resnets' else rest}"


def _resnet(rest: str) -> str:
    part, _, leaf = rest.partition(".")
    return f"{_RESNET[part]}.{leaf}"


def _vae(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    for ours, original in _VAE:
        name = re.sub(ours, original, name)
    return name
