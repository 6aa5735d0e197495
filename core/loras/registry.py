"""The registry of LoRAs and embeddings: lora_list.json, what each entry says, and where its weights are.

The file keeps the seed's schema (a JSON object of name to entry, "trigger words" with a blank), so
that its other readers go on working; fields beyond the seed's are optional. Each entry says by
`schema_version` which fields it may have; one without it is the seed's. It may be edited by
hand while the service runs: it is read anew when it has changed. core.loras.rights and core.loras.installing
decide what an entry says; requests look entries up here, in every process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from filelock import Timeout as LockTimeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.loras import rights
from core.loras.listfile import Broken, members, write
from core.model_settings import Family
from core.problems import Problem, invalid_field, nearest, problem, unavailable
from core.settings import ROOT

log = logging.getLogger("easel.loras")
LOCK_TIMEOUT_S = 20
SCHEMA_VERSION = 2  # 1, never written down: the seed's entries, whose file is known by the address alone
Kind = Literal["lora", "embedding"]
NOUNS: dict[Kind, str] = {"lora": "LoRA", "embedding": "embedding"}
NAME_RULE = "1 to 100 characters; not : , < > / \\ \" or control characters; no blank or dot at either end"
_NAME = re.compile(r"[^\s:,<>/\\\"\x00-\x1f\x7f-\x9f](?:[^:,<>/\\\"\x00-\x1f\x7f-\x9f]{0,98}[^\s:,<>/\\\"\x00-\x1f\x7f-\x9f])?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.safetensors", re.ASCII)
_CIVITAI_DOWNLOAD = re.compile(r"https?://[^/]+/api/download/models/(\d+)")


def is_name(text: str) -> bool:
    """Whether `text` may name a LoRA: safe in `<lora:name:0.8>` and in `a:0.6,b:0.4`; see `NAME_RULE`."""
    return bool(_NAME.fullmatch(text)) and text.isprintable() and text == text.strip(". ")


class Lora(BaseModel):
    """An entry of the registry.

    `lora_path` is where the weights came from (a URL) or, for a file that lies beside the
    registry or in the Bento, its path relative to that. `file_name` is the file in `loras.folder`. An entry without a
    `kind` is a LoRA, as it was for the seed.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    name: str = Field(exclude=True)
    schema_version: int = Field(1, ge=1)
    model_id: int | None = None
    base_model: str
    kind: Kind = "lora"
    lora_path: str
    trigger_words: tuple[str, ...] = Field((), alias="trigger words")
    allow_no_mention: bool = False
    usage_rights: str | list[str] = "None"
    family: Family | None = None
    version_id: int | None = None
    file_name: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    size: int | None = None
    creator: str | None = None
    nsfw: bool | None = None
    preview: str | None = None
    date_added: str | None = None
    civitai_base_model: str | None = None
    allow_commercial_use: list[str] | None = None

    @field_validator("name")
    @classmethod
    def usable_name(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError(f"{name[:120]!r} cannot name a LoRA: {NAME_RULE}")
        return name

    @field_validator("schema_version")
    @classmethod
    def known_version(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise ValueError(f"{version} is a later Easel's; this one reads up to {SCHEMA_VERSION}. Use that Easel, or add the LoRA anew with this one")
        return version

    @field_validator("file_name")
    @classmethod
    def bare_file_name(cls, name: str | None) -> str | None:
        if name is not None and not _FILE_NAME.fullmatch(name):
            raise ValueError("must be the bare name of a .safetensors file in the folder of LoRAs")
        return name

    @property
    def commercial_use(self) -> bool:
        """Whether pictures made with it may be sold; what is unknown counts as not allowed."""
        return rights.pictures_may_be_sold(self.usage_rights)

    @property
    def credit(self) -> str | None:
        """Who must be named beside a picture; None where nobody must."""
        return None if self.allow_no_mention else self.creator or "the author of " + self.name

    def entry(self) -> dict[str, Any]:
        """As the file has it, in this version: the seed's fields always, others where they are known."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"kind"} if self.kind == "lora" else None)
        return {"model_id": self.model_id, **content, "schema_version": SCHEMA_VERSION}


class Registry:
    """The entries of the file at `path`; downloaded weights lie in `folder`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self._read: tuple[object, dict[str, Lora], str | None] = ((), {}, None)

    @property
    def warning(self) -> str | None:
        """What is wrong with the file as it is now; the last good one is in force meanwhile."""
        self.entries()
        return self._read[2]

    def entries(self) -> dict[str, Lora]:
        """Every entry by its name: as the file has them now or, where it is broken, had them last."""
        stamp = self._stamp()
        if stamp != self._read[0]:
            good = self._read[1]
            try:
                self._read = (stamp, _loras(self._text()), None)
            except Broken as error:
                warning = f"{self.path.name} is broken: {error}. The entries it had before stay in force."
                log.warning("%s", warning)
                self._read = (stamp, good, warning)
        return dict(self._read[1])

    def of_kind(self, kind: Kind) -> dict[str, Lora]:
        """The LoRAs, or the embeddings."""
        return {name: lora for name, lora in self.entries().items() if lora.kind == kind}

    def find(self, name: str) -> Lora:
        """The LoRA called `name`.

        Raises:
            Problem: 422 that lists what there is.
        """
        known = self.of_kind("lora")
        if name in known:
            return known[name]
        if name in self.entries():
            raise invalid_field("lora", f"{name!r} is an embedding: write its name into the prompt or the negative prompt", list(known), name)
        raise invalid_field("lora", f"there is no LoRA {name!r}{nearest(name, known)}", list(known), name)

    def file(self, lora: Lora) -> Path:
        """Where its weights are on this machine (the file may be missing)."""
        if lora.file_name:
            return self.folder / lora.file_name
        if version := _CIVITAI_DOWNLOAD.match(lora.lora_path):  # an entry written for the seed
            return self.folder / f"civitai-{version[1]}.safetensors"
        beside, shipped = self.path.parent / lora.lora_path, ROOT / lora.lora_path
        return shipped if shipped.exists() and not beside.exists() else beside  # the starter's, where the registry is kept elsewhere

    def put(self, lora: Lora, replace: bool = False) -> None:
        """Write an entry.

        Raises:
            Problem: 409 where the name is taken and `replace` is not set, or the file is broken;
                503 or 507 where it cannot be written.
        """
        with self._edit() as content:
            if lora.name in content and not replace:
                raise name_taken(lora.name)
            content[lora.name] = lora.entry()

    def change(self, name: str, **fields: Any) -> Lora:
        """Change fields (by their Python names) of an entry; return it as it is then.

        Raises:
            Problem: 404 where there is none, 422 for a value that cannot be; else as `put`.
        """
        with self._edit() as content:
            if name not in content:
                raise missing(name, content)
            lora = Lora.model_validate({**content[name], "name": name})
            lora = Lora.model_validate({**lora.entry(), "name": name, **{_alias(k): v for k, v in fields.items()}})
            content[name] = lora.entry()
        return lora

    def remove(self, name: str) -> Lora:
        """Take an entry out; return it as it was. Its weights stay. Raises as `change`."""
        with self._edit() as content:
            if name not in content:
                raise missing(name, content)
            return Lora.model_validate({**content.pop(name), "name": name})

    @contextlib.contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        """The file's content to change, under a lock between processes; written when the block ends well."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            with FileLock(lock, timeout=LOCK_TIMEOUT_S):
                try:
                    text = self._text()
                    _loras(text)
                    content = {name: entry for name, entry, _ in members(text)}
                    yield content
                    write(self.path.resolve(), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                finally:  # while it is held: a waiting process sees that its file is gone and makes another
                    lock.unlink(missing_ok=True)
        except Broken as error:
            raise problem(409, "lora-registry-broken", "LoRA registry broken", f"{self.path.name} is broken: {error}. Mend it first; nothing was written.") from None
        except LockTimeout:
            raise unavailable(f"{self.path.name} is locked by another process.", retry_after=5, slug="lora-registry-locked") from None
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _stamp(self) -> object:
        try:
            found = self.path.stat()
        except OSError as error:
            return error.errno
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _text(self) -> str:
        try:
            return self.path.read_text("utf-8")
        except FileNotFoundError:
            return "{}"
        except UnicodeDecodeError as error:
            raise Broken("not UTF-8 text", error.object[: error.start].decode("utf-8", "replace"), error.start) from None
        except OSError as error:
            raise Broken(f"cannot be read: {error.strerror}", "", 0) from None


def _loras(text: str) -> dict[str, Lora]:
    found: dict[str, Lora] = {}
    for name, entry, offset in members(text):
        if name in found:
            raise Broken(f"{name!r} stands there a second time", text, offset)
        try:
            found[name] = Lora.model_validate({**entry, "name": name})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise Broken(f"{name!r}: {field}: {first['msg'].removeprefix('Value error, ')}", text, offset) from None
    return found


def _alias(field: str) -> str:
    return Lora.model_fields[field].alias or field


def cannot_write(path: Path, error: OSError) -> Problem:
    """507 for a full disk or quota, else 503: what keeps the service from writing at `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return problem(507, "disk-full", "Disk full", f"There is no room for {path.name} in {path.parent}. Free some space and try again; nothing was changed.")
    return unavailable(f"{path.name} cannot be written in {path.parent}: {error.strerror}.", slug="cannot-write")


def name_taken(name: str) -> Problem:
    return problem(409, "lora-name-taken", "Name taken", f"There is a LoRA {name!r} already. Give another `name`, or remove that one first.")


def missing(name: str, known: Any) -> Problem:
    """404 for a path that names no LoRA."""
    return problem(404, "lora-not-found", "No such LoRA", f"There is no LoRA {name[:120]!r}{nearest(name, known)}.")
