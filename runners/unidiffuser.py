"""diffusers' UniDiffuserPipeline, mended to work on batches: runners.loading makes it, runners.multimodal
calls it. docs/unidiffuser.md says what is mended and what happens when diffusers drops the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UniDiffuserPipeline
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

_BEAMS, _CAPTION_TOKENS = 5, 67  # as diffusers' text decoder has them


class Pipeline(UniDiffuserPipeline):
    """UniDiffuserPipeline of diffusers 0.42, mended where it takes one picture or one text at a time:
    pictures are encoded, and texts decoded, as a batch, and each row has its own generator.

    `check` raises when the work should stop; it is called between the tokens of a text too.
    """

    check: Callable[[], None] = staticmethod(lambda: None)

    @property
    def size(self) -> int:
        """The side of the pictures, pixels: the U-ViT has a position for each of their patches."""
        return int(self.unet_resolution * self.vae_scale_factor)

    def encode_image_vae_latents(self, image: Tensor, batch_size: int, num_prompts_per_image: int, dtype: torch.dtype, device: Any, *_: Any, generator: Any = None, **__: Any) -> Tensor:
        """(N, 3, H, W) in -1..1 to a sample of the scaled latents. The original encodes row by row."""
        latents = self.vae.encode(image.to(device, dtype)).latent_dist.sample(generator=generator)
        return latents * self.vae.config.scaling_factor

    def encode_image_clip_latents(self, image: Tensor, batch_size: int, num_prompts_per_image: int, dtype: torch.dtype, device: Any, generator: Any = None) -> Tensor:
        """(N, 3, H, W) in 0..1 to CLIP's projections, (N, D). The original cannot slice a batch, and
        divides a tensor by 255 once more; pictures of 8 bits give what a single picture gave it."""
        pictures = [Image.fromarray(row) for row in (image * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
        return self.clip_embeddings(pictures, dtype, device)

    def clip_embeddings(self, pictures: list[Image.Image], dtype: torch.dtype, device: Any) -> Tensor:
        inputs = self.clip_image_processor(pictures, return_tensors="pt").to(device=device, dtype=dtype)
        return self.image_encoder(**inputs).image_embeds

    def decode_text_latents(self, text_latents: Tensor, device: Any) -> list[str]:
        """(N, tokens, width) to N texts. The original decodes one at a time and keeps no keys and values."""
        found = beam_search(self.text_decoder, text_latents.to(device), self.text_tokenizer.eos_token_id, self.check)
        return [" ".join(self.text_tokenizer.decode(tokens, skip_special_tokens=True).split()) for tokens in found]


@torch.no_grad()
def beam_search(decoder: Any, features: Tensor, eos: int, check: Callable[[], None]) -> list[list[int]]:
    """The most likely text of each row, as UniDiffuserTextDecoder.generate_beam finds it for one: beams
    are ranked by their mean log-probability, and one that has ended keeps its score.

    Args:
        decoder: the UniDiffuserTextDecoder.
        features: (N, tokens, prefix width), the denoised text latents.
        eos: the token that ends a text.
        check: called before each token.
    """
    n, cache = len(features), DynamicCache()  # given by position: transformers renames the argument
    out = decoder.transformer(None, cache, inputs_embeds=decoder.decode_prefix(features), use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(_BEAMS)
    scores, following = out.logits[:, -1].float().log_softmax(-1).topk(_BEAMS)  # (N, beams)
    tokens = following[:, :, None]
    lengths = torch.ones_like(following)
    ended = following == eos
    offsets = torch.arange(n, device=features.device)[:, None] * _BEAMS
    for _ in range(_CAPTION_TOKENS - 1):
        if ended.all():
            break
        check()
        embedded = decoder.transformer.transformer.wte(following.reshape(-1, 1))
        out = decoder.transformer(None, cache, inputs_embeds=embedded, use_cache=True)
        likelihood = out.logits[:, -1].float().log_softmax(-1).view(n, _BEAMS, -1)
        likelihood[ended] = -torch.inf
        likelihood[..., 0][ended] = 0
        lengths = lengths + ~ended
        mean = (scores[..., None] + likelihood) / lengths[..., None]
        best, index = mean.flatten(1).topk(_BEAMS)
        beam, following = index // mean.shape[-1], index % mean.shape[-1]
        lengths, ended = lengths.gather(1, beam), ended.gather(1, beam)
        scores = best * lengths
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand_as(tokens)), following[..., None]], dim=-1)
        ended = ended | (following == eos)
        cache.reorder_cache((offsets + beam).flatten())
    winner = (scores / lengths).argmax(1)
    return [tokens[i, k, : lengths[i, k]].tolist() for i, k in enumerate(winner.tolist())]
