"""Parameters: what is checked, what the answer says, and what the defaults become."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api import reading
from core import schedulers
from core.catalogue import Catalogue
from core.model_settings import Model, Models
from core.plans import Inputs, Pixels, Plan
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Settings

FAMILIES = ("starter", "sd15", "sd2", "sdxl", "flux")
SETTINGS = Settings(models=Models(default="starter", catalogue=[Model(id=f, family=f) for f in FAMILIES]))
CATALOGUE = Catalogue(SETTINGS)
PICTURE = Pixels(width=300, height=150, data=bytes(300 * 150 * 3))


def plan(image: Pixels | None = None, **values: object) -> Plan:
    return CATALOGUE.plan(reading.parse({"prompt": "x", **values}), Inputs(image=image), "me")


def refusal(image: Pixels | None = None, **values: object) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        plan(image, **values)
    assert caught.value.details.status == 422
    return {e.field: f"{e.message}; {e.allowed}" for e in caught.value.details.errors}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", "   "), ("prompt", "x" * 100_000), ("prompt", "a\x00b"), ("prompt", "a\x1bb"), ("prompt", None), ("prompt", 5),
        ("guidance_scale", "nan"), ("guidance_scale", "inf"), ("guidance_scale", -1), ("guidance_scale", float("nan")), ("guidance_scale", 1e9),
        ("num_inference_steps", 0), ("num_inference_steps", -5), ("num_inference_steps", 10**9), ("num_inference_steps", "many"), ("num_inference_steps", 2.5),
        ("width", 65), ("width", -64), ("width", 100_000), ("width", "wide"), ("height", 0), ("height", 16),
        ("count_returned", 0), ("count_returned", 10_000), ("seed", -2), ("seed", 2**60), ("seed", "random"),
        ("strength", 0.5), ("strength", 7), ("scheduler", "Eulr"), ("torch_dtype", "int8"), ("format", "bmp"), ("quality", 0), ("quality", 101),
        ("seed", True), ("guidance_scale", False), ("prompt", "not \ufffd utf-8"),
        ("clip_skip", 50), ("model_id", "starte"), ("deadline_s", 0), ("deadline_s", "nan"), ("lora", "no_such_lora"), ("lora", ""), ("lora_scale", 1), ("lora_scale", "nan"), ("lora_triggers", "maybe"), ("commercial", "perhaps"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_field_name(field: str, value: object) -> None:
    assert list(refusal(**{field: value})) == [field]


def test_unknown_names_are_refused_with_the_nearest_known_one() -> None:
    assert "did you mean 'guidance_scale'" in refusal(guidence_scale=7)["guidence_scale"]
    assert "did you mean 'Euler'" in refusal(scheduler="Eulr")["scheduler"].replace("'euler'", "'Euler'")
    assert "starter" in refusal(model_id="starte")["model_id"]


def test_every_wrong_field_is_named_at_once() -> None:
    assert set(refusal(width=65, num_inference_steps=1000, count_returned=99)) == {"width", "num_inference_steps", "count_returned"}


def test_what_a_model_cannot_honour_is_refused() -> None:
    assert set(refusal(model_id="flux", negative_prompt="blue", clip_skip=2)) == {"negative_prompt", "clip_skip"}
    assert "flow-matching" in refusal(model_id="flux", scheduler="DPM++ SDE")["scheduler"]
    assert "steps leaves none" in refusal(PICTURE, num_inference_steps=2, strength=0.2)["strength"]


def test_defaults_come_from_the_family() -> None:
    sizes = {f: plan(model_id=f) for f in FAMILIES}
    assert [(p.width, p.num_inference_steps) for p in sizes.values()] == [(64, 25), (512, 30), (768, 30), (1024, 30), (1024, 28)]
    assert sizes["flux"].guidance_scale == 3.5


def test_an_input_pictures_shape_is_kept_at_the_models_area() -> None:
    made = plan(PICTURE, model_id="sd15")
    assert (made.width, made.height) == (728, 360)
    assert made.strength == 0.75


def test_seeds_count_up_and_are_random_when_left_out() -> None:
    assert plan(seed=5, count_returned=3).seeds == [5, 6, 7]
    assert plan().seeds != plan().seeds
    assert plan(seed=-1).seeds[0] >= 0


def test_dtype_names_of_torch_and_short_ones_are_taken() -> None:
    assert [plan(torch_dtype=n).torch_dtype for n in ("torch.float16", "fp16", "bf16", "float32")] == ["float16", "float16", "bfloat16", "float32"]


@pytest.mark.parametrize(
    ("name", "class_name", "schedule"),
    [
        ("Euler", "EulerDiscreteScheduler", None), ("Euler a", "EulerAncestralDiscreteScheduler", None), ("euler_ancestral", "EulerAncestralDiscreteScheduler", None),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", "Karras"), ("dpmpp_2m", "DPMSolverMultistepScheduler", None), ("dpmpp_2m_sde_karras", "DPMSolverMultistepScheduler", "Karras"),
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler", None), ("DPMSolverMultistep", "DPMSolverMultistepScheduler", None),
        ("DDIM", "DDIMScheduler", None), ("UniPC", "UniPCMultistepScheduler", None), ("LCM", "LCMScheduler", None), ("PLMS", "PNDMScheduler", None),
        ("heun", "HeunDiscreteScheduler", None), ("LMS Karras", "LMSDiscreteScheduler", "Karras"), ("DPM++ SDE", "DPMSolverSinglestepScheduler", None),
        ("DPM2 a", "KDPM2AncestralDiscreteScheduler", None), ("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler", None),
        ("Euler A", "EulerAncestralDiscreteScheduler", None), ("DPM++ 3M SDE Exponential", "DPMSolverMultistepScheduler", "Exponential"), ("dpmpp_3m_sde_gpu", "DPMSolverMultistepScheduler", None),
        ("euler sgm_uniform", "EulerDiscreteScheduler", "SGM Uniform"), ("Euler Simple", "EulerDiscreteScheduler", "Simple"), ("Euler Normal", "EulerDiscreteScheduler", "Uniform"),
        ("dpmpp_2m ddim_uniform", "DPMSolverMultistepScheduler", "DDIM"), ("DPM++ 2M Automatic", "DPMSolverMultistepScheduler", "Karras"), ("Euler a Automatic", "EulerAncestralDiscreteScheduler", None),
        ("uni_pc_bh2", "UniPCMultistepScheduler", None), ("sa_solver", "SASolverScheduler", None), ("DDPMScheduler", "DDPMScheduler", None), ("k_dpm_2_a", "KDPM2AncestralDiscreteScheduler", None),
    ],
)  # fmt: skip
def test_scheduler_names_of_every_dialect_are_known(name: str, class_name: str, schedule: str | None) -> None:
    found = schedulers.find(name)
    assert (found.class_name, found.schedule) == (class_name, schedule)


@pytest.mark.parametrize("name", ["DPM++ 2S a", "DPM++ 2S a Karras", "dpmpp_2s_ancestral", "DPM fast", "DPM adaptive", "Restart", "ipndm", "DPMSolverSDEScheduler", "EDMEulerScheduler"])
def test_a_sampler_that_diffusers_has_not_is_refused_with_a_near_one(name: str) -> None:
    with pytest.raises(Problem, match="is the nearest") as caught:
        schedulers.find(name)
    assert "Euler a" in caught.value.details.errors[0].allowed


def test_a_class_name_means_the_class_as_it_comes() -> None:
    assert schedulers.find("DPMSolverSinglestepScheduler").name == "DPM++ 2S"
    assert schedulers.find("DPMSolverMultistepScheduler").name == "DPM++ 2M"


def test_an_unlisted_model_needs_the_setting_and_is_never_a_path() -> None:
    open_catalogue = Catalogue(Settings(models=Models(allow_unlisted=True, default="starter", catalogue=[Model(id="starter", family="starter")])))
    request = reading.parse({"prompt": "x", "model_id": "someone/dreamy-xl"})
    assert open_catalogue.find(request.model_id).model.family == "sdxl"
    for path in ("/etc/passwd", "../secret", "a/b/c", "~/models", "./x", "a/..", "plain"):
        with pytest.raises(Problem):
            open_catalogue.find(path)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*GenerationRequest.model_fields, "nonsense"]), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())), max_size=6))
def test_any_values_give_a_plan_or_a_problem(values: dict[str, object]) -> None:
    try:
        plan(**values)
    except Problem as problem:
        assert problem.details.status == 422
        assert problem.details.errors
        problem.body()


async def _read(request: Request) -> Response:
    try:
        parsed, _ = await reading.read(request, SETTINGS.limits)
    except Problem as problem:
        assert problem.details.status == 422
        return JSONResponse(sorted({error.field for error in problem.details.errors}), 422)
    return JSONResponse(parsed.model_dump(mode="json", exclude_unset=True))


TEXT = st.text(st.characters(blacklist_categories=["Cs"]) | st.sampled_from('"&=%+;\r\n\\'), max_size=30) | st.sampled_from(["null", '"', '""', '"a"', "true", "1"])
NUMBER = st.integers() | st.floats(-1e15, 1e15) | st.sampled_from([float("nan"), float("inf")])  # larger ones are written with an exponent, which is no whole number
VALUES = {
    name: TEXT if "str" in str(field.annotation) or "Literal" in str(field.annotation) else st.booleans() if "bool" in str(field.annotation) else NUMBER
    for name, field in GenerationRequest.model_fields.items() if name != "prompt" and "list" not in str(field.annotation) and "dict" not in str(field.annotation)
}  # fmt: skip
USUAL = {"seed": st.integers(-1, 2**53 - 1), "guidance_scale": st.floats(0, 30), "width": st.integers(1, 64).map(lambda n: 8 * n), "commercial": st.booleans(), "lora": st.just("a:0.5")}


def written(value: object) -> str:
    """As text: in a query, and in a form where it is no JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_form(value: object) -> str:
    """As BentoML's client writes what would else read as JSON."""
    text = written(value)
    return json.dumps(text) if text == "null" or (len(text) > 1 and text[0] == text[-1] == '"') else text


@given(st.fixed_dictionaries({"prompt": TEXT}, optional=USUAL) | st.fixed_dictionaries({"prompt": TEXT}, optional=VALUES))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=80)
def test_query_form_and_json_say_the_same(values: dict[str, object]) -> None:
    ways = [
        {"params": {name: written(value) for name, value in values.items()}},
        {"data": {name: in_form(value) for name, value in values.items()}},
        {"files": {name: (None, in_form(value).encode()) for name, value in values.items()}},
        {"content": json.dumps(values).encode(), "headers": {"Content-Type": "application/json"}},
    ]

    async def ask() -> list[tuple[int, object]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(_app), base_url="http://easel") as client:
            answers = [await client.post("/", **way) for way in ways]
        return [(answer.status_code, answer.json()) for answer in answers]

    first, *others = asyncio.run(ask())
    assert others == [first] * 3


@pytest.mark.parametrize("body", ['{"prompt": "x", ' + ", ".join(f'"guidance_scal{i}": 1' for i in range(20_000)) + "}", '{"prompt": "x", "controlnet": [' + "1," * 2_000_000 + "1]}", '{"prompt": "x", "' + "guidance_scale" * 200_000 + '": 1}', '{"prompt": "x", "controlnet": [' + "1," * 40_000 + "1]}"])
def test_very_many_errors_hold_nobody_up(body: str) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(_app), base_url="http://easel") as client:
            return await client.post("/", content=body.encode(), headers={"Content-Type": "application/json"})

    with pytest.raises(Problem) as caught:
        plan(controlnet=["a"] * 40_000)
    assert len(caught.value.details.errors) == 31
    began = time.process_time()
    answer = asyncio.run(ask())
    assert (answer.status_code, len(answer.json()) <= 31) == (422, True)
    assert time.process_time() - began < 2


_app = Starlette(routes=[Route("/", _read, methods=["POST"])])
