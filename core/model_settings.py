"""The settings of models: the entries of the catalogues, and what the models of a runner share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.optimising import Optimise

Family = Literal["starter", "sd15", "sd2", "sdxl", "flux", "unidiffuser", "upscaler", "sd_x4_upscaler", "latent_upscaler"]
UPSCALERS: dict[Family, int] = {"upscaler": 4, "sd_x4_upscaler": 4, "latent_upscaler": 2}  # and their usual factors
Dtype = Literal["float16", "bfloat16", "float32"]
Count = Annotated[int, Field(ge=1)]
Device = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")]
Workers = Annotated[int, Field(ge=1, le=64)] | Annotated[list[Device], Field(min_length=1)]
Addresses = Annotated[list[Annotated[str, Field(pattern=r"^https?://[^/?#@]+$")]], Field(max_length=64)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Queue(Section):
    limit: Count = 64
    per_key: Count = 32
    deadline_s: Seconds = 600
    hang_timeout_s: Seconds = 900


class Model(Section):
    """One entry of the catalogue. `source` is where the weights are if not at `id` itself: a hub
    id, a folder in diffusers' layout, or a single .safetensors file (with `config`, a folder that
    has the components' configurations). `size` is a model's usual side; of an upscaler, its tiles', and
    `scale` its factor."""

    id: str
    family: Family
    source: str | None = None
    config: str | None = None
    variant: str | None = None
    revision: str | None = None
    torch_dtype: Dtype | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] | None = None
    size: Count | None = None
    max_size: Count | None = None
    inpainting: bool = False
    prompt_tokens: Count | None = None
    scale: Annotated[int, Field(ge=1, le=16)] | None = None
    licence: str = "unknown"
    commercial_use: bool = False
    credit: str | None = None
    idle_timeout_s: Seconds | None = None
    optimise: Optimise = Optimise()

    @model_validator(mode="after")
    def optimisations_go_together(self) -> Model:
        if found := self.optimise.conflicts(self.family, single_file=bool(self.source and self.source.endswith(".safetensors"))):
            raise ValueError(f"{self.id} cannot be optimised so. {'. '.join(found)}")
        return self

    @model_validator(mode="after")
    def fits_its_family(self) -> Model:
        usual = UPSCALERS.get(self.family)
        if self.scale is not None and (usual is None or (self.family != "upscaler" and self.scale != usual)):
            raise ValueError(f"{self.id}: scale is for the family upscaler; leave it out")
        if usual is not None and self.max_size is not None:
            raise ValueError(f"{self.id}: an upscaler has no max_size; limits.upscaled_pixels holds for all")
        return self


class ControlNet(Section):
    """A ControlNet of the catalogue. `source`, `variant` and `revision` mean what they mean for a model;
    `preprocessor` is what makes its map from a picture (core.preprocessing), unless a request names another."""

    id: str
    family: Literal["starter", "sd15", "sd2", "sdxl", "flux"]
    source: str | None = None
    variant: str | None = None
    revision: str | None = None
    preprocessor: str = "none"
    licence: str = "unknown"
    commercial_use: bool = False
    credit: str | None = None


class IpAdapter(Section):
    """An IP-Adapter of the catalogue: the .safetensors file `weight_name` in `subfolder` of `source` (a
    folder or a hub id; `id` if left out), and the folder of its CLIP image encoder there."""

    id: str
    family: Literal["sd15", "sdxl"]
    source: str | None = None
    revision: str | None = None
    subfolder: str = "."
    weight_name: Annotated[str, Field(pattern=r"\.safetensors$")]
    image_encoder: str = "image_encoder"
    licence: str = "unknown"
    commercial_use: bool = False
    credit: str | None = None


class Models(Section):
    """The models of a runner, and the memory and device that they share."""

    default: str = "starter/stable-diffusion"
    allow_unlisted: bool = False
    warm_up: list[str] = []
    idle_timeout_s: Seconds = 600
    memory_budget_bytes: Count | None = None
    remembered_bytes: Annotated[int, Field(ge=0)] = 134_217_728
    max_batch: Count = 8
    device: str | None = None
    cpu_threads: Count | None = None
    compile_cache: Path = Path("compile_cache")
    catalogue: list[Model] = []
    controlnets: list[ControlNet] = []
    ip_adapters: list[IpAdapter] = []

    @model_validator(mode="after")
    def names_are_listed(self) -> Models:
        ids = [m.id for m in self.catalogue]
        beside = [net.id for net in self.controlnets] + [adapter.id for adapter in self.ip_adapters]
        if repeated := {i for listed in (ids, beside) for i in listed if listed.count(i) > 1}:
            raise ValueError(f"the catalogue lists {', '.join(sorted(repeated))} more than once")
        if not self.allow_unlisted:
            for name in [self.default, *self.warm_up]:
                if name not in ids:
                    raise ValueError(f"{name!r} is not in the catalogue ({', '.join(ids) or 'which is empty'})")
        if any(m.id == self.default and m.family in UPSCALERS for m in self.catalogue):
            raise ValueError(f"the default model {self.default!r} is an upscaler, which draws nothing by itself")
        return self

    @model_validator(mode="after")
    def families_are_this_runners(self) -> Models:
        multimodal = isinstance(self, UniDiffuser)
        if strange := [m.id for m in self.catalogue if (m.family == "unidiffuser") != multimodal]:
            raise ValueError(f"the catalogue cannot hold {', '.join(strange)}: models of the family unidiffuser stand in unidiffuser.catalogue, all others in models.catalogue")
        if multimodal and (self.controlnets or self.ip_adapters):
            raise ValueError("unidiffuser takes no controlnets or ip_adapters; they stand under models")
        return self


    def needs(self, gpus: int) -> list[str]:
        """What the catalogue's optimisations need that a worker with so many GPUs, or this installation, does not have."""
        return [f"{model.id}: {missing}" for model in self.catalogue for missing in model.optimise.missing(gpus)]


class MotionAdapter(Section):
    """An AnimateDiff motion adapter for the models of a family; `source` as a model's, a folder in diffusers' layout or a hub id."""

    id: str
    family: Literal["starter", "sd15", "sd2"] = "sd15"
    source: str | None = None
    variant: str | None = None
    revision: str | None = None
    max_frames: Annotated[int, Field(ge=2)] = 32
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    licence: str = "unknown"
    commercial_use: bool = False
    credit: str | None = None


class Animation(Section):
    """Motion adapters, the first of a family being its default, and the bound of an animation: frames x width x height."""

    motion_adapters: list[MotionAdapter] = []
    max_pixels: Count = 20_000_000


class Runner(Section):
    """Where a runner runs: how many workers it has, or on which devices, and the GPUs of each, or the
    share of one. `gpu: null` takes one where each worker can have one, and a part where they share.
    `urls`: of workers that are served elsewhere, in the place of any here."""

    workers: Workers = 1
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    urls: Addresses = []


class UniDiffuser(Models):
    """The UniDiffuser runner: its models, where it runs, and its queue (null: as `queue`)."""

    default: str = "starter/unidiffuser"
    max_batch: Count = 8
    workers: Workers = 1
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    urls: Addresses = []
    queue: Queue | None = None
