"""Every family through its real diffusers pipelines: both modes, clip skip, and every scheduler it offers."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from safetensors.torch import load_file

from api import reading
from core import schedulers
from core.catalogue import Catalogue
from core.families import FAMILIES, Entry
from core.generation import Generation
from core.model_settings import Model, Models
from core.plans import Inputs, Pixels, Plan
from core.problems import Problem
from core.settings import Settings
from runners import denoise, loading, prompts
from runners.device import Device

PICTURE = Pixels(width=64, height=48, data=(bytes(range(256)) * 40)[: 64 * 48 * 3])
SMALL = ("sd15", "sd2", "sdxl", "flux")


@pytest.fixture(scope="module")
def device(miniatures: dict[str, Path]) -> Iterator[Device]:
    entries = [Model(id=f, family=f, source=str(miniatures[f])) for f in SMALL]
    before = torch.get_num_threads()
    settings = Settings(models=Models(default="sd15", catalogue=entries, cpu_threads=1))
    made = Device(settings, Catalogue(settings))
    yield made
    made.queue.close()
    torch.set_num_threads(before)


def planned(device: Device, model: str, image: Pixels | None = None, **values: object) -> Plan:
    entry = device.catalogue.find(model)
    size = {"width": entry.traits.min_size, "height": entry.traits.min_size}
    return device.catalogue.plan(reading.parse({"prompt": "a cat", "model_id": model, "seed": 1, "num_inference_steps": 4, **size, **values}), Inputs(image=image), "test")


def draw(device: Device, model: str, image: Pixels | None = None, **values: object) -> Generation:
    return device.submit(planned(device, model, image, **values), device.fetch(device.catalogue.find(model))).result(120)


@pytest.mark.parametrize("model", SMALL)
def test_text_and_picture_to_picture(device: Device, model: str) -> None:
    drawn = draw(device, model, count_returned=2)
    assert [p.width for p in drawn.pictures] == [FAMILIES[model].min_size] * 2
    assert drawn.pictures[0].data != drawn.pictures[1].data
    half = {"strength": 0.6, "scheduler": "Euler"}
    redrawn = draw(device, model, PICTURE, **half)
    assert redrawn.ran.steps_run == planned(device, model, PICTURE, **half).steps == (3 if model == "flux" else 2)
    assert draw(device, model, PICTURE, **half).pictures == redrawn.pictures


def test_the_hub_is_asked_once_and_not_at_every_request(device: Device, miniatures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes a while, even where nothing is to be downloaded."""
    entry = Entry(Model(id="someone/model", family="sd15"), FAMILIES["sd15"])
    folder, asked = tmp_path / "cached", []

    def download(*_: object, **__: object) -> str:
        asked.append([m.state for m in device.residency.snapshot([entry]) if m.model_id == entry.id])
        return str(shutil.copytree(miniatures["sd15"], folder))

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    assert [device.fetch(entry) for _ in range(3)] == [folder] * 3
    assert asked == [["downloading"]]
    assert [m.state for m in device.residency.snapshot([entry]) if m.model_id == entry.id] == ["cold"]
    shutil.rmtree(folder)
    assert device.fetch(entry) == folder
    assert len(asked) == 2


@pytest.mark.parametrize("model", SMALL)
def test_every_scheduler_on_offer_draws(device: Device, model: str) -> None:
    flow = FAMILIES[model].flow
    for image in (None, PICTURE):
        for name in schedulers.names(flow, image is not None):
            found = schedulers.find(name, flow)
            if found.schedule and found.sampler not in ("Euler", "DPM++ 2M SDE", "LMS") and (model == "sdxl" or image):
                continue  # the plain sampler and three with all their schedules stand for the others
            ran = draw(device, model, image, scheduler=name, num_inference_steps=4)
            assert len(set(ran.pictures[0].data)) > 3, (name, image is not None)
            assert f"{ran.ran.scheduler} {ran.ran.schedule or ''}".strip() == name


def test_a_flow_solver_that_cannot_start_from_a_picture_is_refused(device: Device) -> None:
    with pytest.raises(Problem, match="cannot start from a picture") as caught:
        draw(device, "flux", PICTURE, scheduler="UniPC")
    assert caught.value.details.status == 422
    assert "UniPC" not in caught.value.details.errors[0].allowed


def test_a_flow_solver_that_the_models_shift_does_not_fit_is_refused(device: Device) -> None:
    entry = device.catalogue.find("flux")
    resident = device.residency.acquire(entry, device.fetch(entry), torch.float32)
    fixed = type(resident.scheduler).from_config(resident.scheduler.config, use_dynamic_shifting=False)
    with pytest.raises(Problem, match="dynamic shifting"):
        denoise.make_scheduler(replace(resident, scheduler=fixed), "DPM++ 2M")


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PLMS", "DPM++ 2M", "DPM++ 2M SDE Heun", "UniPC"])
def test_a_named_scheduler_does_not_depend_on_the_models_own_choice(device: Device, name: str) -> None:
    entry = device.catalogue.find("sd15")
    resident = device.residency.acquire(entry, device.fetch(entry), torch.float32)
    noise = {k: resident.scheduler.config[k] for k in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    owns = [EulerDiscreteScheduler(**noise, use_karras_sigmas=True), DPMSolverMultistepScheduler(**noise, solver_order=3, solver_type="heun", use_lu_lambdas=True)]
    first, second = (denoise.make_scheduler(replace(resident, scheduler=own), name)[0] for own in owns)
    takes = set(inspect.signature(type(first).__init__).parameters)
    assert {k: v for k, v in first.config.items() if k in takes} == {k: v for k, v in second.config.items() if k in takes}
    assert "clip_sample" not in takes or not first.config.clip_sample


def test_numbers_that_overflow_are_told_and_not_drawn_black(device: Device) -> None:
    entry = device.catalogue.find("sd15")
    vae = device.residency.acquire(entry, device.fetch(entry), torch.float32).base.vae
    hook = vae.decoder.register_forward_hook(lambda _module, _args, out: out * float("nan"))
    problem = draw(device, "sd15").problem
    hook.remove()
    assert problem is not None
    assert "float32" in problem.detail
    assert draw(device, "sd15").pictures


@pytest.mark.parametrize("model", ["sd15", "sd2", "sdxl"])
def test_clip_skip_is_an_earlier_layers_output(device: Device, model: str) -> None:
    entry = device.catalogue.find(model)
    pipe = device.residency.acquire(entry, device.fetch(entry), torch.float32).base
    plan = device.catalogue.plan(reading.parse({"prompt": "a cat", "model_id": model, "clip_skip": 1}), None, "test")
    ours = prompts.embed(pipe, entry.model.family, plan).arguments["prompt_embeds"]
    encoders = [(pipe.tokenizer, pipe.text_encoder)] + ([(pipe.tokenizer_2, pipe.text_encoder_2)] if model == "sdxl" else [])
    each = []
    for tokenizer, encoder in encoders:
        ids = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            layers = encoder(ids, output_hidden_states=True).hidden_states
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            each.append(layers[-3] if model == "sdxl" else norm(layers[-2]))
    assert torch.allclose(ours, torch.cat(each, dim=-1), atol=1e-5)


@pytest.mark.parametrize("model", ["sd15", "sd2", "sdxl"])
def test_a_plain_prompt_embeds_as_the_pipeline_itself_does(device: Device, model: str) -> None:
    entry = device.catalogue.find(model)
    pipe = device.residency.acquire(entry, device.fetch(entry), torch.float32).base
    plan = device.catalogue.plan(reading.parse({"prompt": "a red apple, on a table", "negative_prompt": "blue", "model_id": model}), None, "test")
    ours = prompts.embed(pipe, entry.model.family, plan).arguments
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt=plan.prompt, negative_prompt=plan.negative_prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, value in zip(names, theirs, strict=False):
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_flux_tells_which_prompt_parts_it_cannot_read(device: Device) -> None:
    ran = draw(device, "flux", prompt="x " * 600 + "(y:1.3)").ran
    assert ran.prompt_tokens > 600
    assert ran.prompt_tokens_cut == ran.prompt_tokens - 511
    assert any("weights" in note for note in ran.notes)


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.3) x", [("a ", 1.0), ("cat", 1.3), (" x", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        (r"\(cat\)", [("(cat)", 1.0)]),
        ("time: 5:30", [("time: 5:30", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("stray)", [("stray)", 1.0)]),
        ("", [("", 1.0)]),
        ("(a:99)", [("a", 10.0)]),
    ],
)
def test_weights_are_read_as_a1111_reads_them(prompt: str, fragments: list[tuple[str, float]]) -> None:
    read = prompts.parse_weights(prompt)
    assert [text for text, _ in read] == [text for text, _ in fragments]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in fragments])


WEIGHTED = st.lists(st.tuples(st.text(st.characters(blacklist_categories=["Cs"]) | st.sampled_from("()[]\\\\:1. "), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 1.0, 1.1, 1.3, 10.0])), max_size=8)


def written(text: str, weight: float) -> str:
    plain = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    return plain if weight == 1 else f"({plain}:{weight:g})"


@given(WEIGHTED)
@settings_of_hypothesis(deadline=None)
def test_weights_that_are_written_are_read_back(fragments: list[tuple[str, float]]) -> None:
    alike = [("".join(text for text, _ in some), weight) for weight, some in itertools.groupby(fragments, lambda pair: pair[1])]
    assert prompts.parse_weights("".join(written(*pair) for pair in fragments)) == ([pair for pair in alike if pair[0].strip()] or [("", 1.0)])


@given(st.text(max_size=80) | st.text("()[]:\\\\ .-+019a", max_size=80))
@settings_of_hypothesis(deadline=None)
def test_any_prompt_is_read_as_weighted_text(prompt: str) -> None:
    read = prompts.parse_weights(prompt)
    assert all(0 <= weight <= 10 and text in ("", *[text] * bool(text.strip())) for text, weight in read)
    marks = re.compile(r"[\\()\[\]:.\d+\-]|\s")  # of the syntax, or left out where alone
    assert marks.sub("", "".join(text for text, _ in read)) == marks.sub("", prompt)


@pytest.mark.parametrize("prompt", ["[" * 5000 + ":" * 5000, "(" * 3300 + ":" * 3300 + ")" * 3300, "(a:9" + "9" * 4000 + ")" * 5000, "((a:0):" + "9" * 9000 + ")", ":" * 10_000, ":" + "1" * 9999, ":" + " " * 9999, ":1" + " " * 9998, "\\\\" * 10_000])
def test_a_prompt_of_brackets_alone_is_read_within_a_second(prompt: str) -> None:
    began = time.process_time()
    prompts.parse_weights(prompt)
    assert time.process_time() - began < 1


def test_broken_weights_are_a_503_and_others_still_work(device: Device, tmp_path: Path, miniatures: dict[str, Path]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(miniatures["sd15"], broken)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings = Settings(models=Models(default="broken", catalogue=[Model(id="broken", family="sd15", source=str(broken))]))
    other = Device(settings, Catalogue(settings))
    with pytest.raises(Problem) as caught:
        draw(other, "broken")
    assert caught.value.details.status == 503
    assert "broken" in caught.value.details.detail
    other.queue.close()


@pytest.mark.parametrize("component", [None, "unet"])
def test_code_beside_weights_is_not_run(tmp_path: Path, miniatures: dict[str, Path], component: str | None) -> None:
    folder, ran = tmp_path / "with_code", tmp_path / "ran"
    shutil.copytree(miniatures["sd15"], folder)
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom diffusers import StableDiffusionPipeline as Own, UNet2DConditionModel\n")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {component: ["evil", "UNet2DConditionModel"]} if component else {"_class_name": ["evil", "Own"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = Settings(models=Models(default="m", catalogue=[Model(id="m", family="sd15", source=str(folder))]))
    other = Device(settings, Catalogue(settings))
    with pytest.raises(Problem, match="custom code") as caught:
        draw(other, "m")
    assert caught.value.details.status == 503
    assert not ran.exists()
    other.queue.close()


@pytest.mark.parametrize(("source", "why"), [("", "no file named diffusion_pytorch_model.safetensors"), ("unet/diffusion_pytorch_model.bin", "only .safetensors files are loaded")])
def test_pickled_checkpoints_are_refused(tmp_path: Path, miniatures: dict[str, Path], source: str, why: str) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(miniatures["sd15"], pickled)
    weights = pickled / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))  # which diffusers would take, where it may
    weights.unlink()
    settings = Settings(models=Models(default="pickled", catalogue=[Model(id="pickled", family="sd15", source=str(pickled / source))]))
    other = Device(settings, Catalogue(settings))
    with pytest.raises(Problem, match=re.escape(why)) as caught:
        draw(other, "pickled")
    assert caught.value.details.status == 503
    other.queue.close()


@pytest.mark.parametrize("model", SMALL)
def test_a_cancel_stops_within_one_denoising_step(device: Device, model: str) -> None:
    entry = device.catalogue.find(model)
    resident = device.residency.acquire(entry, device.fetch(entry), torch.float32)
    network = resident.base.transformer if model == "flux" else resident.base.unet
    steps: list[int] = []

    def counted(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            assert device.queue.cancel("to-cancel")

    hook = network.register_forward_pre_hook(counted)
    size = entry.traits.min_size
    request = reading.parse({"prompt": "x", "model_id": model, "num_inference_steps": 20, "width": size, "height": size, "scheduler": "Euler"})
    plan = device.catalogue.plan(request, None, "test").model_copy(update={"id": "to-cancel"})
    outcome = device.submit(plan, device.fetch(entry)).exception(60)
    hook.remove()
    assert isinstance(outcome, Problem)
    assert outcome.details.status == 499
    assert len(steps) == 3
    assert draw(device, model).pictures


def test_concurrent_requests_load_a_model_once(miniatures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def counting(entry: Entry, *rest: object) -> object:
        loads.append(entry.id)
        return loading.load(entry, *rest)

    settings = Settings(models=Models(default="m", catalogue=[Model(id="m", family="sd15", source=str(miniatures["sd15"]))]))
    other = Device(settings, Catalogue(settings))
    monkeypatch.setattr(other.residency, "_load", counting)
    entry = other.catalogue.find("m")
    request = reading.parse({"prompt": "x", "num_inference_steps": 2, "width": 128, "height": 128})
    futures = [other.submit(other.catalogue.plan(request, None, f"client{i}"), other.fetch(entry)) for i in range(5)]
    assert all(f.result(60).pictures for f in futures)
    assert loads == ["m"]
    other.queue.close()
