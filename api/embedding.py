"""Embeddings as HTTP answers: numbers or base64 in JSON, and NumPy's file format."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from pydantic import BaseModel

from core.generation import Embedding, Generation, Ran, Vector
from core.multimodal import EmbedRequest

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


class EmbedResponse(BaseModel):
    """One entry for each picture: CLIP's projection (CLIP_shape) and the VAE's scaled mean (vae_shape,
    row by row), as numbers, or as base64 of little-endian float16."""

    count: int
    CLIP_embeddings: list[list[float]] | list[str]
    vae_emb: list[list[float]] | list[str]
    CLIP_shape: list[int]
    vae_shape: list[int]
    encoding: str
    normalized: bool
    ran: Ran


class SeedEmbeddings(EmbedResponse):
    """As EmbedResponse; of a single picture, CLIP_embeddings and vae_emb are the vectors themselves."""

    CLIP_embeddings: list[list[float]] | list[str] | list[float] | str  # type: ignore[assignment]
    vae_emb: list[list[float]] | list[str] | list[float] | str  # type: ignore[assignment]


def _array(vector: Vector, normalize: bool = False) -> Floats:
    array: Floats = np.frombuffer(vector.data, np.dtype("<f4")).reshape(vector.shape)
    return array / max(np.linalg.norm(array), np.float32(1e-12)) if normalize else array


def answer(generation: Generation, wanted: EmbedRequest) -> EmbedResponse:
    """Lists of vectors, as asked for."""
    assert generation.ran is not None
    first = generation.embeddings[0]

    def written(array: Floats) -> Any:
        if wanted.encoding == "base64":
            return base64.b64encode(array.astype("<f2").tobytes()).decode()
        return [float(f"{x:.9g}") for x in array.ravel()]  # nine digits hold a float32 exactly

    return EmbedResponse(
        count=len(generation.embeddings),
        CLIP_embeddings=[written(_array(e.clip, wanted.normalize)) for e in generation.embeddings],
        vae_emb=[written(_array(e.vae)) for e in generation.embeddings],
        CLIP_shape=list(first.clip.shape),
        vae_shape=list(first.vae.shape),
        encoding=wanted.encoding,
        normalized=wanted.normalize,
        ran=generation.ran,
    )


def seed_json(generation: Generation, wanted: EmbedRequest) -> bytes:
    """The same, but for a single picture the vectors themselves."""
    content = answer(generation, wanted).model_dump()
    if content["count"] == 1:
        content |= {name: content[name][0] for name in ("CLIP_embeddings", "vae_emb")}
    return json.dumps(content).encode()


def npy(generation: Generation, wanted: EmbedRequest) -> bytes:
    """A NumPy file: an array with a row for each picture and the fields CLIP_embeddings and vae_emb, float16."""

    def row(embedding: Embedding) -> tuple[Any, Any]:
        return _array(embedding.clip, wanted.normalize), _array(embedding.vae)

    first = generation.embeddings[0]
    fields = np.dtype([("CLIP_embeddings", "<f2", first.clip.shape), ("vae_emb", "<f2", first.vae.shape)])
    out = io.BytesIO()
    np.save(out, np.array([row(e) for e in generation.embeddings], fields), allow_pickle=False)
    return out.getvalue()
