"""The starter UniDiffuser says what pictures show, sees likeness, and draws what it is told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from core import multimodal
from core.catalogue import Catalogue
from core.generation import Generation
from core.multimodal import CaptionRequest, EmbedRequest, PromptToImageRequest, TextVariationRequest
from core.plans import Pixels
from core.settings import Settings
from runners.device import Device
from tests import test_meaning

draw_with_stable_diffusion = test_meaning.draw
stable_diffusion = test_meaning.device


@pytest.fixture(scope="module")
def unidiffuser() -> Iterator[Device]:
    settings = Settings()
    made = Device(settings, Catalogue(settings, settings.unidiffuser))
    yield made
    made.queue.close()


@pytest.fixture(scope="module")
def drawn(stable_diffusion: Device) -> dict[str, list[Pixels]]:
    """Four pictures of each thing, by the starter Stable Diffusion."""
    things = ("red apple", "pizza", "red heart")
    return {thing: draw_with_stable_diffusion(stable_diffusion, prompt=thing, count_returned=4).pictures for thing in things}


def do(device: Device, task: str, request: object, *pictures: Pixels) -> Generation:
    plan = multimodal.plan(device.catalogue, task, request, list(pictures), "test")
    return device.submit(plan, device.fetch(device.catalogue.find(None))).result(120)


@pytest.mark.parametrize(("thing", "noun"), [("red apple", "apple"), ("red heart", "heart")])
def test_the_caption_of_a_picture_names_what_it_shows(unidiffuser: Device, drawn: dict[str, list[Pixels]], thing: str, noun: str) -> None:
    said = do(unidiffuser, "caption", CaptionRequest(seed=1), *drawn[thing]).texts
    assert sum(noun in text for text in said) >= 3, said


def test_pictures_of_one_thing_are_nearer_in_clip_space_than_those_of_two(unidiffuser: Device, drawn: dict[str, list[Pixels]]) -> None:
    unit = {}
    for thing, pictures in drawn.items():
        made = do(unidiffuser, "embed", EmbedRequest(), *pictures).embeddings
        vectors = np.stack([np.frombuffer(e.clip.data, "<f4") for e in made])
        unit[thing] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for thing, own in unit.items():
        alike = (own @ own.T)[np.triu_indices(len(own), 1)].mean()
        unlike = max((own @ other.T).mean() for name, other in unit.items() if name != thing)
        assert alike > unlike + 0.05, thing


@pytest.mark.parametrize(("prompt", "strongest"), [("red heart", 0), ("green heart", 1), ("blue heart", 2)])
def test_a_named_colour_is_the_pictures_colour(unidiffuser: Device, prompt: str, strongest: int) -> None:
    pictures = do(unidiffuser, "generate", PromptToImageRequest(prompt=prompt, seed=1, count_returned=4)).pictures
    assert sum(int(test_meaning.coloured(p).argmax()) == strongest for p in pictures) >= 3


def test_a_text_varied_still_speaks_of_the_same_thing(unidiffuser: Device) -> None:
    said = do(unidiffuser, "text_variation", TextVariationRequest(prompt="pizza", seed=1, count_returned=4)).texts
    assert sum("pizza" in text for text in said) >= 3, said
