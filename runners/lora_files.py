"""From a LoRA file to matrices by component and layer, whatever key layout it has.

diffusers renames kohya's keys (also the original block names of SDXL and Flux) and its own older
ones; PEFT's have no component in front and get one here. Alphas are folded into the matrices, so
that a weight of 1 means what the trainer meant. Called by runners.adapters.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor, nn

DENOISERS, ENCODERS = ("unet", "transformer"), ("text_encoder", "text_encoder_2")
_PEFT_PREFIX = "base_model.model."
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_NAME = re.compile(r"[\w.-]+")
_LAYER = re.compile(r"(.+)\.lora_[AB]\.(weight|bias)")


@dataclass
class Matrices:
    """What a LoRA adds to one component.

    Attributes:
        tensors: `LAYER.lora_A.weight` (rank, in) and `LAYER.lora_B.weight` (out, rank), of the
            component's own layers only.
        ranks: each layer's rank.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int]


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that LoRAs may change, the denoiser first."""
    parts = pipe.components
    return {name: parts[name] for name in DENOISERS + ENCODERS if isinstance(parts.get(name), nn.Module)}


def load(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, and the settings that PEFT and diffusers may have put into its header.

    Raises:
        OSError, SafetensorError, ValueError: for a file that is missing, broken, or holds values
            that are not finite.
    """
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError("it holds values that are not finite numbers")
    settings = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    if not isinstance(settings, dict):
        raise ValueError("its header's settings are no JSON object")
    return tensors, settings


def by_component(tensors: dict[str, Tensor], settings: dict[str, Any], pipe: DiffusionPipeline) -> tuple[dict[str, Matrices], int]:
    """The matrices that each component has layers for, and the number of layers (and other tensors)
    in the file that the model has nothing for.

    Raises:
        ValueError, KeyError, RuntimeError: where the keys have no known layout.
    """
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise ValueError("it is a DoRA, of which only a part could be applied")
    parts = components(pipe)
    denoiser = next(iter(parts))
    named = {_with_component(key, denoiser): tensor for key, tensor in tensors.items()}
    options: dict[str, Any] = {"unet_config": pipe.unet.config} if denoiser == "unet" else {}
    state, _ = pipe.lora_state_dict(_fold_alphas(named), return_alphas=True, **options)
    found: dict[str, Matrices] = {}
    unmatched = {key.rsplit(".lora", 1)[0] for key in state if key.split(".")[0] not in parts}
    for name, component in parts.items():
        own = {key.removeprefix(name + "."): tensor for key, tensor in state.items() if key.startswith(name + ".")}
        matrices = Matrices({}, {})
        layers = dict(component.named_modules())
        for key, tensor in _to_peft(own, name, component).items():
            match = _LAYER.fullmatch(key)
            if match is None or match[1] not in layers:
                unmatched.add(f"{name}.{match[1] if match else key}")
                continue
            matrices.tensors[key] = tensor
            if key.endswith("lora_B.weight"):
                matrices.ranks[match[1]] = tensor.shape[1]
        for layer, rank in matrices.ranks.items():
            matrices.tensors[f"{layer}.lora_B.weight"] *= _scale(settings, name, layer, rank)
        if matrices.tensors:
            _check_pairs(matrices)
            found[name] = matrices
    return found, len(unmatched)


def _with_component(key: str, denoiser: str) -> str:
    """PEFT names the layers of the one model that it was given; diffusers puts the component first."""
    if not key.startswith(_PEFT_PREFIX):
        return key
    rest = key.removeprefix(_PEFT_PREFIX)
    return rest if rest.split(".")[0] in DENOISERS + ENCODERS else f"{denoiser}.{rest}"


def _fold_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without `NAME.alpha`: each pair's up matrix, in float32, times alpha / rank."""
    folded = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        if key.endswith(".alpha"):
            up = next((u for u in (key.removesuffix(".alpha") + end for end in _UP) if u in folded), None)
            if up is None:
                raise ValueError(f"{key} belongs to no matrix")
            folded[up] = folded[up] * (float(alpha) / folded[up].shape[1])
    return folded


def _to_peft(state: dict[str, Tensor], name: str, component: nn.Module) -> dict[str, Tensor]:
    """PEFT's names for the matrices of one component."""
    if not state:
        return {}
    if name in DENOISERS:
        return dict(convert_unet_state_dict_to_peft(state))
    renamed = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    if not hasattr(component, "text_model"):  # transformers has dropped this level; files still have it
        renamed = {key.removeprefix("text_model."): tensor for key, tensor in renamed.items()}
    return dict(renamed)


def _scale(settings: dict[str, Any], component: str, layer: str, rank: int) -> float:
    """alpha / rank by the header's settings (alpha / sqrt(rank) for rsLoRA); 1 where they are silent."""
    alphas = settings.get(f"{component}.alpha_pattern") or {}
    own = next((alpha for pattern, alpha in alphas.items() if _means(pattern, layer)), None)
    alpha = settings.get(f"{component}.lora_alpha", rank) if own is None else own
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)


def _means(pattern: str, layer: str) -> bool:
    """Whether a key of PEFT's patterns means a layer, by its name or the end of it. PEFT runs keys as regular expressions; of a file
    that anyone may have made, one could run for ever.

    Raises:
        ValueError: for a key that is more than a name.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not _NAME.fullmatch(name):
        raise ValueError(f"its header has a pattern that is no layer's name ({name[:80]!r})")
    return layer == name or (not pattern.startswith("^") and layer.endswith(f".{name}"))


def _check_pairs(matrices: Matrices) -> None:
    for layer in {match[1] for key in matrices.tensors if (match := _LAYER.fullmatch(key))}:
        if f"{layer}.lora_A.weight" not in matrices.tensors or layer not in matrices.ranks:
            raise ValueError(f"{layer} has one of its two matrices only")
