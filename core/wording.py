"""From what a request says to what its pictures are drawn from: the prompts without their LoRA tags,
the LoRAs, and the embeddings that the prompts name.

core.catalogue calls it when it plans a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core import adapters, embeddings
from core.blocklist import Blocklist
from core.generation import GenerationRequest, PlannedEmbedding, PlannedLora
from core.loras import Lora, Registry
from core.problems import FieldError
from core.settings import Family, Settings


@dataclass(frozen=True)
class Wording:
    """The words of a plan, and the files that they call for."""

    prompt: str
    negative_prompt: str
    loras: list[PlannedLora]
    embeddings: list[PlannedEmbedding]


class Writer:
    """Reads requests against a registry.

    Args:
        family_of: the family that an entry of the registry was made for.
        fitting: the ids of the models of a family.
    """

    def __init__(self, settings: Settings, registry: Registry, family_of: Callable[[Lora], Family], fitting: Callable[[Family], list[str]]) -> None:
        self.settings, self.registry, self.family_of, self.fitting = settings, registry, family_of, fitting
        self.blocklist = Blocklist.configured(settings.safety)

    def write(self, request: GenerationRequest, family: Family, errors: list[FieldError], notes: list[str]) -> Wording:
        """The wording for a model of `family`; what is wrong goes to `errors`, what was done to `notes`.

        Raises:
            Problem: 503 where weights are not on this machine.
        """
        reading = adapters.read(request, self.settings.limits.loras)
        chosen = adapters.resolve(reading, self.registry, family, self.family_of, self.fitting)
        errors += reading.errors
        notes += reading.notes
        prompt = reading.prompt
        if request.lora_triggers == "auto" and (missing := adapters.missing_triggers(prompt, [lora for lora, _ in chosen])):
            prompt = ", ".join([*([prompt] if prompt else []), *missing])
            notes.append(f"added to the prompt: {', '.join(missing)}")
        if self.blocklist.stops(prompt):  # not the negative prompt: it says what is not to be drawn
            errors.append(FieldError(field="prompt", message="has words that are not allowed here", allowed="a prompt without them"))
        texts = {"prompt": prompt, "negative_prompt": request.negative_prompt}
        found = embeddings.resolve(texts, self.registry, family, self.family_of, self.fitting, errors)
        return Wording(prompt, request.negative_prompt, [planned for _, planned in chosen], found)
