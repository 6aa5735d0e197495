"""Whose LoRA may be used for what: Civitai's licence flags and model names in Easel's terms.

core.loras reads rights out of the registry with it; core.loras.civitai and core.loras.hub write them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.model_settings import Family
from core.problems import invalid_field
from core.settings import Settings

ALLOWED, NOT_ALLOWED = "AllowCommercialUse", "NoCommercialUse"

# Civitai's older answers had one string on a scale, None < Image < Rent < Sell (RentCivit is a later
# split of Rent): what stood higher included what stood lower. Lists state each right by itself.
_SCALE = {"image", "rentcivit", "rent", "sell"}


def pictures_may_be_sold(rights: str | Iterable[str] | None) -> bool:
    """Whether pictures made with a LoRA may be sold, by its `usage_rights` or Civitai's allowCommercialUse.

    Civitai: Image is the right to sell pictures, RentCivit and Rent to run the LoRA in a paid
    generation service (Civitai's own, others), Sell to sell the LoRA itself or merges of it.
    An unknown value counts as not allowed.
    """
    if rights is None:
        return False
    if isinstance(rights, str):
        text = rights.strip().lower()
        if text.startswith("{") and text.endswith("}"):  # a Postgres array, as some answers had it
            return pictures_may_be_sold(text[1:-1].split(","))
        return text == ALLOWED.lower() or text in _SCALE
    return any(str(right).strip().lower() in ("image", ALLOWED.lower()) for right in rights)


def usage_rights(allow_commercial_use: str | Iterable[str] | None) -> str:
    """The registry's `usage_rights` for Civitai's allowCommercialUse."""
    return ALLOWED if pictures_may_be_sold(allow_commercial_use) else NOT_ALLOWED


@dataclass(frozen=True)
class Base:
    """What a LoRA was made for: the model's family, and the hub id that stands for it in the registry."""

    family: Family
    hub_id: str


_SD15 = Base("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5")
_SD20 = Base("sd2", "stabilityai/stable-diffusion-2")
_SD21 = Base("sd2", "stabilityai/stable-diffusion-2-1")
_SDXL = Base("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
_FLUX = Base("flux", "black-forest-labs/FLUX.1-dev")

# Civitai's baseModel strings. Pony V7 is no SDXL; Flux.2 and SD 3 have other architectures.
CIVITAI_BASES: dict[str, Base] = {
    **dict.fromkeys(("SD 1.4", "SD 1.5", "SD 1.5 LCM", "SD 1.5 Hyper"), _SD15),
    **dict.fromkeys(("SD 2.0", "SD 2.0 768"), _SD20),
    **dict.fromkeys(("SD 2.1", "SD 2.1 768", "SD 2.1 Unclip"), _SD21),
    **dict.fromkeys(("SDXL 0.9", "SDXL 1.0", "SDXL 1.0 LCM", "SDXL Distilled", "SDXL Turbo", "SDXL Lightning", "SDXL Hyper"), _SDXL),
    **dict.fromkeys(("Pony", "Illustrious", "NoobAI"), _SDXL),
    **dict.fromkeys(("Flux.1 D", "Flux.1 S", "Flux.1 Krea", "Flux.1 Kontext"), _FLUX),
}
# Hub ids that models and LoRAs name as their base, beyond the catalogue's.
_HUB_BASES: dict[str, Base] = {
    **{base.hub_id: base for base in (_SD15, _SD20, _SD21, _SDXL, _FLUX)},
    **dict.fromkeys(("runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"), _SD15),
    "stabilityai/stable-diffusion-2-base": _SD20,
    "stabilityai/stable-diffusion-2-1-base": _SD21,
    **dict.fromkeys(("stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-0.9", "ByteDance/SDXL-Lightning"), _SDXL),
    **dict.fromkeys(("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-Krea-dev", "black-forest-labs/FLUX.1-Kontext-dev"), _FLUX),
}


def base_model(text: str, settings: Settings, field: str = "base_model") -> Base:
    """What `text` (a model of the catalogue, a hub id, or Civitai's name for a base) stands for.

    Raises:
        Problem: 422 that lists what is supported.
    """
    for model in settings.models.catalogue:
        if model.id.lower() == text.strip().lower():
            return Base(model.family, model.id)
    for known in (CIVITAI_BASES, _HUB_BASES):
        for name, base in known.items():
            if name.lower() == text.strip().lower():
                return base
    allowed = [*dict.fromkeys([*(m.id for m in settings.models.catalogue), *CIVITAI_BASES])]
    raise invalid_field(field, f"{text[:80]!r} is not a base model that is supported", allowed, text)
