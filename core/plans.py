"""What a runner runs: a `Plan`, with every default decided, and the parts of one."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.guides import Control, ImagePrompt
from core.inpainting import Inpainting
from core.model_settings import Dtype

Task = Literal["generate", "caption", "embed", "joint", "image", "text", "image_variation", "text_variation"]


class Pixels(BaseModel):
    """An RGB picture as it travels between processes: 8 bits a channel, row by row."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")
    width: int
    height: int
    data: bytes


class Inputs(BaseModel):
    """The pictures that came with a request for pictures, by the names of their form parts."""

    model_config = ConfigDict(frozen=True)
    image: Pixels | None = None
    mask: Pixels | None = None
    control_image: list[Pixels] = []
    ip_adapter_image: list[Pixels] = []


class PlannedLora(BaseModel):
    """A LoRA of a plan: the file at `path` with its weight, and the rights that came with it."""

    model_config = ConfigDict(frozen=True)
    name: str
    weight: float
    path: str
    sha256: str | None
    commercial_use: bool
    credit: str | None


class PlannedEmbedding(BaseModel):
    """An embedding that a plan's prompts name: the file at `path`, and the rights that came with it."""

    model_config = ConfigDict(frozen=True)
    name: str
    path: str
    sha256: str | None
    commercial_use: bool
    credit: str | None


class Expansion(BaseModel):
    """What dynamic prompts were made of, and what became of them: a prompt for each picture."""

    model_config = ConfigDict(frozen=True)
    template: str
    negative_template: str
    prompts: list[str]
    negative_prompts: list[str]


class Assigned(BaseModel):
    """A request's part in an experiment: its variant, the hash that stands for its subject, and whether it counts."""

    model_config = ConfigDict(frozen=True)
    experiment: str
    variant: str
    subject: str
    counts: bool


def steps_run(steps: int, strength: float, flow: bool) -> int:
    """How many of a schedule of `steps` img2img runs at `strength`: diffusers rounds them up for flow models (Flux), down for the others."""
    return steps - int(steps - steps * strength) if flow else int(steps * strength)


class Hires(BaseModel):
    """A second pass over an enlarged picture: from `first` (width, height) to `width` x `height` by
    `upscaler` (latent, lanczos, or an id of the catalogue), then `steps` of img2img at `strength`."""

    model_config = ConfigDict(frozen=True)
    scale: float
    first: tuple[int, int]
    width: int
    height: int
    upscaler: str
    steps: int
    strength: float

    @property
    def model_id(self) -> str | None:
        """The upscaler, where it is a model."""
        return None if self.upscaler in ("latent", "lanczos") else self.upscaler


class Upscale(BaseModel):
    """What an upscaler does with a picture of `first` (width, height): by its own factor `scale` in tiles
    of the side `tile`, pixels. `noise_level` is the SD x4 upscaler's own."""

    model_config = ConfigDict(frozen=True)
    scale: int
    first: tuple[int, int]
    tile: int
    tiles: int
    noise_level: int | None = None


class Animation(BaseModel):
    """What makes a plan an animation's: the motion adapter, and how many frames, shown how many a second.
    `beta_schedule` is the noise that the adapter was trained with; `sha256` (once it ran) its file's."""

    model_config = ConfigDict(frozen=True)
    motion_adapter: str
    num_frames: int
    fps: float
    beta_schedule: str
    licence: str
    commercial_use: bool
    credit: str | None
    sha256: str | None = None


class Plan(BaseModel):
    """A request that can run: every value decided, except what only the device knows (dtype)."""

    model_config = ConfigDict(frozen=True)
    id: str
    client: str
    model_id: str
    prompt: str
    negative_prompt: str
    expansion: Expansion | None = None
    torch_dtype: Dtype | None
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    seeds: list[int]
    scheduler: str | None
    strength: float | None
    clip_skip: int
    loras: list[PlannedLora] = []
    embeddings: list[PlannedEmbedding] = []
    commercial: bool = False
    image: Pixels | None
    mask: Pixels | None = None
    inpainting: Inpainting | None = None
    animation: Animation | None = None
    controls: list[Control] = []
    control_images: list[Pixels] = []  # one for each of `controls`, before its preprocessor
    ip_adapter: ImagePrompt | None = None
    ip_adapter_images: list[Pixels] = []
    deadline_s: float
    notes: list[str]
    flow: bool = False  # its model's, see `steps_run`
    hires: Hires | None = None
    upscale: Upscale | None = None  # then the picture is enlarged, and nothing else
    task: Task = "generate"
    images: list[Pixels] = []  # for UniDiffuser: each is captioned, embedded or varied with every seed
    data_type: int = 1  # UniDiffuser's own argument, see core.multimodal
    experiment: Assigned | None = None
    request_id: str | None = None  # of the request that it was made for, for logs
    job_id: str | None = None  # and of its job, if it is one's

    def words(self, picture: int) -> tuple[str, str]:
        """The prompt and the negative prompt of a picture, counted from 0."""
        if self.expansion is None:
            return self.prompt, self.negative_prompt
        return self.expansion.prompts[picture], self.expansion.negative_prompts[picture]

    @property
    def models(self) -> list[str]:
        """The models that it runs, its own first."""
        return [self.model_id, *([self.hires.model_id] if self.hires and self.hires.model_id else [])]

    @property
    def rows(self) -> int:
        """How many rows of a batch it takes: each input picture of UniDiffuser's, else the prompt, with every seed."""
        return max(1, len(self.images)) * len(self.seeds)

    @property
    def steps(self) -> int:
        """Denoising steps that a batch of its pictures takes."""
        first = self.num_inference_steps if self.strength is None else steps_run(self.num_inference_steps, self.strength, self.flow)
        return first + (self.hires.steps if self.hires else 0)

    @property
    def identity(self) -> bytes:
        """Plans with equal ones ask for the very same: all is alike but ids and deadline."""
        digest = hashlib.sha256(self.model_dump_json(exclude={"id", "request_id", "job_id", "deadline_s"} | _PICTURES).encode())
        for name in sorted(_PICTURES):
            given = getattr(self, name)
            for pixels in given if isinstance(given, list) else [given] if given else []:
                digest.update(f"{name} {pixels.width}x{pixels.height}".encode())
                digest.update(pixels.data)
        return digest.digest()

    @property
    def batch_key(self) -> str:
        """Plans with equal keys can share a batch: all but prompts, seeds and input pictures is alike."""
        return f"{self.image is None} {self.inpainting is None} {self.model_dump_json(exclude=_OWN)}"

    @property
    def step_key(self) -> str:
        """Plans with equal keys can share denoising steps, whatever their LoRAs: the network that runs is the same, and the
        pictures' size is."""
        return self.model_dump_json(exclude=_OWN | _OWN_STEPS)


_PICTURES = {"image", "mask", "images", "control_images", "ip_adapter_images"}
# What may differ between plans whose pictures are one batch from the first step to the last,
_OWN = {"id", "client", "prompt", "negative_prompt", "expansion", "embeddings", "seeds", "commercial", "image", "mask", "inpainting", "images", "control_images", "ip_adapter_images", "deadline_s", "notes", "experiment", "request_id", "job_id"}
# and between those that share single steps.
_OWN_STEPS = {"num_inference_steps", "guidance_scale", "scheduler", "strength", "clip_skip", "loras"}
