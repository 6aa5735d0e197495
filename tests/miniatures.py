"""A miniature of every family, from its real configuration classes: random weights that prove the wiring.

SD 1.5 (epsilon, PNDM), SD 2.1 (v-prediction), SDXL (two text encoders), Flux (CLIP and T5), UniDiffuser (v1's layout).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniDiffuserModel,
    UniDiffuserPipeline,
    UniDiffuserTextDecoder,
)
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from core.settings import ROOT

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "starter/stable-diffusion/tokenizer")


def _text_config(tokenizer: CLIPTokenizer, **more: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more,
    )  # fmt: skip


def _vae(**more: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, **more,
    )  # fmt: skip


def _unet(cross_attention_dim: int = 32, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 32), layers_per_block=1, cross_attention_dim=cross_attention_dim,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 4), norm_num_groups=8, **more,
    )  # fmt: skip


def _sd(scheduler: object, **unet: object) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config(tokenizer)), tokenizer=tokenizer, unet=_unet(**unet),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd15() -> StableDiffusionPipeline:
    return _sd(PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False))


def sd2() -> StableDiffusionPipeline:
    return _sd(DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False), use_linear_projection=True)


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = _tokenizer()
    unet = _unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, projection_dim=32)), tokenizer_2=_tokenizer(),
        unet=unet, scheduler=EulerDiscreteScheduler(**NOISE), force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def flux() -> FluxPipeline:
    tokenizer = _tokenizer()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)] + [(chr(c), -2.0) for c in range(33, 127)]
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    t5 = T5Config(vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=CLIPTextModel(_text_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=T5Tokenizer(vocab=pieces, extra_ids=0), transformer=transformer,
    )  # fmt: skip


def unidiffuser() -> UniDiffuserPipeline:
    """As thu-ml/unidiffuser-v1: post-norm, a data-type token, and a text decoder behind a narrower prefix.
    The text decoder's tokenizer has the bytes alone, without merges."""
    tokenizer = _tokenizer()
    text = CLIPTextConfig(**_text_config(tokenizer).to_dict())
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in letters]
    vocabulary = {c: i for i, c in enumerate([*map(chr, letters), *(chr(256 + i) for i in range(len(others))), "<|endoftext|>"])}
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=24)
    unet = UniDiffuserModel(
        text_dim=16, clip_img_dim=24, num_text_tokens=77, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        num_layers=2, norm_num_groups=16, sample_size=8, patch_size=2, activation_fn="gelu", num_embeds_ada_norm=1000,
        block_type="unidiffuser", use_timestep_embedding=False, norm_elementwise_affine=True, use_patch_pos_embed=False,
        ff_final_dropout=True, use_data_type_embedding=True,
    )  # fmt: skip
    torch.nn.init.normal_(unet.data_type_pos_embed_token)
    decoder = UniDiffuserTextDecoder(
        prefix_length=77, prefix_inner_dim=32, prefix_hidden_dim=16, vocab_size=len(vocabulary), n_positions=160, n_embd=32, n_layer=2, n_head=4,
    )  # fmt: skip
    # transformers 5 ties these when the model is made; diffusers cannot save tied weights as safetensors.
    decoder.transformer.lm_head.weight = torch.nn.Parameter(decoder.transformer.lm_head.weight.detach().clone())
    return UniDiffuserPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(text), image_encoder=CLIPVisionModelWithProjection(vision),
        clip_image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), clip_tokenizer=tokenizer,
        text_decoder=decoder,
        text_tokenizer=GPT2Tokenizer(vocab=vocabulary, merges=[]), unet=unet, scheduler=DPMSolverMultistepScheduler(**{k: v for k, v in NOISE.items() if k != "steps_offset"}),
    )  # fmt: skip


def motion() -> MotionAdapter:
    """A motion adapter for the miniature of SD 1.5."""
    return MotionAdapter(
        block_out_channels=(8, 16, 32), motion_layers_per_block=1, motion_mid_block_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=8, motion_max_seq_length=16,
    )  # fmt: skip


def sd_x4_upscaler() -> StableDiffusionUpscalePipeline:
    """As stabilityai/stable-diffusion-x4-upscaler: a VAE of factor 4, and the small picture beside the latents."""
    tokenizer = _tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.08333,
    )  # fmt: skip
    return StableDiffusionUpscalePipeline(
        vae=vae, text_encoder=CLIPTextModel(_text_config(tokenizer)), tokenizer=tokenizer,
        unet=_unet(in_channels=7, num_class_embeds=1000, use_linear_projection=True),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, watermarker=None,
    )  # fmt: skip


def latent_upscaler() -> StableDiffusionLatentUpscalePipeline:
    """As stabilityai/sd-x2-latent-upscaler: K blocks, Fourier time embedding, a variance channel."""
    tokenizer = _tokenizer()
    unet = UNet2DConditionModel(
        in_channels=8, out_channels=5, block_out_channels=(32, 32, 64, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3), up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), mid_block_type=None,
        act_fn="gelu", norm_num_groups=None, conv_in_kernel=1, conv_out_kernel=1, only_cross_attention=False,
        time_cond_proj_dim=128 + 32, resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
    )  # fmt: skip
    return StableDiffusionLatentUpscalePipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config(tokenizer)), tokenizer=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(**{k: v for k, v in NOISE.items() if k != "steps_offset"}, prediction_type="original_sample"),
    )  # fmt: skip


MAKERS = {
    "sd15": sd15, "sd2": sd2, "sdxl": sdxl, "flux": flux, "unidiffuser": unidiffuser,
    "sd_x4_upscaler": sd_x4_upscaler, "latent_upscaler": latent_upscaler,
}  # fmt: skip


def save_all(folder: Path) -> dict[str, Path]:
    """Write every miniature under `folder`; return each family's path."""
    paths = {}
    for family, make in MAKERS.items():
        torch.manual_seed(0)
        paths[family] = folder / family
        make().save_pretrained(paths[family])
    paths["motion"] = folder / "motion"
    motion().save_pretrained(paths["motion"])
    return paths


def save_ip_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """An IP-Adapter for a UNet, in the layout of h94/IP-Adapter: a file of its own names, and a CLIP picture encoder."""
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=24)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "models/image_encoder")
    width, tokens = unet.config.cross_attention_dim, 4
    state = {
        "image_proj.proj.weight": torch.randn(tokens * width, 24), "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width),
    }  # fmt: skip
    crossing = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for i, module in enumerate(crossing):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * i + 1}.{part}.weight"] = torch.randn(module.to_k.out_features, width) * 0.5
    save_file(state, folder / "models/ip-adapter.safetensors")
