"""What a request for pictures is: every HTTP contract is translated into one `GenerationRequest`,
which core.catalogue checks against its model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from core.guides import GuideFields
from core.inpainting import InpaintingFields
from core.model_settings import Dtype

MAX_SEED = 2**53 - 1  # the largest that JSON readers hold exactly
ImageFormat = Literal["png", "jpeg", "webp"]


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
