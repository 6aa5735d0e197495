"""How a model of the catalogue is made smaller or faster: the `optimise` section of its entry.

No torch: combinations that cannot work are refused when the configuration is read, and what needs a
GPU or a package that is not there when the service starts. runners.optimising applies the rest.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict

AttentionBackend = Literal[
    "native", "_native_math", "_native_cudnn", "_native_efficient", "_native_flash", "flex", "xformers",
    "flash", "flash_varlen", "flash_hub", "flash_varlen_hub", "flash_4_hub", "_flash_3", "_flash_varlen_3", "_flash_3_hub", "_flash_3_varlen_hub",
    "sage", "sage_hub", "sage_blackwell_hub", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
]  # fmt: skip
Offload = Literal["none", "model", "sequential", "group"]
_ON_A_CPU = ("native", "_native_math")


class Optimise(BaseModel):
    """Optimisations of one model, by the names that diffusers and torch give them; all off by default.

    quantisation: torchao's weight-only int8 or float8, of Flux's transformer and T5.
    offload: weights wait in CPU memory and go to the GPU by component (model), by layer (sequential), or by
    layer with the next one on its way (group).
    device_map: "balanced" spreads the components over the worker's GPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention_slicing: bool = False
    attention_backend: AttentionBackend | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False
    quantisation: Literal["int8", "float8"] | None = None
    offload: Offload = "none"
    device_map: Literal["balanced"] | None = None

    @property
    def by_layer(self) -> bool:
        """Layers are moved one by one, so that none can be added (by a LoRA) to those that are."""
        return self.offload in ("sequential", "group")

    def conflicts(self, family: str, single_file: bool) -> list[str]:
        """What of this cannot be had for a model of `family`, or not together."""
        flux = family == "flux"
        found = []
        if family == "upscaler" and (given := [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]):
            found.append(f"{', '.join(given)}: is for models with a UNet or transformer; leave it out")
        if flux and self.attention_slicing:
            found.append("attention_slicing: Flux's attention cannot be sliced; leave it out")
        if self.attention_backend and not flux:
            found.append("attention_backend: the UNet and UniDiffuser families have torch's own attention alone; leave it out")
        if self.quantisation and not flux:
            found.append("quantisation: is for the flux family")
        if self.quantisation and single_file:
            found.append("quantisation: needs a model in diffusers' layout, not a single file")
        if self.quantisation and self.offload == "sequential":
            found.append("quantisation: quantised layers cannot be offloaded one by one; use offload: model or group")
        if self.compile and self.by_layer:
            found.append(f"compile: compiled layers cannot be moved one by one; use offload: model instead of {self.offload}")
        if self.device_map and (self.offload != "none" or self.quantisation or self.compile or single_file):
            found.append("device_map: goes with a model in diffusers' layout, without offload, quantisation and compile")
        chosen = {name for name, value in self if value != type(self).model_fields[name].default}
        if family == "unidiffuser" and (other := chosen - {"vae_slicing", "vae_tiling", "channels_last"}):
            found.append(f"{', '.join(sorted(other))}: UniDiffuser has vae_slicing, vae_tiling and channels_last alone")
        return found

    def missing(self, gpus: int) -> list[str]:
        """What this needs that a worker with so many GPUs, or this installation, does not have."""
        found = []
        if self.offload != "none" and not gpus:
            found.append(f"offload: {self.offload} moves weights between a GPU and the CPU, and this runs on a CPU; use none")
        if self.device_map and gpus < 2:
            found.append(f"device_map: spreads a model over several GPUs, and a worker here has {gpus}; see `gpu` of the runner")
        if self.quantisation == "float8" and not gpus:
            found.append("quantisation: float8 needs a GPU; use int8")
        if self.quantisation and not find_spec("torchao"):
            found.append("quantisation: needs the package torchao (pip install 'easel[quantisation]')")
        if backend := self.attention_backend:
            if not gpus and backend not in _ON_A_CPU:
                found.append(f"attention_backend: {backend} needs a GPU; a CPU has {' and '.join(_ON_A_CPU)}")
            elif (package := _package(backend)) and not find_spec(package):
                found.append(f"attention_backend: {backend} needs the package {package}")
        return found


def _package(backend: str) -> str | None:
    """The package that has an attention backend; None for torch's own."""
    if backend.endswith("_hub"):
        return "kernels"
    name = backend.lstrip("_")
    if name.startswith("flash_3") or name == "flash_varlen_3":
        return "flash_attn_interface"
    return next((p for start, p in (("flash", "flash_attn"), ("sage", "sageattention"), ("xformers", "xformers")) if name.startswith(start)), None)
