"""The embeddings (textual inversions) of a request: found by name in its prompts, checked against the
registry and the model.

core.wording finds them when a request is planned, runners.prompts where it puts their vectors, and
core.metadata which of them a picture's prompts have. A name counts where it stands as a word of its own,
in any case of letters, as in A1111; diffusers' `<name>` and ComfyUI's `embedding:name` mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from core.adapters import check_there, unfit
from core.loras import Lora, Registry
from core.model_settings import Family
from core.plans import PlannedEmbedding
from core.problems import FieldError


def replace(text: str, names: Iterable[str], by: Callable[[str], str]) -> str:
    """`text` with `by(name)` in the place of each of `names`, the longest first."""
    spelt = {name.lower(): name for name in names}
    if not spelt:
        return text

    def put(match: re.Match[str]) -> str:
        name = spelt.get((match[1] or match[2]).lower())
        return match[0] if name is None else by(name)

    return _pattern(tuple(sorted(spelt, key=len, reverse=True))).sub(put, text)


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    any_name = "|".join(map(re.escape, names))
    return re.compile(rf"<(?:embedding:)?({any_name})>|(?<![\w-])(?:embedding:)?({any_name})(?![\w-])", re.IGNORECASE)


def named(text: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that stand in `text`, each once, in their order there."""
    found: dict[str, None] = {}

    def keep(name: str) -> str:
        found[name] = None
        return ""

    replace(text, names, keep)
    return list(found)


def resolve(
    texts: dict[str, str], registry: Registry, family: Family, family_of: Callable[[Lora], Family], fitting: Callable[[Family], list[str]], errors: list[FieldError]
) -> list[PlannedEmbedding]:
    """The registry's embeddings that `texts` (by field) name; those of another family go to `errors`.

    Args:
        family, family_of, fitting: as for `adapters.resolve`.

    Raises:
        Problem: 503 where the vectors are not on this machine.
    """
    known = registry.of_kind("embedding")
    planned: dict[str, PlannedEmbedding] = {}
    for field, text in texts.items():
        for name in named(text, known):
            entry = known[name]
            if error := unfit(entry, field, family, family_of(entry), fitting):
                errors.append(error)
            elif name not in planned:
                path = registry.file(entry)
                check_there(entry, path)
                planned[name] = PlannedEmbedding(name=name, path=str(path), sha256=entry.sha256, commercial_use=entry.commercial_use, credit=entry.credit)
    return list(planned.values())
