"""The ratios to the raw loop as a picture: a dot for the median, a bar from the least to the greatest round."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

COLOURS = {"Easel": "#c2410c", "BentoML": "#1d4ed8", "LitServe": "#15803d", "hf-serve": "#737373"}


def draw(path: Path, rows: dict[str, dict[str, list[float]]]) -> None:
    """Write an SVG of `rows`: the ratios by contender, by scenario."""
    plt.rcParams["svg.hashsalt"] = "bench"  # the same figures make the same file
    plt.rcParams["svg.fonttype"] = "none"
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.16 * sum(len(row) + 1 for row in rows.values())))
    at, middles = 0.0, []
    for row in rows.values():
        began = at
        for name, ratios in row.items():
            if ratios:
                colour = COLOURS.get(name, "black")
                axes.plot([min(ratios), max(ratios)], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot([statistics.median(ratios)], [at], "o", color=colour, markersize=5)
            at += 1
        middles.append((began + at - 1) / 2)
        at += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(middles, list(rows))
    axes.set_ylim(at - 1.3, -0.7)  # the first scenario on top
    axes.set_xlim(left=0)
    axes.set_xlabel("times as fast as the raw diffusers loop: median, and least to greatest round")
    for name in names:
        axes.plot([], [], "o-", color=COLOURS.get(name, "black"), label=name)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=len(names), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
