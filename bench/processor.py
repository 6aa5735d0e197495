"""What precision and memory layout do on a CPU: `.venv/bin/python bench/processor.py` writes its section of bench/results.md.

The starter is drawn by diffusers' pipeline, loaded as Easel loads it, one picture and eight at once, in each way in a process of its own; the
processes work in turns, and each ratio is of two neighbouring blocks, to float32 as the weights come. What a way does to the
pictures is measured against the same seeds in float32.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import turns
from scenarios import STARTER, different
from turns import ROOT, RawLoop, spread

sys.path.insert(0, str(ROOT))

SECTION = "## Precision and layout on a CPU"
PLAIN = "float32"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"dtype": "float32"},
    "float32, channels_last": {"dtype": "float32", "channels_last": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, channels_last": {"dtype": "bfloat16", "channels_last": True},
}
STEPS, BATCHES = 25, (1, 8)


def main() -> None:
    options = turns.options(__doc__ or "", rounds=6, count=2, unit="pictures", quick=(1, 1))
    if options.raw:
        return drawing(**options.raw)
    load, pictures = os.getloadavg()[0], different(max(BATCHES))
    ratios: dict[tuple[str, int], list[float]] = {(way, batch): [] for way in WAYS for batch in BATCHES}
    with ExitStack() as stack:
        loops = {way: stack.enter_context(closing(RawLoop(__file__, how))) for way, how in WAYS.items()}
        drawn = {way: [read(data) for data in loop.ask(max(BATCHES))["pictures"]] for way, loop in loops.items()}
        end = time.monotonic() + options.limit_s
        for number in range(options.rounds):
            if time.monotonic() > end:
                break
            for batch in BATCHES:
                for way, loop in loops.items():
                    order = (loop, loops[PLAIN]) if number % 2 else (loops[PLAIN], loop)
                    first, second = (one.ask(batch)["took"] for one in order)
                    ratios[way, batch].append(second / first if number % 2 else first / second)
            print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
    lines = [
        SECTION, "", turns.where("bench/processor.py", load), "",
        f"{STARTER}, 64x64, {STEPS} steps. Pictures a second to those of {PLAIN} beside it in time, median (least to greatest): over 1 is faster. "
        f"Differences to its pictures of the same {len(pictures)} seeds and prompts, of 255: mean of all channels, and the share of channels that differ by more than 16.", "",
        f"| way | {' | '.join(f'{batch} at once' for batch in BATCHES)} | mean difference | more than 16 |", f"| --- |{' ---: |' * (len(BATCHES) + 2)}",
    ]  # fmt: skip
    for way in WAYS:
        apart = np.abs(np.stack(drawn[way]) - np.stack(drawn[PLAIN]))
        lines.append(f"| {way} | {' | '.join(spread(ratios[way, batch], 2) for batch in BATCHES)} | {apart.mean():.2f} | {100 * (apart > 16).mean():.1f} % |")
    turns.write(options.results, SECTION, "\n".join(lines) + "\n")
    print("\n".join(lines))


def read(data: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), np.uint8).astype(int)


def drawing(dtype: str, channels_last: bool = False) -> None:
    """Draw as many at once as each line of standard input says; answer the seconds, and the pictures' bytes."""
    pipe_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    import torch

    from core.catalogue import Catalogue
    from core.model_settings import Model, Models
    from core.optimising import Optimise
    from core.settings import Settings
    from runners import loading

    model = Model(id=STARTER, family="starter", optimise=Optimise(channels_last=channels_last))
    entry = Catalogue(Settings(models=Models(default=STARTER, catalogue=[model]))).find(STARTER)
    pipe = loading.load(entry, loading.fetch(entry, None), getattr(torch, dtype), torch.device("cpu"))

    def draw(count: int) -> Any:
        some = different(count)
        generators = [torch.Generator("cpu").manual_seed(one.seed) for one in some]
        return pipe([one.prompt for one in some], num_inference_steps=STEPS, guidance_scale=5.0, width=64, height=64, generator=generators, output_type="np").images

    for count in BATCHES:
        draw(count)
    print(json.dumps({}), file=pipe_out, flush=True)  # ready
    for line in sys.stdin:
        began = time.perf_counter()
        images = draw(int(line))
        took = time.perf_counter() - began
        made = [base64.b64encode((image * 255).round().astype(np.uint8).tobytes()).decode() for image in images]
        print(json.dumps({"took": took, "pictures": made}), file=pipe_out, flush=True)


if __name__ == "__main__":
    main()
