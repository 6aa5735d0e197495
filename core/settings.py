"""Every setting: configuration.yaml, overridden by the environment, with secrets from `.env`.

`EASEL_CONFIGURATION` names another file; `EASEL_QUEUE__LIMIT=8` overrides one value. The seed's
variables (API_KEY, ADMIN_API_KEY, HF_TOKEN, CIVIT_KEY) keep their names and never stand in the YAML file;
each may be in a file that API_KEY_FILE and the like name.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from core.model_settings import Animation, Count, Models, Queue, Runner, Seconds, Section, UniDiffuser

ROOT = Path(__file__).resolve().parent.parent
NudeNetCategory = Literal[
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED", "BUTTOCKS_COVERED",
]  # fmt: skip


def _yaml_word(value: object) -> object:
    """YAML 1.1 reads a bare off as false and a bare on as true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class Server(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    grace_s: Seconds = 60
    connections: Count = 4096
    patience_s: Seconds = 20
    least_rate: Count = 2048
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False


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


class Metadata(Section):
    embed: bool = True


class Links(Section):
    """Pictures that are answered as URLs: how long they are kept (in memory), and how many bytes of them."""

    retention_s: Seconds = 3600
    bytes: Count = 256 * 1024 * 1024


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


def _driver_is_there(url: str) -> str:
    if url.startswith("postgresql") and find_spec("psycopg") is None:
        raise ValueError("PostgreSQL needs a package: pip install 'psycopg[binary]>=3.3,<4'")
    return url


class Usage(Section):
    """The usage log: an SQLite file beside the configuration, null for none; or a PostgreSQL that several entries share."""

    path: Path | None = Path("usage.sqlite3")
    store: Annotated[str, Field(pattern=r"^postgresql\+psycopg://.+$"), AfterValidator(_driver_is_there)] | None = None


class Jobs(Section):
    """Where jobs are kept (an SQLite file beside the configuration, or a PostgreSQL that several entries share), and for
    how long; how many a process does at once, how often one is tried, and when a process counts as dead."""

    store: Annotated[str, Field(pattern=r"^(sqlite:///.+|postgresql\+psycopg://.+)$"), AfterValidator(_driver_is_there)] = "sqlite:///jobs.sqlite3"
    retention_s: Seconds = 24 * 3600
    at_once: Count = 16
    attempts: Count = 3
    lease_s: Seconds = 15


class WebhookSettings(Section):
    """Where jobs' webhooks may go, and how often one is tried."""

    allowed_hosts: list[str] = ["*"]
    allowed_schemes: list[Literal["https", "http"]] = ["https"]
    allow_private_hosts: list[str] = []
    attempts: Count = 8
    retry_wait_s: Seconds = 1
    max_wait_s: Seconds = 60
    timeout_s: Seconds = 10


class Quota(Section):
    """The limits of a key; null for none. `concurrent`: generations at once, those that wait included.
    `pixel_steps`: width x height x steps of all pictures of a request."""

    requests_per_minute: Count | None = None
    pictures_per_day: Count | None = None
    concurrent: Count | None = None
    pixel_steps: Count | None = None


class QuotaSettings(Quota):
    """The limits of user keys, those of single keys by their hash, and where they are counted."""

    keys: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], Quota] = {}
    storage: Annotated[str, Field(pattern=r"^(memory://$|redis://|rediss://|memcached://|mongodb://)")] = "memory://"


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
    links: Links = Links()
    models: Models = Models(allow_unlisted=True)
    loras: Loras = Loras()
    prompts: Prompts = Prompts()
    animation: Animation = Animation()
    usage: Usage = Usage()
    jobs: Jobs = Jobs()
    webhooks: WebhookSettings = WebhookSettings()
    quotas: QuotaSettings = QuotaSettings()
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
    """Keys and tokens, from the environment, from the files that it names (API_KEY_FILE, as containers
    mount secrets) or from `.env`; never logged, never in an answer.

    Raises:
        ValueError: where a file cannot be read, or a secret is given both ways.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    api_key: SecretStr = SecretStr("")
    admin_api_key: SecretStr = SecretStr("")
    hf_token: SecretStr = SecretStr("")
    civit_key: SecretStr = SecretStr("")
    llm_api_key: SecretStr = SecretStr("")
    webhook_secret: SecretStr = SecretStr("")
    runner_key: SecretStr = SecretStr("")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls), dotenv_settings


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets in files that NAME_FILE names in the environment, less the white space around them."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        name = field_name.upper()
        path = os.environ.get(f"{name}_FILE")
        if not path:
            return None, field_name, False
        if os.environ.get(name):
            raise ValueError(f"Both {name} and {name}_FILE are set; give the secret one way.")
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"{name}_FILE: {path} cannot be read: {reason}.") from None

    def __call__(self) -> dict[str, str]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


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
