"""Scheduler names: what users of diffusers, A1111 and ComfyUI write, and what it means.

A name is a sampler ("Euler a", "dpmpp_2m", "DPMSolverMultistepScheduler") and, after it, possibly
a noise schedule ("Karras", "Exponential", "Beta"). The mapping follows the table in diffusers'
scheduler overview. No torch here: the runner makes the instance.
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

    @property
    def name(self) -> str:
        return f"{self.sampler} {self.schedule}" if self.schedule else self.sampler


@dataclass(frozen=True)
class _Sampler:
    name: str
    class_name: str
    config: dict[str, object] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_SIGMAS = {"Karras": "use_karras_sigmas", "Exponential": "use_exponential_sigmas", "Beta": "use_beta_sigmas"}
_ALL = tuple(_SIGMAS)

_SAMPLERS = (
    _Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, _ALL, ("dpmpp_2m",)),
    _Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, _ALL, ("dpmpp_2m_sde",)),
    _Sampler("DPM++ SDE", "DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, _ALL, ("dpmpp_sde",)),
    _Sampler("DPM++ 2S", "DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}, _ALL, ("dpmpp_2s", "DPM++ 2S a", "dpmpp_2s_ancestral")),
    _Sampler("DPM2", "KDPM2DiscreteScheduler", {}, _ALL, ("dpm_2", "k_dpm_2")),
    _Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, _ALL, ("dpm_2_ancestral", "k_dpm_2_a")),
    _Sampler("Euler", "EulerDiscreteScheduler", {}, _ALL, ("k_euler",)),
    _Sampler("Euler a", "EulerAncestralDiscreteScheduler", {}, (), ("euler_ancestral", "k_euler_a")),
    _Sampler("Heun", "HeunDiscreteScheduler", {}, _ALL, ("k_heun",)),
    _Sampler("LMS", "LMSDiscreteScheduler", {}, _ALL, ("k_lms",)),
    _Sampler("DDIM", "DDIMScheduler"),
    _Sampler("DDPM", "DDPMScheduler"),
    _Sampler("PLMS", "PNDMScheduler", {}, (), ("PNDM",)),
    _Sampler("UniPC", "UniPCMultistepScheduler", {}, _ALL, ("uni_pc",)),
    _Sampler("DEIS", "DEISMultistepScheduler", {}, _ALL),
    _Sampler("LCM", "LCMScheduler"),
    _Sampler("TCD", "TCDScheduler"),
)
_FLOW_SAMPLERS = (
    _Sampler("Euler", "FlowMatchEulerDiscreteScheduler", {}, _ALL, ("k_euler",)),
)


def _key(name: str) -> str:
    """Spelling does not matter: case, blanks, `_`, `-`, and diffusers' class suffixes."""
    key = re.sub(r"[\s_\-]+", "", name.lower()).replace("++", "pp")
    return re.sub(r"(discrete)?scheduler$", "", key)


def _table(samplers: tuple[_Sampler, ...]) -> dict[str, Scheduler]:
    table: dict[str, Scheduler] = {}
    for sampler in samplers:
        for schedule in (None, *sampler.schedules):
            config = dict(sampler.config)
            if schedule:
                config[_SIGMAS[schedule]] = True
            scheduler = Scheduler(sampler.name, schedule, sampler.class_name, config)
            for spelling in (sampler.name, *sampler.aliases):
                table.setdefault(_key(f"{spelling} {schedule or ''}"), scheduler)
    for sampler in samplers:  # a class name stands for the plain sampler, where no name took it
        table.setdefault(_key(sampler.class_name), table[_key(sampler.name)])
    return table


_DIFFUSION, _FLOW = _table(_SAMPLERS), _table(_FLOW_SAMPLERS)


def names(flow: bool = False) -> list[str]:
    """Every scheduler by its A1111 name. `flow`: those of flow-matching models (Flux)."""
    return list(dict.fromkeys(s.name for s in (_FLOW if flow else _DIFFUSION).values()))


def find(name: str, flow: bool = False) -> Scheduler:
    """The scheduler that `name` means.

    Raises:
        Problem: 422 with the list of names, where there is no such one for this kind of model.
    """
    found = (_FLOW if flow else _DIFFUSION).get(_key(name))
    if found is None:
        known = names(flow)
        kind = "a flow-matching model has no" if flow and _key(name) in _DIFFUSION else "there is no"
        raise invalid_field("scheduler", f"{kind} scheduler {name!r}{nearest(name, known)}", known, name)
    return found
