"""What a request for pictures is, and what comes back: the messages between api and runners.

Every HTTP contract is translated into one `GenerationRequest`; core.catalogue turns it into a
`Plan` (all defaults filled in, checked against the model); a runner answers with a `Generation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from core.guides import Control, GuideFields, ImagePrompt
from core.inpainting import Inpainting, InpaintingFields
from core.problems import ProblemDetails
from core.settings import Dtype

MAX_SEED = 2**53 - 1  # the largest that JSON readers hold exactly
ImageFormat = Literal["png", "jpeg", "webp"]
Task = Literal["generate", "caption", "embed", "joint", "image", "text", "image_variation", "text_variation"]


def usual_dtype_name(value: Any) -> Any:
    """torch's and the short names of precisions, as configuration.yaml writes them."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().removeprefix("torch.")
    return {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(name, name)


def _usual_format_name(value: Any) -> Any:
    name = value.lower() if isinstance(value, str) else value
    return "jpeg" if name == "jpg" else name


def _no_control_characters(text: str) -> str:
    if "\ufffd" in text:  # what decoders put where the bytes were no UTF-8
        raise ValueError("is not whole UTF-8 text (it has U+FFFD)")
    for character in text:
        if (ord(character) < 32 and character not in "\n\r\t") or ord(character) == 127 or 0xD800 <= ord(character) < 0xE000:
            raise ValueError(f"has the control character U+{ord(character):04X}; only tab and line breaks are allowed")
    return text


Precision = Annotated[Dtype, BeforeValidator(usual_dtype_name)]
Format = Annotated[ImageFormat, BeforeValidator(_usual_format_name)]
Text = Annotated[str, AfterValidator(_no_control_characters)]
Subject = Annotated[str, AfterValidator(_no_control_characters), Field(min_length=1, max_length=200)]


class Sampling(BaseModel):
    """What every request that samples from a model may say, by the names that diffusers gives its arguments.

    What is left out takes the model's default. Values out of range and unknown names are refused.
    """

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    model_id: str | None = Field(None, max_length=300, description="A model of the catalogue; see GET /capabilities.")
    torch_dtype: Precision | None = Field(None, description="Precision; the family's default if left out.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    count_returned: int = Field(1, ge=1, description="How many; number i has seed + i.")
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="-1 or left out: random, and told in the answer.")
    scheduler: str | None = Field(None, max_length=80, description='As diffusers or A1111 write it: "DPM++ 2M Karras".')
    deadline_s: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False, description="Give up after so many seconds.")

    @field_validator("*", mode="before")
    @classmethod
    def numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must not be true or false")
        return value


class GenerationRequest(InpaintingFields, GuideFields, Sampling):
    """A request for pictures."""

    prompt: Text = Field(min_length=1, description="What to draw. `(words:1.3)` weighs words as in A1111.")
    negative_prompt: Text = Field("", description="What to stay away from.")
    guidance_scale: float | None = Field(None, ge=0, le=30, allow_inf_nan=False, description="Classifier-free guidance.")
    width: int | None = Field(None, ge=8, le=16384, description="Pixels.")
    height: int | None = Field(None, ge=8, le=16384, description="Pixels.")
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="With an image: 0 keeps, 1 redraws. Default 0.75.")
    clip_skip: int = Field(0, ge=0, le=11, description="Last text-encoder layers to skip (A1111's number less one).")
    lora: str | None = Field(None, max_length=2000, description="LoRAs by name, with weights: `a:0.6,b:0.4`. In the prompt: `<lora:a:0.6>`.")
    lora_scale: float | None = Field(None, ge=-10, le=10, allow_inf_nan=False, description="Weight of those in `lora` that have none of their own; 1 if left out.")
    lora_triggers: Literal["off", "auto"] = Field("off", description="auto adds the LoRAs' trigger words that the prompt lacks.")
    styles: str | None = Field(None, max_length=2000, description="Styles by name, separated by commas; see GET /styles.")
    dynamic_prompts: bool = Field(False, description="true: expand `{a|b}` and `__wildcards__`, for picture i by seed + i; see GET /wildcards.")
    hr_scale: float | None = Field(None, gt=1, le=4, allow_inf_nan=False, description="Hires-fix: enlarge the picture by so much and draw it over.")
    hr_upscaler: str | None = Field(None, max_length=300, description="latent (default), lanczos, or an upscaler of the catalogue.")
    hr_steps: int | None = Field(None, ge=1, description="Steps of the second pass; as many as the first's if left out.")
    hr_strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="How much the second pass redraws (A1111's denoising strength). Default 0.7.")
    commercial: bool = Field(False, description="true: refuse unless the model and every LoRA allow commercial use.")
    format: Format = Field("png", description="The pictures' file format.")
    quality: int = Field(90, ge=1, le=100, description="For jpeg and webp.")
    experiment: str | None = Field(None, max_length=64, description="Take part in this experiment: it decides some of the settings.")
    subject: Subject | None = Field(None, description="Who takes part: the same gets the same variant. Left out: the API key.")


class Pixels(BaseModel):
    """An RGB picture as it travels between processes: 8 bits a channel, row by row."""

    model_config = ConfigDict(frozen=True)
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
    hires: Hires | None = None
    upscale: Upscale | None = None  # then the picture is enlarged, and nothing else
    task: Task = "generate"
    images: list[Pixels] = []  # for UniDiffuser: each is captioned, embedded or varied with every seed
    data_type: int = 1  # UniDiffuser's own argument, see core.multimodal
    experiment: Assigned | None = None

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
        first = self.num_inference_steps if self.strength is None else int(self.num_inference_steps * self.strength)
        return first + (self.hires.steps if self.hires else 0)

    @property
    def batch_key(self) -> str:
        """Plans with equal keys can share a batch: all but prompts, seeds and input pictures is alike."""
        own = {"id", "client", "prompt", "negative_prompt", "expansion", "embeddings", "seeds", "commercial", "image", "mask", "inpainting", "images", "control_images", "ip_adapter_images", "deadline_s", "notes", "experiment"}
        return f"{self.image is None} {self.inpainting is None} {self.model_dump_json(exclude=own)}"


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

    model_config = ConfigDict(frozen=True)
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


class ResidentLora(BaseModel):
    """A LoRA kept in memory beside its model."""

    name: str
    resident_bytes: int


class ResidentGuide(BaseModel):
    """A ControlNet or an IP-Adapter kept in memory beside its model."""

    id: str
    resident_bytes: int


class ResidentModel(BaseModel):
    """A model as /buffer_status shows it."""

    model_id: str
    family: str
    state: Literal["cold", "downloading", "loading", "warm", "failed"]
    device: str | None = None
    torch_dtype: str | None = None
    resident_bytes: int = 0
    host_bytes: int = 0  # in CPU memory, of an offloaded model
    loras: list[ResidentLora] = []
    guides: list[ResidentGuide] = []
    last_used_s_ago: float | None = None
    unload_in_s: float | None = None
    error: str | None = None


class Progress(BaseModel):
    """What the device is drawing: denoising steps done, of those expected for all batches of the
    requests that it took together; null where their number is not known before (diffusion upscalers' tiles)."""

    model_id: str
    steps_done: int
    steps: int | None


class QueueStatus(BaseModel):
    running: int
    progress: Progress | None = None
    waiting: int
    limit: int
    mean_service_s: float | None


class RunnerStatus(BaseModel):
    """A runner's answer to "how are you": its models, queue and device."""

    service: str
    ready: bool
    draining: bool
    device: str
    memory_budget_bytes: int
    resident_bytes: int
    models: list[ResidentModel]
    queue: QueueStatus


class RunnerDown(BaseModel):
    """In the place of a status: why a runner does not answer."""

    service: str
    ready: bool = False
    problem: ProblemDetails
