"""What can be asked of UniDiffuser beside pictures from a prompt: captions, embeddings, and the joint
and marginal modes. api.multimodal reads these requests; `plan` makes them into what a runner runs.

Source of the modes: Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal
Diffusion at Scale" (https://arxiv.org/abs/2303.06555).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.catalogue import Catalogue
from core.model_settings import Dtype
from core.plans import Pixels, Plan, Task
from core.requests import Format, GenerationRequest, Precision, Sampling, Text, usual_dtype_name

Guidance = Annotated[float | None, Field(ge=0, le=30, allow_inf_nan=False, description="Classifier-free guidance; 1 or less: none.")]


class DataTyped(BaseModel):
    """UniDiffuser v1's own argument: 1 for the weights' way with its makers' non-public data, 0 otherwise (by
    diffusers' documentation of UniDiffuserModel). A precision's name here means torch_dtype."""

    data_type: Literal[0, 1] = Field(1, description="UniDiffuser v1: 1 as trained on non-public data, 0 otherwise. A precision's name is taken as torch_dtype.")

    @model_validator(mode="before")
    @classmethod
    def precision_is_torch_dtype(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = values.get("data_type")
        if isinstance(given, str) and given.strip() in ("0", "1"):
            return {**values, "data_type": int(given)}
        if isinstance(given, str) and "torch_dtype" not in values:
            name = usual_dtype_name(given)
            if name in get_args(Dtype):
                return {"torch_dtype": name, **{k: v for k, v in values.items() if k != "data_type"}}
        return values


class PromptToImageRequest(DataTyped, GenerationRequest):
    """A picture from a prompt."""


class CaptionRequest(DataTyped, Sampling):
    """Captions of pictures; each picture gets `count_returned` of them."""

    guidance_scale: Guidance = None


class PicturesRequest(DataTyped, Sampling):
    """Pictures without a prompt (the marginal mode "image")."""

    format: Format = Field("png", description="The pictures' file format.")
    quality: int = Field(90, ge=1, le=100, description="For jpeg and webp.")


class JointRequest(PicturesRequest):
    """Pictures with their texts (the joint mode), and pictures like a given one (image variation)."""

    guidance_scale: Guidance = None


class TextsRequest(DataTyped, Sampling):
    """Texts without a picture (the marginal mode "text")."""


class TextVariationRequest(TextsRequest):
    """Texts like a given one: what UniDiffuser says of the picture that it draws of it."""

    prompt: Text = Field(min_length=1, description="The text to vary.")
    guidance_scale: Guidance = None


class EmbedRequest(BaseModel):
    """Embeddings of pictures."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    model_id: str | None = Field(None, max_length=300, description="A model of the catalogue; see GET /capabilities.")
    torch_dtype: Precision | None = Field(None, description="Precision; the family's default if left out.")
    normalize: bool = Field(False, description="Scale CLIP_embeddings to unit length, as for cosine similarity.")
    encoding: Literal["float", "base64"] = Field("float", description="JSON: lists of numbers, or base64 of little-endian float16.")
    deadline_s: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False, description="Give up after so many seconds.")


def plan(catalogue: Catalogue, task: Task, request: Sampling | EmbedRequest, images: list[Pixels], client: str) -> Plan:
    """Check a request of any task against its model and the limits, and fill in every default.

    Args:
        catalogue: UniDiffuser's.
        task: what to do with it.
        request: the task's request, as above.
        images: input pictures of caption, embed and image_variation, squares of the model's size.
        client: who asks, for fairness between keys.

    Raises:
        Problem: 422 that lists every field that cannot be honoured.
    """
    # Catalogue.plan has the checks of all tasks; what this one's request does not have stays at its default.
    known = {name: getattr(request, name) for name in type(request).model_fields if name in GenerationRequest.model_fields}
    full = request if isinstance(request, GenerationRequest) else GenerationRequest.model_construct(**{"prompt": "", **known})
    made = catalogue.plan(full, None, client)
    return made.model_copy(update={"task": task, "images": images, "data_type": getattr(request, "data_type", 1)})
