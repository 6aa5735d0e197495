"""The architecture of the starter upscaler: SRVGGNetCompact, Real-ESRGAN's network for small models.

Source: Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic
Data" (https://arxiv.org/abs/2107.10833) and its repository. The weights' names and shapes are that
repository's, so that other programs read the same files. runners.upscalers loads it;
starter/train_upscaler.py trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn


class SRVGGNetCompact(nn.Module):
    """Convolutions at the input's size, then a pixel shuffle, on top of the nearest-neighbour enlargement.

    Args:
        num_feat: channels within.
        num_conv: convolutions between the first and the last.
        upscale: the factor.
    """

    def __init__(self, num_feat: int, num_conv: int, upscale: int) -> None:
        super().__init__()
        self.scale = upscale
        layers: list[nn.Module] = [nn.Conv2d(3, num_feat, 3, 1, 1), nn.PReLU(num_feat)]
        for _ in range(num_conv):
            layers += [nn.Conv2d(num_feat, num_feat, 3, 1, 1), nn.PReLU(num_feat)]
        self.body = nn.ModuleList([*layers, nn.Conv2d(num_feat, 3 * upscale**2, 3, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..1 to (N, 3, scale * H, scale * W), which may reach a little beyond 0..1."""
        out = x
        for layer in self.body:
            out = layer(out)
        return F.pixel_shuffle(out, self.scale) + F.interpolate(x, scale_factor=float(self.scale), mode="nearest")


def from_state(state: Mapping[str, Tensor]) -> SRVGGNetCompact | None:
    """The network that these weights are of; None where they are another's (or not of RGB)."""
    last = max((int(name.split(".")[1]) for name in state if name.startswith("body.") and name.split(".")[1].isdigit()), default=0)
    first, final = state.get("body.0.weight"), state.get(f"body.{last}.weight")
    if first is None or final is None or first.shape[1:] != (3, 3, 3) or "body.1.weight" not in state or state["body.1.weight"].dim() != 1:
        return None
    scale = isqrt(final.shape[0] // 3)
    if 3 * scale**2 != final.shape[0]:
        return None
    network = SRVGGNetCompact(first.shape[0], (last - 2) // 2, scale)
    if {name: t.shape for name, t in network.state_dict().items()} != {name: t.shape for name, t in state.items()}:
        return None
    network.load_state_dict(dict(state))
    return network
