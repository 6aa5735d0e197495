"""Makes what the benchmark draws with beside the starter: a miniature of Stable Diffusion 1.5, and two LoRAs for the starter.

    python bench/models.py FOLDER

The weights are random: they cost what trained ones cost, and the pictures are noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from scenarios import LORAS, MINIATURE_FOLDER, STARTER
from turns import ROOT

sys.path.insert(0, str(ROOT))
from tests import lora_files


def main(folder: Path) -> None:
    torch.manual_seed(0)
    starter = StableDiffusionPipeline.from_pretrained(ROOT / STARTER, safety_checker=None, local_files_only=True)
    for seed, name in enumerate(LORAS):
        lora_files.write(folder / f"{name}.safetensors", lora_files.diffusers_layout(lora_files.matrices(starter, seed=seed, size=0.05)))
    miniature(starter).save_pretrained(folder / MINIATURE_FOLDER)


def miniature(starter: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The blocks of SD 1.5's UNet and VAE at about an eighth of their width; the starter's text encoder."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(48, 96, 192, 192), norm_num_groups=16, layers_per_block=2, cross_attention_dim=starter.text_encoder.config.hidden_size, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), norm_num_groups=16, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=starter.text_encoder, tokenizer=starter.tokenizer, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False),
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
