"""Every setting: configuration.yaml, overridden by the environment, with secrets from `.env`.

`EASEL_CONFIGURATION` names another file; `EASEL_QUEUE__LIMIT=8` overrides one value. The seed's
variables (API_KEY, ADMIN_API_KEY, HF_TOKEN, CIVIT_KEY) keep their names and never stand in the YAML file.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from core.optimising import Optimise

ROOT = Path(__file__).resolve().parent.parent

Family = Literal["starter", "sd15", "sd2", "sdxl", "flux", "unidiffuser", "upscaler", "sd_x4_upscaler", "latent_upscaler"]
UPSCALERS: dict[Family, int] = {"upscaler": 4, "sd_x4_upscaler": 4, "latent_upscaler": 2}  # and their usual factors
Dtype = Literal["float16", "bfloat16", "float32"]
NudeNetCategory = Literal[
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED", "BUTTOCKS_COVERED",
]  # fmt: skip
Count = Annotated[int, Field(ge=1)]
Device = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")]
Workers = Annotated[int, Field(ge=1, le=64)] | Annotated[list[Device], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _yaml_word(value: object) -> object:
    """YAML 1.1 reads a bare off as false and a bare on as true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    grace_s: Seconds = 60


class Auth(Section):
    mode: Annotated[Literal["keys", "off"], BeforeValidator(_yaml_word)] = "keys"
    public_docs: bool = False
    public_metrics: bool = False


class Limits(Section):
    body_bytes: Count = 24 * 1024 * 1024
    image_bytes: Count = 20 * 1024 * 1024
    image_pixels: Count = 50_000_000
    prompt_characters: Count = 10_000
    num_inference_steps: Count = 150
    count_returned: Count = 16
    images: Count = 16
    upscaled_pixels: Count = 4096 * 4096
    loras: Count = 8


class Queue(Section):
    limit: Count = 64
    per_key: Count = 32
    deadline_s: Seconds = 600


class Metadata(Section):
    embed: bool = True


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
    max_batch: Count = 4
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


class Loras(Section):
    """The LoRA registry and the folder of downloaded weights; relative paths are beside the configuration."""

    registry: Path = Path("lora_list.json")
    folder: Path = Path("loras")
    memory_budget_bytes: Count = 2 * 1024**3
    civitai_url: str = "https://civitai.com"
    hub_url: str = "https://huggingface.co"
    allowed_hosts: list[str] = ["civitai.com", "*.civitai.com", "civitai-*.r2.cloudflarestorage.com", "huggingface.co", "*.huggingface.co", "*.hf.co"]
    allowed_schemes: list[Literal["https", "http"]] = ["https"]
    allow_private_hosts: list[str] = []
    max_bytes: Count = 4 * 1024**3
    connect_timeout_s: Seconds = 10
    stall_timeout_s: Seconds = 30
    deadline_s: Seconds = 6 * 3600
    attempts: Count = 5
    retry_wait_s: Seconds = 1
    max_wait_s: Seconds = 120
    concurrent_downloads: Count = 2


class Prompts(Section):
    """Styles and wildcards: a CSV file and a folder beside the configuration; null for none."""

    styles: Path | None = Path("styles.csv")
    wildcards: Path | None = Path("wildcards")


class Usage(Section):
    """The usage log: an SQLite file beside the configuration; null for none."""

    path: Path | None = Path("usage.sqlite3")


class Experiments(Section):
    """What happens in experiments: an SQLite file beside the configuration; null for none."""

    path: Path | None = Path("experiments.sqlite3")


class Llm(Section):
    """The language model that helps with prompts; without `url` there is none."""

    kind: Literal["openai", "legacy"] = "openai"
    url: str | None = None
    model: str | None = None
    system_prompt: str = (
        "You help people write prompts for an image generator. Rewrite what they send as one vivid prompt: subject, setting, style, light, composition. "
        "Answer with the prompt alone, in English, in at most 60 words."
    )
    max_tokens: Count | None = 512
    timeout_s: Seconds = 60
    connect_timeout_s: Seconds = 10
    text_characters: Count = 4000
    answer_bytes: Count = 1024 * 1024
    concurrent_requests: Count = 8

    @model_validator(mode="after")
    def upstream_can_be_asked(self) -> Llm:
        if self.url is None:
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError("llm.url must be like https://HOST/v1, without user, query or fragment; a key is given as LLM_API_KEY")
        if self.kind == "openai" and not self.model:
            raise ValueError("llm.model must name the model of an OpenAI-compatible upstream")
        return self


class Safety(Section):
    """The safety checker, and the words that prompts may not have."""

    mode: Annotated[Literal["off", "on", "blur"], BeforeValidator(_yaml_word)] = "off"
    detector: Literal["nudenet", "stable_diffusion"] = "nudenet"
    threshold: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.25
    categories: list[NudeNetCategory] = ["FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED", "ANUS_EXPOSED"]
    source: str | None = None
    blocklist: list[str] = []
    blocklist_file: Path | None = None

    @model_validator(mode="after")
    def parts_are_there(self) -> Safety:
        if self.mode != "off" and self.detector == "nudenet":
            if find_spec("nudenet") is None:
                raise ValueError("safety.detector nudenet needs a package: pip install 'nudenet>=3.4.2,<4'")
            if not self.categories:
                raise ValueError("safety.categories is empty, so that nothing would be flagged; safety.mode: off says so plainly")
        if self.blocklist_file and not beside_configuration(self.blocklist_file).is_file():
            raise ValueError(f"safety.blocklist_file: there is no file {beside_configuration(self.blocklist_file)}")
        return self


class Runner(Section):
    """Where a runner runs: how many workers it has, or on which devices, and the GPUs of each, or the
    share of one. `gpu: null` takes one where each worker can have one, and a part where they share."""

    workers: Workers = 1
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class UniDiffuser(Models):
    """The UniDiffuser runner: its models, where it runs, and its queue (null: as `queue`)."""

    default: str = "starter/unidiffuser"
    max_batch: Count = 8
    workers: Workers = 1
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    queue: Queue | None = None


class Settings(BaseSettings):
    """The whole configuration, checked; unknown names are refused."""

    model_config = SettingsConfigDict(
        env_prefix="EASEL_", env_nested_delimiter="__", extra="forbid", frozen=True, nested_model_default_partial_update=True
    )

    server: Server = Server()
    auth: Auth = Auth()
    limits: Limits = Limits()
    queue: Queue = Queue()
    metadata: Metadata = Metadata()
    models: Models = Models(allow_unlisted=True)
    loras: Loras = Loras()
    prompts: Prompts = Prompts()
    animation: Animation = Animation()
    usage: Usage = Usage()
    experiments: Experiments = Experiments()
    llm: Llm = Llm()
    safety: Safety = Safety()
    stable_diffusion: Runner = Runner()
    unidiffuser: UniDiffuser = UniDiffuser(allow_unlisted=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = configuration_path()
        if not path.is_file():
            raise FileNotFoundError(f"no configuration at {path}; EASEL_CONFIGURATION names it")
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, path)


class Secrets(BaseSettings):
    """Keys and tokens, from the environment or `.env`; never logged, never in an answer."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    api_key: SecretStr = SecretStr("")
    admin_api_key: SecretStr = SecretStr("")
    hf_token: SecretStr = SecretStr("")
    civit_key: SecretStr = SecretStr("")
    llm_api_key: SecretStr = SecretStr("")


def configuration_path() -> Path:
    return Path(os.environ.get("EASEL_CONFIGURATION", ROOT / "configuration.yaml"))


def beside_configuration(path: Path) -> Path:
    """Where a relative path of the settings leads."""
    return configuration_path().parent / path


@lru_cache(maxsize=1)
def load() -> Settings:
    """The settings of this process, read once."""
    return Settings()


@lru_cache(maxsize=1)
def secrets() -> Secrets:
    """The secrets of this process: `.env` beside the configuration, under the environment."""
    return Secrets(_env_file=configuration_path().parent / ".env")
