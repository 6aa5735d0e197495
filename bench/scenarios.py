"""What is asked for, and how: each scenario is a list of pictures and the way in which they are asked for.

A way is one of: `closed`, clients that ask for the next picture when they have the last one; `open`, arrivals that wait
for nobody; `burst`, all at once; `slow`, a closed loop beside clients that read their answers slowly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

STARTER, MINIATURE = "starter/stable-diffusion", "bench/miniature"
LORAS = ("first", "second")  # their files are made by bench/models.py, as the miniature is, in:
MINIATURE_FOLDER = "miniature"
SIZES = {STARTER: 64, MINIATURE: 128}  # pixels of a side
_SCHEDULERS = (None, "EulerDiscreteScheduler")
_WORDS = ("red apple", "green tree", "blue heart", "yellow car", "cat face", "orange fruit", "sun", "purple flower")


@dataclass(frozen=True)
class Picture:
    """One picture to draw; `scheduler` is a class of diffusers, None the model's own; `image` (PNG) makes it image-to-image."""

    seed: int
    prompt: str
    model: str = STARTER
    steps: int = 25
    guidance: float = 5.0
    scheduler: str | None = None
    lora: str | None = None
    image: bytes | None = None
    strength: float = 0.6

    @property
    def plain(self) -> bool:
        """Whether it takes nothing but text, steps, guidance and seed."""
        return self.scheduler is None and self.lora is None and self.image is None


@dataclass(frozen=True)
class Scenario:
    """Args:
    pictures: asked for in this order; for a closed loop dealt out to the clients in turn.
    clients: of a closed loop, slow ones not included.
    load: of an open one, the arrivals as a share of what the raw loop can draw.
    every: it has its turn in every so-manieth round; those that take long do not in all.
    """

    name: str
    way: Literal["closed", "open", "burst", "slow"]
    pictures: list[Picture]
    clients: int = 1
    load: float = 0.0
    every: int = 1

    @property
    def by_latency(self) -> bool:
        """Whether contenders are compared by how long they take: where arrivals wait for nobody, all draw equally many."""
        return self.way == "open"

    @property
    def models(self) -> set[str]:
        return {picture.model for picture in self.pictures}


def different(count: int, **settings: Any) -> list[Picture]:
    """Pictures that differ in prompt and seed alone. No seed is 0, which one peer takes for none."""
    return [Picture(seed, prompt, **settings) for seed, prompt in zip(range(1, count + 1), itertools.cycle(_WORDS), strict=False)]


def mixed(count: int, image: bytes, steps: tuple[int, int, int] = (15, 20, 25)) -> list[Picture]:
    """Pictures of three step counts, two schedulers, two LoRAs and none, a quarter of them image-to-image."""
    made = []
    for i, picture in enumerate(different(count)):
        more: dict[str, Any] = {"steps": steps[i % 3], "scheduler": _SCHEDULERS[i // 2 % 2], "lora": (None, LORAS[0], None, LORAS[1], None)[i % 5]}
        made.append(replace(picture, **more, image=image if i % 4 == 3 else None))
    return made


def alternating(count: int, steps: dict[str, int]) -> list[Picture]:
    """Of two models in turn, by their steps."""
    return [replace(picture, model=model, steps=steps[model]) for picture, model in zip(different(count), itertools.cycle(steps), strict=False)]


def scenarios(image: bytes, miniature_steps: int) -> list[Scenario]:
    """All of them.

    Args:
        image: what image-to-image starts from.
        miniature_steps: how many take the raw loop about a second.
    """
    mini: dict[str, Any] = {"model": MINIATURE, "steps": miniature_steps}
    half = {STARTER: 12, MINIATURE: max(2, miniature_steps // 2)}
    return [
        Scenario("1 client", "closed", different(5)),
        Scenario("8 clients, same settings", "closed", different(16), 8),
        Scenario("8 clients, mixed", "closed", mixed(16, image), 8),
        Scenario("two models alternating, 2 clients", "closed", alternating(8, half), 2),
        Scenario("2 slow clients beside 4 fast", "slow", different(8), 4),
        Scenario("arrivals at 0.7 of the raw loop's rate", "open", different(16), load=0.7, every=3),
        Scenario("burst of 200, 2 steps each", "burst", different(200, steps=2), every=3),
        Scenario("miniature, 1 client", "closed", different(4, **mini)),
        Scenario("miniature, 8 clients, same settings", "closed", different(8, **mini), 8),
    ]


def quick(all_of_them: list[Scenario]) -> list[Scenario]:
    """The same with at most eight pictures of at most five steps: they show that everything runs."""
    def few(s: Scenario) -> list[Picture]:
        return [replace(p, steps=max(2, p.steps // 5)) for p in s.pictures[: max(2, min(8, s.clients))]]

    return [replace(s, pictures=few(s)) if s.way != "burst" else replace(s, pictures=different(16, steps=2)) for s in all_of_them]
