"""How good the starter upscaler is, by this rule: every held-out emoji (upscaler_data.parts) is drawn at
256x256 on white, made 64x64 with Pillow's bicubic kernel, and enlarged by the upscaler, by Pillow's bicubic and by
its Lanczos kernel. PSNR is of all channels, in dB, each picture's own, then the mean; SSIM is of
luma with the 11x11 Gaussian window of Wang et al. 2004. Writes evaluation-upscaler.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import upscaler_data
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from runners import compact

HERE = Path(__file__).parent


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(float) - b) ** 2).mean())
    return 10 * np.log10(255**2 / max(error, 1e-10))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two (H, W) arrays in 0..255."""

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=5 / 1.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, both = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    return float((((2 * mean_a * mean_b + c1) * (2 * both + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def main() -> None:
    network = compact.from_state(load_file(HERE / "upscaler/emoji_x4.safetensors"))
    assert network is not None

    def upscaled(small: Image.Image) -> Image.Image:
        x = torch.from_numpy(np.asarray(small)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            made = network(x)[0].clamp(0, 1)
        return Image.fromarray((made.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))

    def by(kernel: Image.Resampling):
        return lambda small: small.resize((upscaler_data.LARGE,) * 2, kernel)

    methods = {"upscaler": upscaled, "bicubic": by(Image.Resampling.BICUBIC), "lanczos": by(Image.Resampling.LANCZOS)}
    _, held_out = upscaler_data.parts()
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for rgba in held_out.values():
        large = upscaler_data.on(rgba)
        small = upscaler_data.smaller(large)
        truth, luma = np.asarray(large), np.asarray(large.convert("L"), dtype=float)
        for name, method in methods.items():
            made = method(small)
            scores[name].append((psnr(np.asarray(made), truth), ssim(np.asarray(made.convert("L"), dtype=float), luma)))
    better = np.mean([ours[0] > theirs[0] for ours, theirs in zip(scores["upscaler"], scores["bicubic"], strict=True)])
    result = {name: {"psnr": round(float(np.mean([p for p, _ in each])), 2), "ssim": round(float(np.mean([s for _, s in each])), 4)} for name, each in scores.items()}
    result |= {"held_out": len(held_out), "better_than_bicubic": round(float(better), 4)}
    (HERE / "evaluation-upscaler.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
