"""LoRAs made at test time: random matrices for a pipeline, written in kohya's, PEFT's and diffusers' key layouts.

Each layout's names are made here from the model's own module names, as the trainers make them, and
not by the loaders under test.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 4, 8.0  # the strength is alpha / rank
Matrices = dict[str, dict[str, tuple[Tensor, Tensor]]]  # component: module: (A, B)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "q_proj", "k_proj", "v_proj", "out_proj")
_KOHYA = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Flux: diffusers' three attention matrices are one in the original, kohya's names are the original's.
_FLUX = {
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "ff.net.2": "img_mlp_2",
}  # fmt: skip


def matrices(pipe: DiffusionPipeline, seed: int = 0, size: float = 0.3, encoders: bool = True) -> Matrices:
    """A and B for the attention (and one feed-forward matrix) of the denoiser and the CLIP encoders.
    In a Flux block, q, k and v share their A, as they do in what kohya's trainer makes."""
    generator = torch.Generator().manual_seed(seed)
    made: Matrices = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        component = pipe.components.get(name)
        if component is None or type(component).__name__ == "T5EncoderModel" or (not encoders and name.startswith("text")):
            continue
        made[name] = {}
        shared: dict[str, Tensor] = {}
        for path, module in component.named_modules():
            module = getattr(module, "base_layer", module)  # where a LoRA is on it already
            if not isinstance(module, nn.Linear) or not path.endswith(_ATTENTION) or path.startswith("single_"):
                continue
            a = size * torch.randn(RANK, module.in_features, generator=generator)
            if name == "transformer" and (fused := _fused(path)):
                a = shared.setdefault(path.rsplit(".", 1)[0] + fused[0], a)
            made[name][path] = (a, size * torch.randn(module.out_features, RANK, generator=generator))
    return made


def _fused(path: str) -> tuple[str, int] | None:
    """Where a Flux q, k or v stands in the original's one matrix."""
    last = path.rsplit(".", 1)[-1]
    for kind, names in (("img_attn_qkv", ("to_q", "to_k", "to_v")), ("txt_attn_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        if last in names:
            return kind, names.index(last)
    return None


def diffusers_layout(made: Matrices) -> dict[str, Tensor]:
    """As diffusers' training scripts have written since peft: alpha is folded into B."""
    return {
        f"{component}.{module}.lora_{side}.weight": matrix * (ALPHA / RANK if side == "B" else 1)
        for component, modules in made.items()
        for module, pair in modules.items()
        for side, matrix in zip("AB", pair, strict=True)
    }


def old_diffusers_layout(made: Matrices) -> dict[str, Tensor]:
    """As diffusers wrote before peft: `.lora.down` and `.lora.up` for the denoiser, `lora_linear_layer` in the encoders."""
    tensors = {}
    for component, modules in made.items():
        infix = "lora_linear_layer" if component.startswith("text") else "lora"
        for module, (a, b) in modules.items():
            tensors[f"{component}.{module}.{infix}.down.weight"] = a
            tensors[f"{component}.{module}.{infix}.up.weight"] = b * (ALPHA / RANK)
    return tensors


def peft_layout(made: Matrices) -> dict[str, Tensor]:
    """As `PeftModel.save_pretrained` writes the denoiser's adapter: no component in the names."""
    return {
        f"base_model.model.{module}.lora_{side}.weight": matrix * (ALPHA / RANK if side == "B" else 1)
        for component, modules in made.items()
        if not component.startswith("text")
        for module, pair in modules.items()
        for side, matrix in zip("AB", pair, strict=True)
    }


def kohya_layout(made: Matrices) -> dict[str, Tensor]:
    """As kohya's sd-scripts write: flat names, and alpha beside each pair."""
    tensors: dict[str, Tensor] = {}
    several = "text_encoder_2" in made or "transformer" in made

    def put(name: str, a: Tensor, b: Tensor) -> None:
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)

    for component, modules in made.items():
        if component == "transformer":
            fused: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for module, pair in modules.items():
                block, rest = module.removeprefix("transformer_blocks.").split(".", 1)
                if place := _fused(module):
                    fused.setdefault(f"lora_unet_double_blocks_{block}_{place[0]}", []).append(pair)
                else:
                    put(f"lora_unet_double_blocks_{block}_{_FLUX[rest]}", *pair)
            for name, pairs in fused.items():
                put(name, pairs[0][0], torch.cat([b for _, b in pairs]))
            continue
        prefix = "lora_unet" if component == "unet" else _KOHYA[component] if several else "lora_te"
        for module, pair in modules.items():
            path = module if component == "unet" else "text_model." + module.removeprefix("text_model.")
            put(f"{prefix}_{path.replace('.', '_')}", *pair)
    return tensors


LAYOUTS = {"diffusers": diffusers_layout, "old diffusers": old_diffusers_layout, "peft": peft_layout, "kohya": kohya_layout}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return path
