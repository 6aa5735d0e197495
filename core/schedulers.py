"""Scheduler names: what users of diffusers, A1111 and ComfyUI write, and what it means.

A name is a sampler ("Euler a", "dpmpp_2m", "DPMSolverMultistepScheduler") and, after it, possibly
a noise schedule ("Karras", "SGM Uniform", "beta"; without one, the model's own). The mapping follows
the table in diffusers' scheduler overview. No torch here: the runner makes the instance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from core.problems import invalid_field, nearest


@dataclass(frozen=True)
class Scheduler:
    """A diffusers class with the settings that the name stands for."""

    sampler: str
    schedule: str | None
    class_name: str
    config: dict[str, object] = field(default_factory=dict)
    image_to_image: bool = True

    @property
    def name(self) -> str:
        return f"{self.sampler} {self.schedule}" if self.schedule else self.sampler


@dataclass(frozen=True)
class _Sampler:
    """A sampler's name, diffusers class and settings. `automatic` is the schedule that A1111 gives it
    when left to choose; `schedules` are those that the class can do and that give good pictures."""

    name: str
    class_name: str
    config: dict[str, object] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    automatic: str | None = None
    image_to_image: bool = True


# Noise schedules by their A1111 names, as diffusers' settings. Those on sigmas span all of the model's
# noise, which diffusers does with `linspace` only.
SCHEDULES: dict[str, dict[str, object]] = {
    "Karras": {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
    "Exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "Beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "Uniform": {"timestep_spacing": "linspace"},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "DDIM": {"timestep_spacing": "leading"},
}
_SPELLINGS = {"Uniform": ("Normal",), "DDIM": ("ddim_uniform",)}
_SIGMAS = ("Karras", "Exponential", "Beta")
_SPACINGS = ("Uniform", "SGM Uniform", "Simple", "DDIM")
_ALL = (*_SIGMAS, *_SPACINGS)
# Latents are not pixels: they must not be clipped to -1..1, as these two classes do unless told.
_WHOLE: dict[str, object] = {"clip_sample": False}
_ODE: dict[str, object] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE: dict[str, object] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_UNIPC: dict[str, object] = {"solver_order": 2, "solver_type": "bh2"}

_SAMPLERS = (
    _Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", _ODE, _ALL, ("dpmpp_2m", "k_dpmpp_2m", "DPMSolver++"), "Karras"),
    _Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", _SDE, _ALL, ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), "Exponential"),
    _Sampler("DPM++ 2M SDE Heun", "DPMSolverMultistepScheduler", {**_SDE, "solver_type": "heun"}, ("Karras", "Exponential", *_SPACINGS), ("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"), "Exponential"),
    _Sampler("DPM++ 3M SDE", "DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}, ("Karras", "Exponential", *_SPACINGS), ("dpmpp_3m_sde", "dpmpp_3m_sde_gpu"), "Exponential"),
    _Sampler("DPM++ 2S", "DPMSolverSinglestepScheduler", _ODE, _SIGMAS, ("dpmpp_2s", "k_dpmpp_2s"), "Karras"),
    _Sampler("DPM++ SDE", "DPMSolverSinglestepScheduler", _SDE, _SIGMAS, ("dpmpp_sde", "dpmpp_sde_gpu", "k_dpmpp_sde"), "Karras"),
    _Sampler("DPM2", "KDPM2DiscreteScheduler", {}, _ALL, ("dpm_2", "k_dpm_2"), "Karras"),
    _Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, ("Karras", "Beta", *_SPACINGS), ("dpm_2_ancestral", "k_dpm_2_a", "k_dpm_2_ancestral"), "Karras"),
    _Sampler("Euler", "EulerDiscreteScheduler", {}, _ALL, ("k_euler",)),
    _Sampler("Euler a", "EulerAncestralDiscreteScheduler", {}, _SPACINGS, ("euler_ancestral", "k_euler_a", "k_euler_ancestral")),
    _Sampler("Heun", "HeunDiscreteScheduler", {}, _ALL, ("k_heun",)),
    _Sampler("LMS", "LMSDiscreteScheduler", {}, _ALL, ("k_lms",)),
    _Sampler("DDIM", "DDIMScheduler", _WHOLE, _SPACINGS, ("DDIMParallel",)),
    _Sampler("DDPM", "DDPMScheduler", _WHOLE, _SPACINGS, ("DDPMParallel",)),
    _Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}, _SPACINGS, ("PNDM",)),
    _Sampler("UniPC", "UniPCMultistepScheduler", _UNIPC, _ALL, ("uni_pc", "uni_pc_bh2")),
    _Sampler("DEIS", "DEISMultistepScheduler", {"algorithm_type": "deis"}, _ALL),
    _Sampler("SA-Solver", "SASolverScheduler", {"algorithm_type": "data_prediction"}, _ALL, ("sa_solver",)),
    _Sampler("LCM", "LCMScheduler", {}, _SPACINGS),
    _Sampler("TCD", "TCDScheduler", {}, _SPACINGS),
)
# Those that denoise x_t itself: the UniDiffuser pipeline never scales its input, which the others need.
_UNSCALED_SAMPLERS = tuple(s for s in _SAMPLERS if s.class_name in (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
))  # fmt: skip
# For flow matching (Flux) the classes made for it, which take a picture to start from, and three solvers
# that can do flow sigmas but not start from a picture.
_FLOW_CONFIG: dict[str, object] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FLOW_SAMPLERS = (
    _Sampler("Euler", "FlowMatchEulerDiscreteScheduler", {}, _SIGMAS, ("k_euler",)),
    _Sampler("LCM", "FlowMatchLCMScheduler", {}, _SIGMAS),
    _Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {**_FLOW_CONFIG, **_ODE}, (), ("dpmpp_2m",), image_to_image=False),
    _Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {**_FLOW_CONFIG, **_SDE}, (), ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), image_to_image=False),
    _Sampler("UniPC", "UniPCMultistepScheduler", {**_FLOW_CONFIG, **_UNIPC}, (), ("uni_pc", "uni_pc_bh2"), image_to_image=False),
)
# Names that users know and diffusers has no sampler for. A near one under that name would be a lie.
_NEAR = {
    "DPM++ 2S a": "DPM++ 2S", "dpmpp_2s_ancestral": "DPM++ 2S", "DPMSolverSDEScheduler": "DPM++ SDE", "DPM fast": "DPM++ 2M", "DPM adaptive": "DPM++ 2M",
    "Restart": "Heun", "DDIM CFG++": "DDIM", "heunpp2": "Heun", "ipndm": "DEIS", "ipndm_v": "DEIS", "IPNDMScheduler": "DEIS", "EDMEulerScheduler": "Euler",
    "EDMDPMSolverMultistepScheduler": "DPM++ 2M", "FlowMatchHeunDiscreteScheduler": "Euler",
}  # fmt: skip


def _key(name: str) -> str:
    """Spelling does not matter: case, blanks, `_`, `-`, and diffusers' class suffixes."""
    key = re.sub(r"[\s_\-]+", "", name.lower()).replace("++", "pp")
    return re.sub(r"(discrete)?scheduler$", "", key)


def _table(samplers: tuple[_Sampler, ...]) -> dict[str, Scheduler]:
    table: dict[str, Scheduler] = {}
    for sampler in samplers:
        made = {
            schedule: Scheduler(
                sampler.name, schedule, sampler.class_name, {**sampler.config, **SCHEDULES.get(schedule or "", {})}, sampler.image_to_image
            )
            for schedule in (None, *sampler.schedules)
        }
        for spelling in (sampler.name, *sampler.aliases):
            for schedule, scheduler in made.items():
                for suffix in (schedule or "", *_SPELLINGS.get(schedule or "", ())):
                    table.setdefault(_key(f"{spelling} {suffix}"), scheduler)
            table.setdefault(_key(f"{spelling} Automatic"), made.get(sampler.automatic, made[None]))
    for sampler in samplers:  # a class name stands for the plain sampler, where no name took it
        table.setdefault(_key(sampler.class_name), table[_key(sampler.name)])
    return table


_DIFFUSION, _FLOW, _UNSCALED = _table(_SAMPLERS), _table(_FLOW_SAMPLERS), _table(_UNSCALED_SAMPLERS)
_MISSING = {_key(f"{name} {schedule}"): near for name, near in _NEAR.items() for schedule in ("", "Automatic", *SCHEDULES)}


def _of(flow: bool, unscaled: bool) -> dict[str, Scheduler]:
    return _FLOW if flow else _UNSCALED if unscaled else _DIFFUSION


def names(flow: bool = False, image_to_image: bool = False, unscaled: bool = False) -> list[str]:
    """Every scheduler by its A1111 name. `flow`: those of flow-matching models (Flux);
    `image_to_image`: those that can start from a picture; `unscaled`: those that take the noisy
    latents as they are (UniDiffuser)."""
    table = _of(flow, unscaled).values()
    return list(dict.fromkeys(s.name for s in table if s.image_to_image or not image_to_image))


def samplers() -> dict[str, list[str]]:
    """The samplers by their A1111 names, each with the other names that it has."""
    return {sampler.name: list(sampler.aliases) for sampler in _SAMPLERS}


def find(name: str, flow: bool = False, image_to_image: bool = False, unscaled: bool = False) -> Scheduler:
    """The scheduler that `name` means.

    Raises:
        Problem: 422 with the list of names, where there is no such one for this kind of model, or it
            cannot start from a picture and `image_to_image` needs it to.
    """
    key, known = _key(name), names(flow, image_to_image, unscaled)
    found = _of(flow, unscaled).get(key)
    if found is not None and (found.image_to_image or not image_to_image):
        return found
    if found is not None:
        message = f"{found.name} cannot start from a picture with this kind of model"
    elif key in _MISSING:
        message = f"there is no scheduler {name!r} here; {_MISSING[key]!r} is the nearest" if not flow else f"there is no scheduler {name!r} here"
    elif key in _DIFFUSION:
        message = f"{'a flow-matching model' if flow else 'UniDiffuser'} has no scheduler {name!r}"
    else:
        message = f"there is no scheduler {name!r}{nearest(name, known)}"
    raise invalid_field("scheduler", message, known, name)
