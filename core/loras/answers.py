"""The shapes of Civitai's answers (REST API v1), as far as Easel reads them.

core.loras.civitai asks for them.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from core.loras.egress import bad_answer


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


T = TypeVar("T", bound=Answer)


class Creator(Answer):
    username: str | None = None


class File(Answer):
    id: int | None = None
    name: str = ""
    type: str = "Model"
    sizeKB: float | None = None
    metadata: dict[str, Any] | None = None
    pickleScanResult: str | None = None
    virusScanResult: str | None = None
    hashes: dict[str, Any] | None = None
    primary: bool = False

    @property
    def safetensors(self) -> bool:
        return self.name.lower().endswith(".safetensors") and (self.metadata or {}).get("format") in (None, "SafeTensor")

    @property
    def sha256(self) -> str | None:
        text = str((self.hashes or {}).get("SHA256") or "").lower()
        return text if re.fullmatch("[0-9a-f]{64}", text) else None


class Image(Answer):
    url: str | None = None
    type: str = "image"


class Version(Answer):
    id: int
    modelId: int | None = None
    name: str = ""
    baseModel: str = "Other"
    status: str | None = None
    usageControl: str | None = None
    trainedWords: list[str] | None = None
    files: list[File] = []
    images: list[Image] = []
    stats: dict[str, Any] | None = None


class Model(Answer):
    id: int
    name: str
    type: str = ""
    nsfw: bool | None = None
    mode: str | None = None
    allowNoCredit: bool = False
    allowCommercialUse: list[str] | str | None = None
    creator: Creator | None = None
    modelVersions: list[Version] = []
    stats: dict[str, Any] | None = None


def read(kind: type[T], content: Any, site: str) -> T:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise bad_answer(httpx.URL(site).host, f"an answer that is not as documented (at {where[:80]!r})") from None
