"""The LoRA registry: lora_list.json, what each entry says, and where its weights are.

The file keeps the seed's schema (a JSON object of name to entry, "trigger words" with a blank), so
that its other readers go on working; fields beyond the seed's are optional. It may be edited by
hand while the service runs: it is read anew when it has changed.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from core.problems import invalid_field, nearest
from core.settings import Family


class Lora(BaseModel):
    """An entry of the registry.

    `lora_path` is where the weights came from (a URL, a hub id) or, for a file that lies in the
    repository, its path relative to the registry. `file_name` is the file in `loras.folder`.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    name: str = Field(exclude=True)
    model_id: int | None = None
    base_model: str
    lora_path: str
    trigger_words: tuple[str, ...] = Field((), alias="trigger words")
    allow_no_mention: bool = False
    usage_rights: str | list[str] = "None"
    family: Family | None = None
    version_id: int | None = None
    file_name: str | None = None
    sha256: str | None = None
    size: int | None = None
    creator: str | None = None

    @property
    def commercial_use(self) -> bool:
        """Whether pictures made with it may be sold; what is unknown counts as not allowed."""
        rights = [self.usage_rights] if isinstance(self.usage_rights, str) else self.usage_rights
        return bool({"AllowCommercialUse", "Image", "Sell"} & set(rights))

    @property
    def credit(self) -> str | None:
        """Who must be named beside a picture; None where nobody must."""
        return None if self.allow_no_mention else self.creator or "the author of " + self.name


class Registry:
    """The entries of the file at `path`; downloaded weights lie in `folder`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def entries(self) -> dict[str, Lora]:
        """Every entry by its name, as the file has them now."""
        content = json.loads(self.path.read_text())
        return {name: Lora(name=name, **entry) for name, entry in content.items()}

    def find(self, name: str) -> Lora:
        """The entry called `name`.

        Raises:
            Problem: 422 that lists what there is.
        """
        known = self.entries()
        if name not in known:
            raise invalid_field("lora", f"there is no LoRA {name!r}{nearest(name, known)}", list(known), name)
        return known[name]

    def file(self, lora: Lora) -> Path:
        """Where its weights are on this machine (the file may be missing)."""
        return self.folder / lora.file_name if lora.file_name else self.path.parent / lora.lora_path
