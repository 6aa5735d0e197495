"""Experiments: prompts, models and settings compared on real requests. What one is, who gets which variant,
and what a request is with it.

core.catalogue asks here for every request that names an experiment; core.trials keeps what happened,
core.significance judges it, and api.experiments has the routes.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from core.plans import Assigned
from core.problems import FieldError, Problem, from_validation, invalid, problem
from core.requests import GenerationRequest

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
# What a variant may not set: whose request it is and what becomes of its answer.
RESERVED = {"prompt", "experiment", "subject", "seed", "count_returned", "format", "quality", "commercial", "deadline_s"}
_SETTABLE = sorted(GenerationRequest.model_fields.keys() - RESERVED)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class Variant(_Message):
    """One way to draw. `prompt` is a template, in which `{prompt}` stands for the caller's; `settings` are
    parameters of a request by their names."""

    name: Name
    weight: float = Field(1, gt=0, le=1_000_000, allow_inf_nan=False, description="Its share of the subjects, relative to the others'.")
    prompt: str | None = Field(None, max_length=5000, description="A template with `{prompt}`; left out: the caller's prompt as it is.")
    settings: dict[str, Any] = Field(default_factory=dict, max_length=30, description="Model, scheduler and any other setting, by the names of a request's parameters.")

    @field_validator("prompt")
    @classmethod
    def template_has_its_place(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("must have {prompt} where the caller's prompt belongs")
        return value

    @field_validator("settings")
    @classmethod
    def settings_are_a_requests(cls, value: dict[str, Any]) -> dict[str, Any]:
        if strange := sorted(value.keys() - set(_SETTABLE)):
            raise ValueError(f"cannot set {', '.join(strange)[:200]}; it can set {', '.join(_SETTABLE)}")
        try:
            checked = GenerationRequest.model_validate({"prompt": "x", **value})
        except ValidationError as error:
            raise ValueError("; ".join(f"{e.field}: {e.message}" for e in from_validation(error, _SETTABLE).details.errors)) from None
        return {name: getattr(checked, name) for name in value}

    @property
    def sets(self) -> set[str]:
        return set(self.settings) | ({"prompt"} if self.prompt else set())


class Metric(_Message):
    """What is reported of a subject: something that happened or not, or a number."""

    name: Name
    kind: Literal["boolean", "numeric"]
    missing_is_false: bool = Field(False, description="boolean: a subject without a report counts as false; left out, it does not count.")

    @model_validator(mode="after")
    def numbers_have_no_default(self) -> Metric:
        if self.missing_is_false and self.kind == "numeric":
            raise ValueError("missing_is_false is for boolean metrics")
        return self


class Definition(_Message):
    """An experiment, as an admin makes it. The first variant is the control."""

    id: Name
    description: str = Field("", max_length=2000)
    variants: list[Variant] = Field(min_length=2, max_length=20)
    metrics: list[Metric] = Field(min_length=1, max_length=20)

    @model_validator(mode="after")
    def names_are_of_one(self) -> Definition:
        for kind, names in (("variants", [v.name for v in self.variants]), ("metrics", [m.name for m in self.metrics])):
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind} have the same name")
        return self

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def assign(self, subject: str) -> Variant:
        """The variant of a subject: always the same, and for another experiment drawn anew. The hash is
        a number in [0, 1), cut by the weights in their order."""
        digest = hashlib.sha256(f"{self.id}\n{subject}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64 * sum(v.weight for v in self.variants)
        for variant in self.variants:
            place -= variant.weight
            if place < 0:
                return variant
        return self.variants[-1]  # where the weights' sum was rounded


def subject_key(experiment: str, subject: str | None, client: str) -> str:
    """What stands for a subject in the store: a hash, different in every experiment. Without a subject
    it is the API key's, which no named subject can be."""
    whose = f"key {client}" if subject is None else f"subject {subject}"
    return hashlib.sha256(f"{experiment}\n{whose}".encode()).hexdigest()[:32]


def applied(request: GenerationRequest, definition: Definition, client: str, kept: str | None, counts: bool) -> tuple[GenerationRequest, Assigned]:
    """The request as the subject's variant has it, and which that is.

    Args:
        kept: the variant that a stopped experiment goes on with, for everyone.
        counts: whether the experiment still runs.

    Raises:
        Problem: 422 for a field that any of the variants sets, whichever this subject has: it would say two things.
    """
    decided = set.union(*(v.sets for v in definition.variants)) - {"prompt"}
    given = [name for name in sorted(request.model_fields_set & decided) if getattr(request, name) is not None]
    if given:
        raise invalid([FieldError(field=name, message=f"is set by the experiment {definition.id}", allowed="leave it out", given=str(getattr(request, name))[:80]) for name in given])
    key = subject_key(definition.id, request.subject, client)
    variant = definition.variant(kept) if kept else definition.assign(key)
    prompt = variant.prompt.replace("{prompt}", request.prompt) if variant.prompt else request.prompt
    try:
        changed = type(request).model_validate({**request.model_dump(exclude_unset=True), **variant.settings, "prompt": prompt})
    except ValidationError as error:  # what was right when the experiment was made, or a prompt that its template makes too long
        raise from_validation(error, type(request).model_fields) from None
    return changed, Assigned(experiment=definition.id, variant=variant.name, subject=key, counts=counts)


def stopped(experiment: str) -> Problem:
    return problem(409, "experiment-stopped", "Experiment stopped", f"The experiment {experiment} has been stopped; leave out `experiment`.")
