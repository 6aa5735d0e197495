"""Uploaded LoRAs and embeddings, and what becomes of those that are there: edited, removed, hashed again, listed.

Plain functions over the registry; they read and write files, so api.loras calls them in a thread.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.loras import rights
from core.loras.contents import check_family, check_weights, hash_file
from core.loras.download import settle
from core.loras.messages import Added, Embeddings, Listing, Removed, Terms, UploadedLora, Verified
from core.loras.registry import NAME_RULE, Kind, Lora, Registry, cannot_write, is_name, missing, name_taken
from core.problems import Problem, invalid_field
from core.settings import Settings


def take_upload(registry: Registry, settings: Settings, temporary: Path, wanted: UploadedLora) -> Added:
    """Register an uploaded file, which lies in the registry's folder under a temporary name.

    Raises:
        Problem: 409 where the name is taken, 422 for a wrong field or file; else as `Registry.put`.
    """
    name = wanted.name
    if not is_name(name):
        raise invalid_field("name", "cannot name a LoRA", NAME_RULE, name)
    base = rights.base_model(wanted.base_model, settings)
    kind = check_weights(temporary, 422, wanted.kind)
    check_family(kind, base)
    sha256, size = hash_file(temporary)
    if known := registry.entries().get(name):
        if known.sha256 == sha256 and registry.file(known).is_file():
            return already_there(known)
        raise name_taken(name)
    target = registry.folder / f"upload-{sha256[:32]}.safetensors"
    lora = Lora(
        name=name, kind=kind, base_model=base.hub_id, lora_path=os.path.relpath(target, registry.path.parent), family=base.family,
        usage_rights=rights.NOT_ALLOWED, file_name=target.name, sha256=sha256, size=size, date_added=now(),
    )
    before = target.exists()
    try:
        settle(temporary, target)
        lora = with_terms(lora, wanted)
        registry.put(lora)
    except OSError as error:
        raise cannot_write(target, error) from error
    except Problem:
        if not before:
            target.unlink(missing_ok=True)
        raise
    return Added(name=name, already_there=False, message=f"{name!r} was added.", lora=lora.entry())


def change(registry: Registry, name: str, terms: Terms) -> Lora:
    """Edit trigger words and rights.

    Raises:
        Problem: 404, or 422 where nothing is changed; else as `Registry.put`.
    """
    fields = terms.said()
    if not fields:
        raise invalid_field("body", "changes nothing", sorted(Terms.model_fields))
    return registry.change(name, **fields)


def remove(registry: Registry, name: str) -> Removed:
    """Take a LoRA out of the registry, and delete its weights where Easel put them and no other
    entry has them.

    Raises:
        Problem: 404; else as `Registry.put`.
    """
    lora = registry.remove(name)
    target = registry.file(lora)
    shared = any(registry.file(other) == target for other in registry.entries().values())
    deleted = not shared and target.parent == registry.folder and target.is_file()
    if deleted:
        target.unlink(missing_ok=True)
    return Removed(name=name, file_deleted=deleted)


def verify(registry: Registry, name: str) -> Verified:
    """Hash the weights again and compare with what the registry has.

    Raises:
        Problem: 404.
    """
    known = registry.entries()
    if name not in known:
        raise missing(name, known)
    lora = known[name]
    target = registry.file(lora)
    answer = Verified(name=name, ok=False, expected_sha256=lora.sha256, detail="")
    if not target.is_file():
        return answer.model_copy(update={"detail": "The weights are not on this machine; add the LoRA again to download them."})
    sha256, size = hash_file(target)
    ok = False
    try:
        check_weights(target, 422, lora.kind)
    except Problem as error:
        detail = error.details.detail
    else:
        ok = lora.sha256 is None or lora.sha256.lower() == sha256
        if lora.sha256 is None:
            detail = "The file is whole; the registry has no SHA-256 to compare with."
        elif ok:
            detail = "The file is the one that was registered."
        else:
            detail = "The file is not the one that was registered: its SHA-256 differs. Remove the LoRA and add it again."
    return answer.model_copy(update={"ok": ok, "sha256": sha256, "size": size, "detail": detail})


def listing(registry: Registry) -> Listing:
    """Every LoRA in the seed's schema and more, and what is wrong with the registry's file."""
    return Listing(loras=_listed(registry, "lora"), warning=registry.warning)


def embeddings(registry: Registry) -> Embeddings:
    """Every embedding, as `listing` has the LoRAs."""
    return Embeddings(embeddings=_listed(registry, "embedding"), warning=registry.warning)


def _listed(registry: Registry, kind: Kind) -> dict[str, dict[str, Any]]:
    return {
        name: lora.entry() | {"commercial_use": lora.commercial_use, "credit": lora.credit, "available": registry.file(lora).is_file()}
        for name, lora in registry.of_kind(kind).items()
    }


def with_terms(lora: Lora, terms: Terms) -> Lora:
    """The entry with what the admin says of it."""
    return Lora.model_validate({**lora.model_dump(), "name": lora.name, **terms.said()})


def already_there(lora: Lora) -> Added:
    return Added(name=lora.name, already_there=True, message=f"{lora.name!r} is already there.", lora=lora.entry())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
