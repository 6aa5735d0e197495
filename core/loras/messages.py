"""What admins may ask of the LoRAs, and what they are told: the messages of api.loras and core.loras.installing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from core.loras import hub, rights
from core.loras.registry import NAME_RULE, Kind, is_name
from core.problems import ProblemDetails

TriggerWord = Annotated[str, Field(min_length=1, max_length=500)]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class CivitaiSource(_Input):
    """A model of Civitai's by its id, a version by its own, or both."""

    model_id: int | None = Field(None, ge=1, lt=10**15)
    version_id: int | None = Field(None, ge=1, lt=10**15)


class HubSource(_Input):
    """A .safetensors file in a repository of the Hugging Face hub."""

    repo_id: str = Field(pattern=f"^{hub.REPO}$")
    filename: str | None = Field(None, max_length=300, description="May be left out where the repository has just one.")
    revision: str = Field("main", pattern=f"^{hub.REVISION}$")


def _kind_of_source(value: Any) -> str:
    """Which form of source a value is meant to be, so that an error speaks of that form alone."""
    if isinstance(value, HubSource) or (isinstance(value, dict) and "repo_id" in value):
        return "hub"
    if isinstance(value, (CivitaiSource, dict)):
        return "civitai"
    return "id" if isinstance(value, int) and not isinstance(value, bool) else "text"


class Terms(_Input):
    """What an admin may say of a LoRA. What is left out stays, or is taken from the source."""

    trigger_words: list[TriggerWord] | None = Field(None, max_length=100)
    usage_rights: str | list[str] | None = Field(None, description=f"{rights.ALLOWED}, {rights.NOT_ALLOWED}, or Civitai's values: None, Image, RentCivit, Rent, Sell.")
    allow_no_mention: bool | None = Field(None, description="Whether pictures may be shown without credit to the creator.")
    creator: str | None = Field(None, max_length=100, description="Whose credit is due.")

    def said(self) -> dict[str, Any]:
        """The fields that were given."""
        return {k: v for k in Terms.model_fields if (v := getattr(self, k)) is not None}

    @field_validator("usage_rights")
    @classmethod
    def known_rights(cls, value: str | list[str] | None) -> str | list[str] | None:
        known = (rights.ALLOWED, rights.NOT_ALLOWED, "None", "Image", "RentCivit", "Rent", "Sell")
        for one in [value] if isinstance(value, str) else value or []:
            if one not in known:
                raise ValueError(f"{one[:40]!r} is none of {', '.join(known)}")
        return value


class AddLora(Terms):
    """A LoRA to add. Its source: a Civitai name, id, `MODEL@VERSION` or page address as text, or an object."""

    source: Annotated[
        Annotated[CivitaiSource, Tag("civitai")]
        | Annotated[HubSource, Tag("hub")]
        | Annotated[int, Field(ge=1, lt=10**15), Tag("id")]
        | Annotated[str, Field(min_length=1, max_length=500), Tag("text")],
        Discriminator(_kind_of_source),
    ]
    name: str | None = Field(None, description=f"What to call it here: {NAME_RULE}. Left out: by its name there.")
    base_model: str | None = Field(None, max_length=300, description="For a hub repository that does not say what it is for.")
    kind: Kind | None = Field(None, description="What must come; a name is looked for among LoRAs if left out.")

    @field_validator("name")
    @classmethod
    def usable_name(cls, name: str | None) -> str | None:
        if name is not None and not is_name(name):
            raise ValueError(f"cannot name a LoRA: {NAME_RULE}")
        return name


class DownloadProgress(BaseModel):
    """How far a download is. `value`: 0 to 1; rate in bytes a second over the last ten seconds."""

    value: float = 0
    bytes: int = 0
    total_bytes: int | None = None
    rate: float = 0
    eta_s: float | None = None


class Added(BaseModel):
    """The outcome: the entry in the seed's schema, and whether it was there before."""

    name: str
    already_there: bool
    message: str
    lora: dict[str, Any]
    notes: list[str] = []


class JobState(BaseModel):
    """A job as the routes tell it."""

    id: str
    source: str
    status: Literal["queued", "running", "succeeded", "failed", "canceled"]
    created_at: str
    started_at: str | None = None
    completed_at: str | None = None
    progress: DownloadProgress
    result: Added | None = None
    error: ProblemDetails | None = None


class UploadedLora(Terms):
    """The fields that come with an uploaded file."""

    name: str
    base_model: str = Field(max_length=300)
    kind: Kind | None = Field(None, description="What the file must be; by its tensors if left out.")

    @field_validator("trigger_words", mode="before")
    @classmethod
    def comma_separated(cls, value: Any) -> Any:
        return [word for word in map(str.strip, value.split(",")) if word] if isinstance(value, str) else value


class RemoveLora(_Input):
    """Which LoRA to remove."""

    name: str = Field(max_length=200)


class Changed(BaseModel):
    """A LoRA's entry as it is after a change."""

    name: str
    lora: dict[str, Any]


class Removed(BaseModel):
    """What a removal did: weights are deleted only where Easel put them and no other entry has them."""

    name: str
    file_deleted: bool


class Verified(BaseModel):
    """How the weights on this machine compare with what was registered."""

    name: str
    ok: bool
    expected_sha256: str | None
    sha256: str | None = None
    size: int | None = None
    detail: str


class Listing(BaseModel):
    """Every LoRA by its name, in the seed's schema and more; `warning` says what is wrong with the registry's file."""

    loras: dict[str, dict[str, Any]]
    warning: str | None = None


class Embeddings(BaseModel):
    """Every embedding, as `Listing` has the LoRAs."""

    embeddings: dict[str, dict[str, Any]]
    warning: str | None = None
