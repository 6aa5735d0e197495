"""Experiments over HTTP: admins make, read and stop them; callers report outcomes. Requests for pictures name
one in `experiment`. core.trials keeps them."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import JSONResponse

from api import document, reading, tasks
from core import settings, significance, trials
from core.catalogue import Catalogue
from core.experiments import Definition, Name, Variant, subject_key
from core.plans import Inputs
from core.problems import FieldError, Problem, invalid, invalid_field, nearest
from core.requests import GenerationRequest, Subject
from core.trials import Counts, Experiment, Recorded, Trials

router = APIRouter(tags=["experiments"], responses=document.refuses(503))
# What a variant's settings can be checked for before a picture is asked for: the rest depends on what is sent with it.
_CHECKED = {"model_id", "scheduler", "num_inference_steps", "guidance_scale", "width", "height", "clip_skip", "negative_prompt", "lora"}


class Stop(BaseModel):
    """How to end an experiment."""

    model_config = ConfigDict(extra="forbid")

    keep: Name | None = Field(None, description="The variant that everyone gets who still names the experiment; left out: they get a 409.")


class Outcome(BaseModel):
    """What a subject did. One for each subject and metric counts: the latest."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    metric: Name
    value: StrictBool | Annotated[float, Field(strict=True, ge=-1e12, le=1e12, allow_inf_nan=False)]
    subject: Subject | None = Field(None, description="As in the requests; left out: the API key.")


class Reported(BaseModel):
    experiment: str
    metric: str
    value: bool | float
    recorded: Recorded


class VariantResult(BaseModel):
    variant: Variant
    counts: Counts


class Results(BaseModel):
    """An experiment with its results. `sample_ratio_p`: see core.significance."""

    experiment: Experiment
    variants: list[VariantResult]
    sample_ratio_p: float | None
    metrics: list[significance.Result]
    level: float = significance.LEVEL


@router.post(
    "/admin/experiments",
    status_code=201,
    responses=document.gives("Begun.", {"application/json": Experiment}, 201, ["Location"]) | document.refuses(409),
    openapi_extra=document.takes_json(Definition),
)
async def create(request: Request) -> JSONResponse:
    """Begin an experiment (admin key). It cannot be changed afterwards."""
    definition = reading.check(Definition, await reading.read_json(request))
    _can_run(definition, request.app.state.catalogue)
    made = await asyncio.to_thread(_trials().create, definition)
    return JSONResponse(made.model_dump(mode="json"), 201, {"Location": f"/admin/experiments/{definition.id}"})


@router.get("/admin/experiments")
async def all_experiments() -> list[Experiment]:
    """Every experiment, the latest first (admin key)."""
    return await asyncio.to_thread(_trials().all)


@router.get("/admin/experiments/{id}", responses=document.refuses(404))
async def results(id: str) -> Results:
    """An experiment with its results so far (admin key)."""
    return await asyncio.to_thread(_results, _trials(), id)


@router.post("/admin/experiments/{id}/stop", responses=document.refuses(404), openapi_extra=document.takes_json(Stop, needed=False))
async def stop(id: str, request: Request) -> Experiment:
    """End the assigning (admin key). Outcomes of those who were assigned are still taken."""
    wanted = reading.check(Stop, await reading.read_json(request) if await request.body() else {})
    return await asyncio.to_thread(_trials().stop, id, wanted.keep)


@router.post("/experiments/{id}/outcomes", responses=document.refuses(404, 409), openapi_extra=document.takes_json(Outcome))
async def outcome(id: str, request: Request) -> Reported:
    """Report what a subject did with what it got."""
    wanted = reading.check(Outcome, await reading.read_json(request))
    found = await asyncio.to_thread(_trials().find, id)
    metrics = {m.name: m for m in found.definition.metrics}
    if wanted.metric not in metrics:
        raise invalid_field("metric", f"there is no metric {wanted.metric!r}{nearest(wanted.metric, metrics)}", metrics, wanted.metric)
    kind = metrics[wanted.metric].kind
    if isinstance(wanted.value, bool) != (kind == "boolean"):
        raise invalid_field("value", f"is not what {wanted.metric} takes", ["true", "false"] if kind == "boolean" else "a number", wanted.value)
    key = subject_key(id, wanted.subject, request.state.caller.id)
    recorded = await asyncio.to_thread(_trials().report, id, key, wanted.metric, float(wanted.value))
    return Reported(experiment=id, metric=wanted.metric, value=wanted.value, recorded=recorded)


def _trials() -> Trials:
    return trials.configured(settings.load())


def _results(kept: Trials, id: str) -> Results:
    found = kept.find(id)
    definition = found.definition
    counts = kept.counts(definition)
    return Results(
        experiment=found,
        variants=[VariantResult(variant=v, counts=counts[v.name]) for v in definition.variants],
        sample_ratio_p=significance.sample_ratio_p([c.subjects for c in counts.values()], [v.weight for v in definition.variants]),
        metrics=[significance.result(m, kept.values(definition, m)) for m in definition.metrics],
    )


def _can_run(definition: Definition, catalogue: Catalogue) -> None:
    """Refuse what no request could be drawn with.

    Raises:
        Problem: 422 that names each variant's settings.
    """
    errors: list[FieldError] = []
    for i, variant in enumerate(definition.variants):
        unidiffuser = tasks.catalogue("UniDiffuser")
        theirs = unidiffuser if variant.settings.get("model_id") in unidiffuser.entries else catalogue
        prompt = variant.prompt.replace("{prompt}", "x") if variant.prompt else "x"
        try:
            theirs.plan(GenerationRequest.model_validate({**variant.settings, "prompt": prompt}), Inputs(), "experiment")
        except Problem as found:
            field = f"variants.{i}.settings"
            errors += [e.model_copy(update={"field": f"{field}.{e.field}"}) for e in found.details.errors if e.field in variant.settings and e.field in _CHECKED]
            errors += [e.model_copy(update={"field": f"variants.{i}.prompt"}) for e in found.details.errors if e.field == "prompt"]
    if errors:
        raise invalid(errors)
