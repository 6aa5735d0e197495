"""What comes back: a runner answers a `core.plans.Plan` with a `Generation`, which says what ran."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from core.guides import Control, ImagePrompt
from core.inpainting import Inpainting
from core.plans import Animation, Expansion, Hires, Pixels, Upscale
from core.problems import ProblemDetails


class Timing(BaseModel):
    """Milliseconds a request spent in each stage."""

    queue: float = 0
    load: float = 0
    denoise: float = 0
    decode: float = 0
    safety: float = 0
    encode: float = 0


class AppliedLora(BaseModel):
    """A LoRA as it ran: the SHA-256 of the file that was read, how many of the model's layers it
    reached, and how many of its own found none (`unmatched`)."""

    name: str
    weight: float
    sha256: str
    layers: int
    unmatched: int
    commercial_use: bool
    credit: str | None


class AppliedEmbedding(BaseModel):
    """An embedding as it ran: the SHA-256 of the file that was read, and how many vectors (tokens of
    the prompt) it is."""

    name: str
    sha256: str
    vectors: int
    commercial_use: bool
    credit: str | None


class Ran(BaseModel):
    """The truth about what ran, for headers, metadata and JSON answers. `prompt` is the first picture's
    where there is an `expansion`, which has those of all. `model_sha256` is the weights
    file's; of a folder, the UNet's or transformer's. `flagged`: the seeds of the pictures that the safety
    checker replaced; None where there is no checker."""

    model_id: str
    model_sha256: str
    family: str
    scheduler: str
    schedule: str | None
    own_scheduler: bool = False  # the model's own, since none was named; by its name it might be set otherwise
    torch_dtype: str
    device: str
    num_inference_steps: int
    steps_run: int
    guidance_scale: float
    width: int
    height: int
    clip_skip: int
    loras: list[AppliedLora] = []
    embeddings: list[AppliedEmbedding] = []
    controls: list[Control] = []
    ip_adapter: ImagePrompt | None = None
    strength: float | None
    inpainting: Inpainting | None = None
    hires: Hires | None = None
    upscale: Upscale | None = None
    animation: Animation | None = None
    prompt: str
    negative_prompt: str
    expansion: Expansion | None = None
    prompt_tokens: int
    prompt_tokens_cut: int
    licence: str
    commercial_use: bool
    credit: list[str] = []
    notes: list[str]
    worker: str | None = None  # which one, where the runner has several
    degraded: str | None = None  # how it ran with less memory than usual
    # Without a type in the schema: BentoML's client cannot read a null where a list may be.
    flagged: Annotated[list[int] | None, WithJsonSchema({"description": "Seeds; null: not checked."})] = None
    experiment: str | None = None
    variant: str | None = None  # of the experiment
    libraries: dict[str, str]
    timing: Timing


class Vector(BaseModel):
    """A tensor as it travels between processes: float32, little-endian, row by row."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")
    shape: tuple[int, ...]
    data: bytes


class Embedding(BaseModel):
    """What UniDiffuser makes of a picture: `clip` (D) and `vae` (channels, height, width)."""

    clip: Vector
    vae: Vector


class Generation(BaseModel):
    """What a runner answers: pictures with their seeds (of UniDiffuser, texts and embeddings too, an
    input picture's results side by side), or the problem that stood in the way."""

    pictures: list[Pixels] = []
    texts: list[str] = []
    embeddings: list[Embedding] = []
    seeds: list[int] = []
    ran: Ran | None = None
    problem: ProblemDetails | None = None
