"""What a picture takes in memory beside the weights, by family: the coefficients in runners/memory.py.

    python bench/memory.py

Runs the families' real architectures on fake tensors (shapes without data, so that neither weights nor
a GPU are needed) and counts the bytes of the tensors alive at each moment. Attention is counted as torch's
fused kernels do it, without a matrix of scores. Prints, for each family, the largest sum in the denoiser
and in the VAE for one row and one pixel, and what is kept of the texts from step to step for one row and one token, in numbers
(bytes divided by the precision's).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel, UniDiffuserModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.settings import ROOT
from runners import attention

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it have had alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)

        def gone() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def peak(module: torch.nn.Module, run: Callable[[], Any]) -> int:
    module.eval().requires_grad_(False)
    with torch.no_grad(), Peak() as counted:
        # Weights are none of it, and views of them are not either.
        counted._known |= {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        run()
    return counted.most


def unet(config: dict[str, Any], rows: int, side: int) -> int:
    model = UNet2DConditionModel(**config)
    added = {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.randn(rows, 6)} if "addition_embed_type" in config else None
    latents, text = torch.randn(rows, 4, side // 8, side // 8), torch.randn(rows, 77, model.config.cross_attention_dim)
    return peak(model, lambda: model(latents, torch.tensor(1), encoder_hidden_states=text, added_cond_kwargs=added))


def flux(rows: int, side: int) -> int:
    model = FluxTransformer2DModel(guidance_embeds=True)
    tokens = (side // 16) ** 2
    inputs = {
        "hidden_states": torch.randn(rows, tokens, 64), "encoder_hidden_states": torch.randn(rows, 512, 4096), "pooled_projections": torch.randn(rows, 768),
        "timestep": torch.rand(rows), "guidance": torch.rand(rows), "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(512, 3),
    }  # fmt: skip
    return peak(model, lambda: model(**inputs))


def unidiffuser(rows: int) -> int:
    model = UniDiffuserModel(
        text_dim=64, clip_img_dim=512, num_text_tokens=77, num_attention_heads=24, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=30,
        sample_size=64, patch_size=2, activation_fn="gelu", block_type="unidiffuser", use_patch_pos_embed=False, ff_final_dropout=True, use_data_type_embedding=True,
    )  # fmt: skip
    args = torch.randn(rows, 4, 64, 64), torch.randn(rows, 1, 512), torch.randn(rows, 77, 64), torch.tensor(1), torch.tensor(1)
    return peak(model, lambda: model(*args))


def vae(config: dict[str, Any], rows: int, side: int, encode: bool = False) -> int:
    model = AutoencoderKL(**config)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if encode:
        return peak(model, lambda: model.encode(torch.randn(rows, 3, side, side)))
    return peak(model, lambda: model.decode(torch.randn(rows, model.config.latent_channels, side // factor, side // factor)))


UNETS = {"starter": dict(UNet2DConditionModel.load_config(ROOT / "starter/stable-diffusion/unet")), "sd15": SD15, "sd2": SD2, "sdxl": SDXL}
STARTER_VAE = dict(AutoencoderKL.load_config(ROOT / "starter/stable-diffusion/vae"))
FAMILIES: dict[str, tuple[Callable[[int, int], int], dict[str, Any], int]] = {
    "starter": (partial(unet, UNETS["starter"]), STARTER_VAE, 64),
    "sd15": (partial(unet, SD15), VAE, 512),
    "sd2": (partial(unet, SD2), VAE, 768),
    "sdxl": (partial(unet, SDXL), VAE, 1024),
    "flux": (flux, {**VAE, "latent_channels": 16}, 1024),
    "unidiffuser": (lambda rows, _: unidiffuser(rows), VAE, 512),
}


def kept(config: dict[str, Any]) -> int:
    """Numbers for each row and token."""
    return attention.numbers(UNet2DConditionModel(**config))


def main() -> None:
    with FakeTensorMode():
        for name, config in UNETS.items():
            print(f"{name:12} {kept(config)} numbers kept for each row and token")
    print(f"{'family':12} {'rows':>4} {'side':>5} {'denoise':>9} {'decode':>9} {'encode':>9}  numbers for each row and pixel (float32 runs)")
    for name, (denoiser, vae_config, side) in FAMILIES.items():
        for rows, length in ((1, side), (4, side), (1, side * 2)):
            with FakeTensorMode():
                found = [
                    denoiser(rows, length if name != "unidiffuser" else side),
                    vae(vae_config, rows, length),
                    vae(vae_config, rows, length, encode=True),
                ]
            print(f"{name:12} {rows:4} {length:5} " + " ".join(f"{bytes / 4 / (rows * length**2):9.1f}" for bytes in found), flush=True)


if __name__ == "__main__":
    main()
