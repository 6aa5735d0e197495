"""What a file of weights holds: a LoRA, an embedding, or neither; and its SHA-256.

Only the header is read for the kind. core.loras.download asks before a file is put in place,
core.loras.keeping for uploads and when a file is looked at again; who registers one asks `check_family`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.loras.registry import Kind
from core.loras.rights import Base
from core.model_settings import Family
from core.problems import invalid_field, problem

MAX_VECTORS = 75  # of one embedding: as many tokens as the text encoder reads at once
# The names of an embedding's vectors by text encoder; diffusers names a single tensor by its token.
ENCODERS = {"emb_params", "clip_l", "clip_g"}
FAMILIES: tuple[Family, ...] = ("starter", "sd15", "sd2", "sdxl")  # that embeddings can be for: they read by CLIP alone
A: dict[Kind, str] = {"lora": "a LoRA", "embedding": "an embedding"}
_NOT_SUPPORTED = ("dora_scale", "lora_magnitude_vector", "hada", "lokr", "oft_")


def check_weights(path: Path, status: int, kind: Kind | None = None) -> Kind:
    """See that a file is safetensors, whole by its own header, and has the weights of a LoRA or an
    embedding, or of `kind` where that is given. Return which.

    Raises:
        Problem: of this status, saying what it is instead.
    """
    try:
        with safe_open(path, framework="np") as weights:
            shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, ValueError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            start = file.read(16)
        what = "a ZIP or PyTorch pickle file" if start.startswith((b"PK", b"\x80")) else "a web page" if start.lstrip().startswith(b"<") else str(error)[:120]
        raise problem(status, "lora-not-safetensors", "Not a safetensors file", f"The file is no whole safetensors file: {what}. Pickled weights are refused, since loading them runs code.") from None
    other = next((part for part in _NOT_SUPPORTED if any(part in name for name in shapes)), None)
    found: Kind | None = None
    if not other and any("lora" in name.lower() for name in shapes):
        found = "lora"
    elif not other and _has_vectors(shapes):
        found = "embedding"
    if found is None:
        detail = f"of the kind {other!r}, which is not supported" if other else f"but has none of a LoRA (it begins with {next(iter(shapes))[:80]!r})" if shapes else "but is empty"
        raise problem(status, "lora-not-a-lora", "Not a LoRA", f"The file has weights {detail}.")
    if kind not in (None, found):
        raise problem(status, "lora-kind", "Of another kind", f"The file has the weights of {A[found]}, not of {A[kind or found]}.")
    return found


def _has_vectors(shapes: dict[str, list[int]]) -> bool:
    """Whether these are an embedding's tensors: each (vectors, width) or (width,). A name with a dot is
    that of a model's layer."""
    if not shapes or not (set(shapes) <= ENCODERS or (len(shapes) == 1 and "." not in next(iter(shapes)))):
        return False
    return all(len(s) in (1, 2) and s[-1] > 1 and (len(s) == 1 or 1 <= s[0] <= MAX_VECTORS) for s in shapes.values())


def check_family(kind: Kind, base: Base) -> None:
    """Raises:
    Problem: 422 for an embedding of a family that takes none.
    """
    if kind == "embedding" and base.family not in FAMILIES:
        raise invalid_field("base_model", f"embeddings for {base.family} are not supported", list(FAMILIES), base.hub_id)


def hash_file(path: Path) -> tuple[str, int]:
    """The SHA-256, in lower case, and the bytes of a file that may be too large for memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), os.fstat(file.fileno()).st_size
