"""A/B experiments: over HTTP from making one to its results; who gets what; and the statistics, against published
numbers."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from core import multimodal, significance
from core.catalogue import Catalogue
from core.experiments import Definition, Metric, subject_key
from core.model_settings import Models, UniDiffuser
from core.multimodal import PromptToImageRequest
from core.problems import Problem
from core.requests import GenerationRequest
from core.settings import Experiments, Settings
from core.trials import Counts, Trials
from tests.conftest import ADMIN, serving
from tests.test_http import picture, problem

DEFINITION = {
    "id": "styles",
    "variants": [
        {"name": "plain", "settings": {"num_inference_steps": 2, "scheduler": "Euler"}},
        {"name": "shiny", "prompt": "{prompt}, shiny", "settings": {"num_inference_steps": 3, "scheduler": "DDIM"}},
    ],
    "metrics": [{"name": "liked", "kind": "boolean"}, {"name": "seconds", "kind": "numeric"}],
}


@pytest.mark.http
def test_an_experiment_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    with serving(tmp_path, {"models": {"cpu_threads": 1}}, "service:StableDiffusion") as server:

        def draw(key: str = "your-api-key", **values: object):
            return server.post("/post_config", key=key, params={"prompt": "red apple", "seed": 1, "experiment": "styles", **values})

        def report(**values: object):
            return server.post("/experiments/styles/outcomes", json=values)

        def results() -> dict:
            return server.get("/admin/experiments/styles", key=ADMIN).json()

        # Made by an admin, once, and only where it can run.
        assert problem(draw(), 422)["errors"][0]["field"] == "experiment"
        problem(server.post("/admin/experiments", json=DEFINITION), 403)
        made = server.post("/admin/experiments", key=ADMIN, json=DEFINITION)
        assert (made.status_code, made.headers["location"]) == (201, "/admin/experiments/styles")
        problem(server.post("/admin/experiments", key=ADMIN, json=DEFINITION), 409)
        wrong = {**DEFINITION, "id": "b", "variants": [{"name": "a"}, {"name": "b", "settings": {"model_id": "no/model", "width": 7}}]}
        assert "width" in problem(server.post("/admin/experiments", key=ADMIN, json=wrong), 422)["detail"]
        wrong["variants"] = [{"name": "a"}, {"name": "b", "settings": {"model_id": "no/model"}}]
        assert problem(server.post("/admin/experiments", key=ADMIN, json=wrong), 422)["errors"][0]["field"] == "variants.1.settings.model_id"
        assert [e["definition"]["id"] for e in server.get("/admin/experiments", key=ADMIN).json()] == ["styles"]

        # A subject keeps its variant, which decides prompt and settings, and is told in header, metadata and JSON.
        expected = {"plain": ("2", "Euler", "red apple"), "shiny": ("3", "DDIM", "red apple, shiny")}
        subjects = {variant: next(s for s in map(str, range(100)) if _variant(s) == variant) for variant in expected}
        for variant, subject in subjects.items():
            for _ in range(2):
                answer = draw(subject=subject)
                assert answer.headers["x-easel-experiment"] == f"styles; variant={variant}"
            record = json.loads(picture(answer).info["easel"])
            assert (record["experiment"], record["variant"]) == ("styles", variant)
            assert (answer.headers["x-easel-steps"], answer.headers["x-easel-scheduler"], record["prompt"]) == expected[variant]
        typed = server.post("/txt2img", json={"prompt": "x", "experiment": "styles"}).json()  # the key is the subject
        assert typed["ran"]["variant"] in expected
        assert "x-easel-experiment" not in server.post("/post_config", params={"prompt": "x", "num_inference_steps": 1}).headers
        for field, value in (("scheduler", "Euler"), ("num_inference_steps", 5)):
            assert problem(draw(**{field: value}), 422)["errors"][0]["field"] == field
        assert problem(server.post("/post_config", params={"prompt": "x", "subject": "s"}), 422)["errors"][0]["field"] == "subject"

        # Outcomes: of those who were assigned, one for each metric.
        like = {"subject": subjects["shiny"], "metric": "liked", "value": True}
        assert [report(**like, **{}).json()["recorded"] for _ in range(2)] == ["new", "same"]
        assert report(**{**like, "value": False}).json()["recorded"] == "replaced"
        assert report(**like).json()["recorded"] == "replaced"
        assert report(subject=subjects["plain"], metric="liked", value=False).json()["recorded"] == "new"
        assert report(metric="seconds", value=2.5).json()["recorded"] == "new"
        assert problem(report(**{**like, "subject": "nobody"}), 409)["type"].endswith(":not-assigned")
        for bad in ({"value": 1}, {"value": "true"}, {"metric": "likes"}, {"metric": "seconds"}, {"subject": ""}, {"value": 1e300}):
            problem(report(**{**like, **bad}), 422)
        problem(server.post("/experiments/none/outcomes", json=like), 404)

        # Results.
        problem(server.get("/admin/experiments/styles"), 403)
        found = results()
        counts = {v["variant"]["name"]: v["counts"] for v in found["variants"]}
        assert sum(c["subjects"] for c in counts.values()) == 3
        assert sum(c["requests"] for c in counts.values()) == 5
        liked = found["metrics"][0]
        assert {name: (e["n"], e["true"]) for name, e in liked["estimates"].items()} == {"plain": (1, 0), "shiny": (1, 1)}
        assert liked["comparisons"][0] | {"interval": None} == {"variant": "shiny", "difference": 1.0, "interval": None, "test": "Fisher's exact", "p": 1.0, "p_adjusted": 1.0}

        # The end: everyone gets the variant that is kept, and no one is counted; without one it is refused.
        assert server.post("/admin/experiments/styles/stop", key=ADMIN, json={"keep": "shiny"}).json()["kept"] == "shiny"
        assert draw(subject=subjects["plain"]).headers["x-easel-experiment"] == "styles; variant=shiny"
        assert {v["variant"]["name"]: v["counts"] for v in results()["variants"]} == counts
        assert server.post("/admin/experiments/styles/stop", key=ADMIN).json()["kept"] is None
        assert problem(draw(), 409)["type"].endswith(":experiment-stopped")
        assert report(**{**like, "value": False}).json()["recorded"] == "replaced"


def _variant(subject: str) -> str:
    return Definition.model_validate(DEFINITION).assign(subject_key("styles", subject, "")).name


# Who gets what.


def test_subjects_are_spread_by_the_weights_and_anew_in_each_experiment() -> None:
    weighted = Definition.model_validate({**DEFINITION, "variants": [{"name": "a", "weight": 3}, {"name": "b", "weight": 1}, {"name": "c", "weight": 4}]})
    other = weighted.model_copy(update={"id": "other"})
    keys = [(subject_key("styles", str(i), "k"), subject_key("other", str(i), "k")) for i in range(8000)]
    first, second = [weighted.assign(a).name for a, _ in keys], [other.assign(b).name for _, b in keys]
    for drawn in (first, second):
        assert {name: round(n / 1000, 1) for name, n in Counter(drawn).items()} == pytest.approx({"a": 3, "b": 1, "c": 4}, abs=0.2)
    assert first == [weighted.assign(a).name for a, _ in keys]
    alike = sum(x == y for x, y in zip(first, second, strict=True)) / 8000
    assert alike == pytest.approx((9 + 1 + 16) / 64, abs=0.03)  # as chance has it


def test_no_named_subject_is_taken_for_a_key() -> None:
    assert subject_key("e", None, "abc") != subject_key("e", "abc", "abc")
    assert subject_key("e", "s", "k1") == subject_key("e", "s", "k2")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    settings = Settings(models=Models(allow_unlisted=True), experiments=Experiments(path=tmp_path / "experiments.sqlite3"), unidiffuser=UniDiffuser(allow_unlisted=True))
    Trials(tmp_path / "experiments.sqlite3").create(Definition.model_validate(DEFINITION))
    return Catalogue(settings)


def test_a_template_takes_the_prompt_as_it_is(catalogue: Catalogue) -> None:
    shiny = next(s for s in map(str, range(100)) if _variant(s) == "shiny")
    plan = catalogue.plan(GenerationRequest(prompt="{prompt} {0} x", experiment="styles", subject=shiny), None, "k")
    assert plan.prompt == "{prompt} {0} x, shiny"
    assert plan.experiment is not None
    assert plan.experiment.subject == subject_key("styles", shiny, "k")
    other = catalogue.plan(GenerationRequest(prompt="y", num_inference_steps=3, scheduler="DDIM"), None, "k")
    assert plan.batch_key == other.batch_key


def test_unidiffusers_requests_take_part(catalogue: Catalogue) -> None:
    theirs = Catalogue(catalogue.settings, catalogue.settings.unidiffuser)
    shiny = next(s for s in map(str, range(100)) if _variant(s) == "shiny")
    plan = multimodal.plan(theirs, "generate", PromptToImageRequest(prompt="x", data_type=0, experiment="styles", subject=shiny), [], "k")
    assert (plan.prompt, plan.num_inference_steps, plan.data_type) == ("x, shiny", 3, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "Not a slug"}, {"variants": [{"name": "a"}]}, {"variants": [{"name": "a"}, {"name": "a"}]}, {"metrics": []},
        {"variants": [{"name": "a"}, {"name": "b", "prompt": "no place"}]}, {"variants": [{"name": "a"}, {"name": "b", "weight": 0}]},
        {"variants": [{"name": "a"}, {"name": "b", "settings": {"seed": 1}}]}, {"variants": [{"name": "a"}, {"name": "b", "settings": {"guidance_scale": 99}}]},
        {"variants": [{"name": "a"}, {"name": "b", "settings": {"nonsense": 1}}]}, {"metrics": [{"name": "n", "kind": "numeric", "missing_is_false": True}]},
    ],
)  # fmt: skip
def test_an_experiment_that_cannot_be_is_refused(change: dict) -> None:
    with pytest.raises(ValidationError):
        Definition.model_validate({**DEFINITION, **change})


# The file.


def test_what_happened_outlives_the_process_and_names_no_subject(tmp_path: Path, catalogue: Catalogue) -> None:
    path = tmp_path / "experiments.sqlite3"
    plans = [catalogue.plan(GenerationRequest(prompt="x", experiment="styles", subject=f"someone{i}"), None, "k") for i in range(10)]
    for plan in plans * 2:
        assert plan.experiment is not None
        Trials(path).count(plan.experiment)
    Trials(path).report("styles", plans[0].experiment.subject, "seconds", 4.0)
    definition = Trials(path).find("styles").definition
    counts = Trials(path).counts(definition)
    assert sum(c.subjects for c in counts.values()) == 10
    assert sum(c.requests for c in counts.values()) == 20
    assert list(counts) == ["plain", "shiny"]
    assert sorted(Trials(path).values(definition, definition.metrics[1]).values()) == [[], [4.0]]
    defaulting = Metric(name="liked", kind="boolean", missing_is_false=True)
    assert {name: len(v) for name, v in Trials(path).values(definition, defaulting).items()} == {name: c.subjects for name, c in counts.items()}
    assert b"someone" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert Trials(path).counts(definition.model_copy(update={"id": "other"}))["plain"] == Counts()


def test_a_file_that_cannot_be_used_is_a_503_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "broken.sqlite3"
    path.write_bytes(b"this is no database" * 500)
    with pytest.raises(Problem) as raised:
        Trials(path).all()
    assert raised.value.details.status == 503
    assert path.read_bytes() == b"this is no database" * 500
    newer = tmp_path / "newer.sqlite3"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(Problem, match="version is 99, and this Easel knows 1: use the Easel that wrote it"):
        Trials(newer).all()


# The statistics.


def compared(metric: str, *values: list[float]) -> significance.Result:
    return significance.result(Metric(name="m", kind=metric), {f"v{i}": v for i, v in enumerate(values)})


def rate(true: int, n: int) -> list[float]:
    return [1.0] * true + [0.0] * (n - true)


def test_rates_have_published_intervals() -> None:
    """Newcombe 1998: Wilson's of 81 in 263, and method 10's of 56 in 70 less 48 in 80."""
    found = compared("boolean", rate(48, 80), rate(56, 70))
    (each,) = found.comparisons
    assert (each.difference, each.interval.low, each.interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    one = compared("boolean", rate(81, 263), rate(1, 2)).estimates["v0"]
    assert (one.interval.low, one.interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_rates_are_tested_by_chi_square_or_where_few_exactly() -> None:
    many, few = compared("boolean", rate(10, 30), rate(30, 70)).comparisons[0], compared("boolean", rate(1, 4), rate(3, 4)).comparisons[0]
    assert (many.test, many.p) == ("chi-square", pytest.approx(0.3730, abs=5e-5))  # by hand: 0.7937, one degree of freedom
    assert (few.test, few.p) == ("Fisher's exact", pytest.approx(0.4857, abs=5e-5))  # Fisher's tea: 34 of 70
    assert compared("boolean", rate(0, 9), rate(0, 9)).comparisons[0].p == 1


def test_means_are_compared_by_welchs_test() -> None:
    found = compared("numeric", [1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    (each,) = found.comparisons
    assert (each.test, each.difference, each.p) == ("Welch's t", 3, pytest.approx(0.1075, abs=5e-4))  # t = 1.897 with 5.88 degrees
    assert (each.interval.low, each.interval.high) == pytest.approx((-0.888, 6.888), abs=5e-3)
    assert found.estimates["v0"].standard_deviation == pytest.approx(2.5**0.5)
    assert found.estimates["v0"].interval.high == pytest.approx(3 + 2.7764 * 2.5**0.5 / 5**0.5, abs=1e-3)


def test_several_variants_are_corrected_for() -> None:
    found = compared("boolean", rate(10, 100), rate(20, 100), rate(25, 100), rate(10, 100))
    assert found.corrected_for == 3
    for each in found.comparisons:
        assert each.p_adjusted == pytest.approx(min(1, 3 * each.p))


@pytest.mark.parametrize("values", [([], []), ([1.0], [2.0]), ([1.0], []), ([2.0, 2.0], [2.0, 2.0])])
def test_too_little_gives_no_number_instead_of_a_wrong_one(values: tuple[list[float], list[float]]) -> None:
    for kind in ("numeric", "boolean"):
        found = compared(kind, *values)
        assert "nan" not in found.model_dump_json().lower()
        assert kind == "boolean" or found.comparisons[0].p is None


def test_a_lopsided_assignment_is_told() -> None:
    assert significance.sample_ratio_p([500, 500], [1, 1]) == 1
    assert significance.sample_ratio_p([800, 200], [4, 1]) == 1
    assert significance.sample_ratio_p([550, 450], [1, 1]) < 0.002
    assert significance.sample_ratio_p([0, 0], [1, 1]) is None
