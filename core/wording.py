"""From what a request says to what its pictures are drawn from: styles, dynamic prompts, LoRA tags,
trigger words and embeddings, in this order.

core.catalogue calls it when it plans a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core import adapters, embeddings, styles
from core.blocklist import Blocklist
from core.loras import Lora, Registry
from core.model_settings import Family
from core.plans import Expansion, PlannedEmbedding, PlannedLora
from core.problems import FieldError, shown
from core.requests import GenerationRequest
from core.settings import Settings, beside_configuration
from core.styles import Styles
from core.wildcards import Refused, Wildcards

FIELDS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class Wording:
    """The words of a plan (of its first picture, where dynamic prompts made several), and the files that they call for."""

    prompt: str
    negative_prompt: str
    loras: list[PlannedLora]
    embeddings: list[PlannedEmbedding]
    expansion: Expansion | None


class Writer:
    """Reads requests against a registry, styles and wildcards.

    Args:
        family_of: the family that an entry of the registry was made for.
        fitting: the ids of the models of a family.
    """

    def __init__(self, settings: Settings, registry: Registry, family_of: Callable[[Lora], Family], fitting: Callable[[Family], list[str]]) -> None:
        self.limits, self.registry, self.family_of, self.fitting = settings.limits, registry, family_of, fitting
        own = settings.prompts
        self.styles = Styles(own.styles and beside_configuration(own.styles))
        self.wildcards = Wildcards(own.wildcards and beside_configuration(own.wildcards))
        self.blocklist = Blocklist.configured(settings.safety)

    def write(self, request: GenerationRequest, family: Family, seeds: list[int], errors: list[FieldError], notes: list[str]) -> Wording:
        """The wording for a model of `family`, for as many pictures as there are seeds; what is wrong goes
        to `errors`, what was done to `notes`.

        Raises:
            Problem: 503 where weights are not on this machine, or the file of styles is broken.
        """
        template, negative = templates = self._styled(request, errors, notes)
        if not request.dynamic_prompts:
            prompt, loras, found = self._read(request, template, negative, family, errors, notes)
            return Wording(prompt, negative, loras, found, None)
        # A picture's prompts depend on its seed alone, so equal ones are read once.
        pairs = list(zip(*(self._expanded(field, text, seeds, errors) for field, text in zip(FIELDS, templates, strict=True)), strict=True))
        read = {pair: self._read(request, pair[0], pair[1], family, errors, notes) for pair in dict.fromkeys(pairs)}
        first, loras, _ = read[pairs[0]]
        if any(others != loras for _, others, _ in read.values()):
            errors.append(FieldError(field="prompt", message="the pictures would need different LoRAs", allowed="the same LoRA tags for every choice", given=shown(template)))
        expansion = Expansion(template=template, negative_template=negative, prompts=[read[pair][0] for pair in pairs], negative_prompts=[pair[1] for pair in pairs])
        found = list({one.name: one for _, _, some in read.values() for one in some}.values())
        return Wording(first, pairs[0][1], loras, found, expansion)

    def _styled(self, request: GenerationRequest, errors: list[FieldError], notes: list[str]) -> tuple[str, str]:
        """Prompt and negative prompt with the request's styles."""
        if not request.styles:
            return request.prompt, request.negative_prompt
        chosen = self.styles.choose(request.styles, errors)
        if chosen:
            notes.append(f"styles applied: {', '.join(style.name for style in chosen)}")
        prompt = styles.apply(request.prompt, [style.prompt for style in chosen])
        negative = styles.apply(request.negative_prompt, [style.negative_prompt for style in chosen])
        if (longest := max(len(prompt), len(negative))) > self.limits.prompt_characters:
            errors.append(FieldError(field="styles", message="make the prompt too long", allowed=f"at most {self.limits.prompt_characters} characters", given=f"{longest} characters"))
        return prompt, negative

    def _expanded(self, field: str, template: str, seeds: list[int], errors: list[FieldError]) -> list[str]:
        """The template's text for each seed."""
        try:
            return self.wildcards.expand(template, seeds, self.limits.prompt_characters)
        except Refused as error:
            errors.append(FieldError(field=field, message=str(error), allowed=error.known, given=shown(template)))
            return [""] * len(seeds)

    def _read(
        self, request: GenerationRequest, prompt: str, negative: str, family: Family, errors: list[FieldError], notes: list[str]
    ) -> tuple[str, list[PlannedLora], list[PlannedEmbedding]]:
        """The prompt to encode, and the LoRAs and embeddings to use."""
        reading = adapters.read(request.model_copy(update={"prompt": prompt, "negative_prompt": negative}), self.limits.loras)
        chosen = adapters.resolve(reading, self.registry, family, self.family_of, self.fitting)
        wrong, done = reading.errors, reading.notes
        prompt = reading.prompt
        if request.lora_triggers == "auto" and (missing := adapters.missing_triggers(prompt, [lora for lora, _ in chosen])):
            prompt = ", ".join([*([prompt] if prompt else []), *missing])
            done.append(f"added to the prompt: {', '.join(missing)}")
        if self.blocklist.stops(prompt):  # not the negative prompt: it says what is not to be drawn
            wrong.append(FieldError(field="prompt", message="has words that are not allowed here", allowed="a prompt without them"))
        found = embeddings.resolve(dict(zip(FIELDS, (prompt, negative), strict=True)), self.registry, family, self.family_of, self.fitting, wrong)
        errors += [error for error in wrong if error not in errors]
        notes += [note for note in done if note not in notes]
        return prompt, [planned for _, planned in chosen], found
