"""The LoRAs of a request: read from `lora` and from the prompt's tags, then checked against the
registry and the model.

Called by core.catalogue when it plans a request. `<lora:name:weight>` is A1111's syntax: the tag
switches the LoRA on and is no part of what the model reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from core.loras import Lora, Registry
from core.loras.registry import NOUNS
from core.model_settings import Family
from core.plans import PlannedLora
from core.problems import FieldError, Problem, shown, unavailable
from core.requests import GenerationRequest

MAX_WEIGHT = 10.0
_TAG = re.compile(r"<lora:([^<>]*)>")
_SYNTAX = "name, name:weight, or several separated by commas"
_TAG_SYNTAX = "<lora:name> or <lora:name:weight>"


@dataclass(frozen=True)
class Wanted:
    """A LoRA that a request names, and the field in which it does."""

    name: str
    weight: float
    field: str


@dataclass
class Reading:
    """What a request says of LoRAs: the prompt without its tags, the LoRAs, and what was wrong."""

    prompt: str
    wanted: list[Wanted]
    errors: list[FieldError]
    notes: list[str]


def read(request: GenerationRequest, limit: int) -> Reading:
    """Read `lora`, `lora_scale` and the prompt's tags.

    `lora_scale` is the weight of those in `lora` that have none of their own; a tag without one
    weighs 1, as in A1111. Weights are finite and within -10 to 10.
    """
    found = Reading(request.prompt, [], [], [])
    default = 1.0 if request.lora_scale is None else request.lora_scale
    if request.lora is not None:
        for part in request.lora.split(","):
            _take(found, "lora", part.split(":"), default, part, _SYNTAX)
    elif request.lora_scale is not None:
        found.errors.append(FieldError(field="lora_scale", message="only has a meaning with lora", allowed="leave it out, or send lora"))
    own = request.lora is not None and all(":" in part for part in request.lora.split(","))
    if own and request.lora_scale is not None:
        found.notes.append("lora_scale has no effect: every LoRA in lora has a weight of its own")

    for match in _TAG.finditer(request.prompt):
        name, *weights = match.group(1).split(":")
        if len(weights) > 1:
            found.notes.append(f"of {match.group(0)[:80]} only the first weight was used, for text encoder and denoiser alike")
        _take(found, "prompt", [name, *weights[:1]], 1.0, match.group(0), _TAG_SYNTAX)
    found.prompt = _TAG.sub("", request.prompt).strip()
    if nested := _TAG.search(found.prompt):  # of what stood around another tag
        found.errors.append(FieldError(field="prompt", message="has a LoRA within a LoRA", allowed=_TAG_SYNTAX, given=shown(nested.group(0))))
    if _TAG.search(request.negative_prompt):
        found.notes.append("<lora:...> in the negative prompt is plain text")

    names = [w.name for w in found.wanted]
    for name in sorted({n for n in names if names.count(n) > 1}):
        field = next(w.field for w in reversed(found.wanted) if w.name == name)
        found.errors.append(FieldError(field=field, message=f"names {name!r} more than once", allowed="each LoRA once", given=shown(name)))
    if len(names) > limit:
        found.errors.append(FieldError(field=found.wanted[-1].field, message="too many LoRAs", allowed=f"at most {limit}", given=str(len(names))))
        del found.wanted[limit:]
    return found


def _take(found: Reading, field: str, parts: list[str], default: float, text: str, syntax: str) -> None:
    """Add one LoRA, or say what is wrong with it."""
    name, *weights = (part.strip() for part in parts)
    weight: float | None = default
    if weights:
        try:
            weight = float(weights[0])
        except ValueError:
            weight = None
    if not name or len(weights) > 1 or weight is None:
        found.errors.append(FieldError(field=field, message="cannot be read as a LoRA", allowed=syntax, given=shown(text)))
    elif not -MAX_WEIGHT <= weight <= MAX_WEIGHT:  # not a number fails too
        found.errors.append(FieldError(field=field, message=f"the weight of {name!r} is out of range", allowed=f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}", given=shown(text)))
    else:
        found.wanted.append(Wanted(name, weight, field))


def resolve(reading: Reading, registry: Registry, family: Family, family_of: Callable[[Lora], Family], fitting: Callable[[Family], list[str]]) -> list[tuple[Lora, PlannedLora]]:
    """The registry's entries for what a request wants; unknown and unfit ones go to `reading.errors`.

    Args:
        family: the family of the request's model.
        family_of: the family that a LoRA was made for.
        fitting: the ids of the models of a family.

    Raises:
        Problem: 503 where the weights are not on this machine.
    """
    planned = []
    for wanted in reading.wanted:
        try:
            lora = registry.find(wanted.name)
        except Problem as unknown:
            if unknown.details.status != 422:
                raise
            reading.errors += [e.model_copy(update={"field": wanted.field}) for e in unknown.details.errors]
            continue
        if error := unfit(lora, wanted.field, family, family_of(lora), fitting):
            reading.errors.append(error)
            continue
        path = registry.file(lora)
        check_there(lora, path)
        planned.append((lora, PlannedLora(
            name=lora.name, weight=wanted.weight, path=str(path), sha256=lora.sha256, commercial_use=lora.commercial_use, credit=lora.credit,
        )))  # fmt: skip
    return planned


def unfit(lora: Lora, field: str, family: Family, own: Family, fitting: Callable[[Family], list[str]]) -> FieldError | None:
    """What is wrong where an entry, made for the family `own`, is named in `field` for a model of `family`."""
    if own == family:
        return None
    models = fitting(own)
    message = f"{lora.name!r} is made for {own} models ({lora.base_model}), not for {family}; it fits {', '.join(models) or 'no model here'}"
    return FieldError(field=field, message=message, allowed=models, given=shown(lora.name))


def check_there(lora: Lora, path: Path) -> None:
    """Raises:
    Problem: 503 where an entry's weights are not on this machine.
    """
    if not path.is_file():
        noun = NOUNS[lora.kind]
        raise unavailable(f"The weights of the {noun} {lora.name} are not at {path}. Put the file there, or remove the {noun} and add it again.", slug="lora-missing")


def missing_triggers(prompt: str, loras: Iterable[Lora]) -> list[str]:
    """The LoRAs' trigger words whose words do not stand in `prompt` one after the other. Civitai's
    entries are often lists themselves, so each is split at its commas."""
    words = _words(prompt)
    missing: list[str] = []
    for trigger in (t.strip() for lora in loras for entry in lora.trigger_words for t in entry.split(",")):
        own = _words(trigger)
        there = any(words[i : i + len(own)] == own for i in range(len(words) - len(own) + 1))
        if own and not there and trigger not in missing:
            missing.append(trigger)
    return missing


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
