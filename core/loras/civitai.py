"""Civitai's API: from a name, an id or a page's address to one file and what its licence says.

It looks up and chooses; core.loras.download fetches. Shapes as in Civitai's public REST API (v1).
core.loras.installing calls it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, Field

from core.loras import rights
from core.loras.answers import File, Model, Version, read
from core.loras.contents import check_family
from core.loras.download import Remote
from core.loras.egress import Egress, bad_answer
from core.loras.registry import NOUNS, Kind, Lora, is_name
from core.problems import Problem, invalid_field, problem
from core.settings import Settings

TYPES: dict[Kind, tuple[str, ...]] = {"lora": ("LORA", "LoCon"), "embedding": ("TextualInversion",)}
SEARCH_PAGES = 3
_PAGE = re.compile(r"/models/(\d+)(?:/[^/]*)?/?")
_DOWNLOAD = re.compile(r"/api/download/models/(\d+)/?")
_VERSION = re.compile(r"/(?:api/v1/)?model-versions/(\d+)/?")
_AIR = re.compile(r"(?:urn:air:[^:]+:[^:]+:civitai:|civitai:\s*)?(\d+)\s*@\s*(\d+)")


class Candidate(BaseModel):
    """A model that a name may have meant."""

    model_id: int
    name: str
    creator: str | None = None
    base_model: str | None = None
    downloads: int | None = Field(None, description="How often it was downloaded from Civitai.")


@dataclass(frozen=True)
class Offer:
    """A file to fetch, what it must hold where that is known, and the entry to write when it is there.
    `again`: the entry stands already."""

    lora: Lora
    remote: Remote
    notes: tuple[str, ...] = ()
    again: bool = False
    kind: Kind | None = None


@dataclass(frozen=True)
class Reference:
    """What was asked for: an id or two, or a name. A bare number may be either id."""

    model_id: int | None = None
    version_id: int | None = None
    name: str | None = None


def parse(text: str, site: str) -> Reference:
    """Read a name, a model id, `MODEL@VERSION`, an AIR, or the address of a page or download on `site`.

    Raises:
        Problem: 422 for what is none of these.
    """
    text = text.strip()
    if "://" in text:
        return _parse_url(text, site)
    if pair := _AIR.fullmatch(text):
        return Reference(_id(pair[1]), _id(pair[2]))
    if text.isascii() and text.isdigit():
        return Reference(model_id=_id(text))
    if not text or len(text) > 200 or not text.isprintable():
        raise invalid_field("name", "must be a LoRA's name, its Civitai id, or the address of its page", "1 to 200 printable characters", text)
    return Reference(name=text)


def _parse_url(text: str, site: str) -> Reference:
    allowed = f"{site}/models/ID, {site}/models/ID?modelVersionId=ID, {site}/api/download/models/VERSION_ID"
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise invalid_field("name", "is no address that can be read", allowed, text) from None
    own = httpx.URL(site)
    if url.scheme not in ("http", "https") or url.host.removeprefix("www.") not in (own.host, "civitai.com"):
        raise invalid_field("name", f"is not an address on {own.host}", allowed, text)
    if page := _PAGE.fullmatch(url.path):
        version = url.params.get("modelVersionId")
        if version is not None and not (version.isascii() and version.isdigit()):
            raise invalid_field("name", "has a modelVersionId that is no number", allowed, text)
        return Reference(_id(page[1]), _id(version) if version else None)
    if found := _DOWNLOAD.fullmatch(url.path) or _VERSION.fullmatch(url.path):
        return Reference(version_id=_id(found[1]))
    raise invalid_field("name", "is no page or download of a model", allowed, text)


def _id(digits: str) -> int:
    if len(digits) > 15 or int(digits) == 0:
        raise invalid_field("name", "is no Civitai id", "a number of at most 15 digits", digits)
    return int(digits)


class Civitai:
    """The client, for one job. Of an id any kind is taken unless `kind` is given; a name is a LoRA's then."""

    def __init__(self, egress: Egress, client: httpx.AsyncClient, settings: Settings, kind: Kind | None = None) -> None:
        self._egress, self._client, self._settings, self._kind = egress, client, settings, kind
        self._noun = NOUNS[kind or "lora"]
        self.site = settings.loras.civitai_url.rstrip("/")

    async def resolve(self, wanted: Reference) -> Offer:
        """The one file that `wanted` means.

        Raises:
            Problem: 404, 409 with candidates where a name may mean several models, 422 for what
                Easel cannot use; else as `Egress.json`.
        """
        if wanted.name is not None:
            wanted = Reference(model_id=(await self._search(wanted.name)).model_id)
        version: Version | None = None
        if wanted.model_id is None:
            assert wanted.version_id is not None
            version = await self._version(wanted.version_id)
            if version.modelId is None:
                raise bad_answer(httpx.URL(self.site).host, "a version without its model")
            model = await self._model(version.modelId)
        else:
            try:
                model = await self._model(wanted.model_id)
                self._check_type(model)
            except Problem as error:
                if wanted.version_id is not None or not _is_another(error):
                    raise
                return await self._as_version(wanted.model_id, error)
        if version is None:
            version = _choose(model, wanted.version_id)
        return self._offer(model, version)

    async def _as_version(self, number: int, error: Problem) -> Offer:
        """A bare number that is no LoRA's id may be the id of a version; else it is `error`."""
        try:
            return await self.resolve(Reference(version_id=number))
        except Problem as other:
            raise error if _is_another(other) and (other.details.status == 404 or error.details.status != 404) else other from None

    async def _model(self, number: int) -> Model:
        return read(Model, await self._egress.json(self._client, f"{self.site}/api/v1/models/{number}"), self.site)

    async def _version(self, number: int) -> Version:
        return read(Version, await self._egress.json(self._client, f"{self.site}/api/v1/model-versions/{number}"), self.site)

    async def _search(self, name: str) -> Candidate:
        """The one model called `name`, whatever the case; or the only one whose name has it."""
        types = TYPES[self._kind or "lora"]
        params: dict[str, Any] = {"query": name, "types": list(types), "limit": 100, "nsfw": "true"}
        found: list[Model] = []
        for _ in range(SEARCH_PAGES):
            page = await self._egress.json(self._client, f"{self.site}/api/v1/models", params)
            items = page.get("items")
            if not isinstance(items, list):
                raise bad_answer(httpx.URL(self.site).host, "a search result without items")
            found += [m for m in (read(Model, item, self.site) for item in items) if m.type in types]
            cursor = (page.get("metadata") or {}).get("nextCursor")
            if not cursor:
                break
            params = {**params, "cursor": cursor}
        exact = [m for m in found if _plain(m.name) == _plain(name)]
        if len(exact) == 1:
            return _candidate(exact[0])
        if not exact and len(found) == 1 and _plain(name) in _plain(found[0].name):
            return _candidate(found[0])
        if not found:
            hint = "" if self._kind else " Embeddings are looked for with kind=embedding."
            raise problem(404, "lora-not-found", f"No such {self._noun}", f"{httpx.URL(self.site).host} has no {self._noun} called {name!r}. Give its id or its page's address.{hint}")
        candidates = [_candidate(m) for m in (exact or found)[:20]]
        which = f"{len(exact)} {self._noun}s are called {name!r}" if exact else f"No {self._noun} is called just {name!r}, and {len(found)} may be meant"
        raise problem(
            409, "lora-ambiguous", f"Which {self._noun}?", f"{which}. Add one by its id: {', '.join(str(c.model_id) for c in candidates)}.",
            candidates=[c.model_dump() for c in candidates],
        )

    def _check_type(self, model: Model) -> Kind:
        for kind, types in TYPES.items():
            if model.type in types and self._kind in (None, kind):
                return kind
        allowed = [t for kind, types in TYPES.items() for t in types if self._kind in (None, kind)]
        raise problem(422, "lora-type", f"No {self._noun}", f"{model.name!r} (model {model.id}) is a {model.type or 'model of unknown type'}; taken here: {', '.join(allowed)}.")

    def _offer(self, model: Model, version: Version) -> Offer:
        kind = self._check_type(model)
        label = f"{model.name!r} (model {model.id}, version {version.id})"
        if model.mode in ("Archived", "TakenDown"):
            raise problem(410, "lora-archived", "No longer there", f"{label} was {'archived' if model.mode == 'Archived' else 'taken down'} on Civitai.")
        if version.status not in (None, "Published"):
            raise problem(409, "lora-unpublished", "Not published", f"{label} is not published on Civitai (its status is {version.status[:40]}).")
        if version.usageControl not in (None, "Download"):
            raise problem(422, "lora-not-downloadable", "Not for download", f"The creator of {label} allows its use on Civitai alone, not its download.")
        base = rights.CIVITAI_BASES.get(version.baseModel)
        if base is None:
            others = [f"{v.id} ({v.baseModel})" for v in model.modelVersions if v.baseModel in rights.CIVITAI_BASES]
            hint = f" Versions that fit: {', '.join(others[:10])}." if others else ""
            supported = list(rights.CIVITAI_BASES)
            raise invalid_field("base_model", f"{label} is for {version.baseModel[:60]!r}, which is not supported.{hint}", supported, version.baseModel)
        check_family(kind, base)
        file = _choose_file(version, label)
        limit = self._settings.loras.max_bytes
        size = round(file.sizeKB * 1024) if file.sizeKB else None
        if size and size > limit * 1.01:
            raise problem(413, "lora-too-large", "LoRA too large", f"{label} has about {size} bytes; loras.max_bytes allows {limit}.")
        url = f"{self.site}/api/download/models/{version.id}"
        raw = model.allowCommercialUse
        notes = [] if file.sha256 else [f"Civitai gives no SHA-256 for {label}: the file was checked by its length and header alone"]
        preview = next((i.url for i in version.images if i.url and i.type == "image"), None)
        words = tuple(w for w in (x.strip().strip(",").strip() for x in version.trainedWords or []) if w)
        token = kind == "embedding" and words and is_name(words[0])  # an embedding is used by its name, which its pages call its trigger word
        lora = Lora(
            name=words[0] if token else local_name(model.name, f"civitai-{model.id}"),
            kind=kind,
            model_id=model.id,
            base_model=base.hub_id,
            lora_path=url,
            trigger_words=words,
            allow_no_mention=model.allowNoCredit,
            usage_rights=rights.usage_rights(raw),
            family=base.family,
            version_id=version.id,
            file_name=f"civitai-{version.id}.safetensors",
            creator=model.creator.username if model.creator else None,
            nsfw=model.nsfw,
            preview=preview,
            civitai_base_model=version.baseModel,
            allow_commercial_use=[raw] if isinstance(raw, str) else raw,
        )
        fetch = f"{url}?fileId={file.id}" if file.id else url
        return Offer(lora, Remote(fetch, file.sha256, size), tuple(notes), kind=kind)


def local_name(text: str, otherwise: str) -> str:
    """A name for the registry from a name of Civitai's: what could not stand in a prompt becomes a blank."""
    name = re.sub(r"[\s:,<>/\\\"\x00-\x1f\x7f-\x9f]+", " ", "".join(c if c.isprintable() else " " for c in text))
    name = name[:100].strip(". ")
    return name if is_name(name) else otherwise


def _choose(model: Model, version_id: int | None) -> Version:
    """The version asked for, or the newest: Civitai lists it first."""
    published = [v for v in model.modelVersions if v.status in (None, "Published")]
    if version_id is not None:
        for version in model.modelVersions:
            if version.id == version_id:
                return version
        known = ", ".join(f"{v.id} ({v.name})" for v in published[:20]) or "none"
        raise problem(404, "lora-not-found", "No such version", f"{model.name!r} (model {model.id}) has no version {version_id}; it has {known}.")
    if not published:
        raise problem(404, "lora-not-found", "No such version", f"{model.name!r} (model {model.id}) has no published version.")
    return published[0]


def _choose_file(version: Version, label: str) -> File:
    """The primary safetensors file, or the first."""
    weights = [f for f in version.files if f.type in ("Model", "Pruned Model")]
    usable = [f for f in weights if f.safetensors]
    if not usable:
        has = f"only {', '.join(f.name[:60] for f in weights[:5])}" if weights else "no file of weights"
        raise problem(422, "lora-not-safetensors", "Not a safetensors file", f"{label} has {has}. Easel takes .safetensors files alone: loading a pickle runs code.")
    file = next((f for f in usable if f.primary), usable[0])
    for scan in ("pickleScanResult", "virusScanResult"):
        if str(getattr(file, scan)).lower() == "danger":
            raise problem(422, "lora-dangerous", "Refused as dangerous", f"Civitai's scan of {label} says Danger ({scan}).")
    return file


def _candidate(model: Model) -> Candidate:
    newest = model.modelVersions[0] if model.modelVersions else None
    downloads = (model.stats or {}).get("downloadCount")
    return Candidate(
        model_id=model.id, name=model.name[:200], creator=model.creator.username if model.creator else None,
        base_model=newest.baseModel if newest else None, downloads=downloads if isinstance(downloads, int) else None,
    )


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _is_another(error: Problem) -> bool:
    """Whether an id was that of something else, or of nothing."""
    return error.details.status == 404 or error.details.type.endswith(":lora-type")
