"""A LoRA in a repository of the Hugging Face hub: which file it is, what it is for, whose it is.

Like core.loras.civitai it looks up and chooses; core.loras.download fetches. core.loras.installing calls it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx

from core.loras import rights
from core.loras.civitai import Offer, local_name
from core.loras.download import Remote
from core.loras.egress import Egress, bad_answer
from core.loras.registry import Lora
from core.problems import invalid_field, problem
from core.settings import Settings

REPO = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
REVISION = r"[A-Za-z0-9][\w./-]{0,120}"
# Licences that let pictures be sold, by the hub's identifiers; others are not assumed to.
_COMMERCIAL = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense",
    "openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m",
}
_NO_CREDIT = {"cc0-1.0", "unlicense"}
_RESOLVE = re.compile(rf"/({REPO})/resolve/([^/]+)/(.+)", re.ASCII)


async def resolve(
    egress: Egress, client: httpx.AsyncClient, settings: Settings, repo_id: str, filename: str | None, revision: str, base_model: str | None
) -> Offer:
    """The one .safetensors file that is meant, pinned to the commit that `revision` names now.

    Raises:
        Problem: 404, 409 with candidates where the repository has several files, 422; else as `Egress.json`.
    """
    hub = settings.loras.hub_url.rstrip("/")
    info = await egress.json(client, f"{hub}/api/models/{repo_id}/revision/{quote(revision, safe='')}", {"blobs": "true"})
    files = {f["rfilename"]: f for f in info.get("siblings") or [] if isinstance(f, dict) and isinstance(f.get("rfilename"), str)}
    name = _choose(repo_id, [n for n in files if n.lower().endswith(".safetensors")], filename)
    commit = info.get("sha")
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
        raise bad_answer(httpx.URL(hub).host, "a repository without its commit")
    card: dict[str, Any] = info["cardData"] if isinstance(info.get("cardData"), dict) else {}
    lfs = files[name].get("lfs") or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    sha256 = sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None
    size = files[name].get("size")
    base = _base(card, base_model, settings)
    licence = str(card.get("license") or "").lower()
    trigger = card.get("instance_prompt")
    url = f"{hub}/{repo_id}/resolve/{commit}/{quote(name)}"
    lora = Lora(
        name=local_name(repo_id.split("/")[1], "hub-lora"),
        base_model=base.hub_id,
        lora_path=url,
        trigger_words=(trigger.strip(),) if isinstance(trigger, str) and trigger.strip() else (),
        allow_no_mention=licence in _NO_CREDIT,
        usage_rights=rights.ALLOWED if licence in _COMMERCIAL else rights.NOT_ALLOWED,
        family=base.family,
        file_name=f"hub-{hashlib.sha256(url.encode()).hexdigest()[:16]}.safetensors",
        creator=str(info.get("author") or repo_id.split("/")[0])[:100],
        licence=licence or None,
    )
    notes = () if sha256 else ("the hub gives no SHA-256 for this file: it was checked by its length and header alone",)
    return Offer(lora, Remote(url, sha256, size if isinstance(size, int) else None), notes)


def parse_url(url: str, hub_url: str) -> tuple[str, str, str] | None:
    """Repository, revision and file of an address that `resolve` wrote; None for another."""
    if not url.startswith(hub_url.rstrip("/") + "/") or not (found := _RESOLVE.fullmatch(urlsplit(url).path)):
        return None
    return found[1], found[2], unquote(found[3])


def _choose(repo_id: str, weights: list[str], filename: str | None) -> str:
    if filename is not None:
        if filename in weights:
            return filename
        raise invalid_field("source.filename", f"{repo_id} has no such .safetensors file", weights[:50] or "a repository that has one", filename)
    if not weights:
        raise problem(422, "lora-not-safetensors", "Not a safetensors file", f"{repo_id} has no .safetensors file. Easel takes no others: loading a pickle runs code.")
    if len(weights) > 1:
        raise problem(
            409, "lora-ambiguous", "Which file?", f"{repo_id} has {len(weights)} .safetensors files: name one as `filename`.",
            candidates=[{"filename": name} for name in weights[:50]],
        )
    return weights[0]


def _base(card: dict[str, Any], asked: str | None, settings: Settings) -> rights.Base:
    if asked:
        return rights.base_model(asked, settings)
    named = card.get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    if not isinstance(named, str):
        raise invalid_field("base_model", "the repository does not say what the LoRA is for", "a model of the catalogue, or a hub id")
    return rights.base_model(named, settings)
