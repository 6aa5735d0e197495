"""The Bento: the services and how they are wired.

`bentoml serve` starts the entry with its runners on one port; `bentoml serve service:StableDiffusion
-p 1234` and `bentoml serve service:UniDiffuser -p 8000` start one runner alone with the same routes.
"""

from __future__ import annotations

from typing import Any

import bentoml
from bentoml._internal.resource import system_resources
from pydantic_settings import SettingsError
from yaml import YAMLError

from api import app, gate, multimodal, typed
from core import settings
from core.auth import Keys, NoKeys
from core.draining import Draining
from core.settings import Models, Queue
from runners.diffusion import DiffusionRunner


def gpu(setting: float | None) -> dict[str, float]:
    """As configured; else one GPU for each runner, half of it where there is only one for both."""
    there = len(system_resources()["nvidia.com/gpu"])
    share = setting if setting is not None else min(1, there / 2)
    return {"gpu": share} if share else {}


def check_needs(models: Models, setting: float | None) -> None:
    """Refuse optimisations that need what is not here before any process is started.

    Raises:
        ValueError: that names them.
    """
    on_gpu = models.device.startswith("cuda") if models.device else bool(gpu(setting))
    if missing := models.needs(max(1, int(gpu(setting).get("gpu", 1))) if on_gpu else 0):
        raise ValueError("Models cannot be optimised so here. " + ". ".join(missing))


try:
    configured = settings.load()
    keys = Keys(configured, settings.secrets())
    check_needs(configured.models, configured.stable_diffusion.gpu)
    check_needs(configured.unidiffuser, configured.unidiffuser.gpu)
except (NoKeys, FileNotFoundError, ValueError, SettingsError, YAMLError) as error:
    raise SystemExit(f"Easel cannot start. {error}") from None
http = app.build(configured)
draining = Draining(configured.server.grace_s, linger_s=1.0)
unidiffuser = configured.unidiffuser
common: dict[str, Any] = {
    "workers": 1,  # one process owns a device, and a cancel finds the job there
    "http": {"host": configured.server.host, "port": configured.server.port},
    "runner_probe": {"enabled": False},
}


def traffic(*queues: Queue | None) -> dict[str, float]:
    """BentoML's own timeout leaves work running behind it; ours (deadline_s) ends it, and comes first."""
    return {"timeout": max(q.deadline_s for q in (*queues, configured.queue) if q) + 60}


@bentoml.service(name="StableDiffusion", resources=gpu(configured.stable_diffusion.gpu), traffic=traffic(), **common)
@bentoml.asgi_app(http)
class StableDiffusion(typed.TypedApis, DiffusionRunner):
    """Stable Diffusion on one device."""

    def __init__(self) -> None:
        self.start("StableDiffusion", configured, configured.models, draining)


@bentoml.service(name="UniDiffuser", resources=gpu(unidiffuser.gpu), traffic=traffic(unidiffuser.queue), **common)
@bentoml.asgi_app(http)
class UniDiffuser(multimodal.MultimodalApis, DiffusionRunner):
    """UniDiffuser on one device."""

    def __init__(self) -> None:
        self.start("UniDiffuser", configured, unidiffuser, draining)


@bentoml.service(name="ImageGeneration", traffic=traffic(unidiffuser.queue), **common)
@bentoml.asgi_app(http)
class ImageGeneration(typed.TypedApis, multimodal.MultimodalApis):
    """The entry: every contract on one port."""

    stable_diffusion = bentoml.depends(StableDiffusion)
    unidiffuser = bentoml.depends(UniDiffuser)

    @bentoml.on_startup
    async def begin(self) -> None:
        draining.install()


door: dict[str, Any] = {"settings": configured, "keys": keys, "http": http, "draining": draining}
for service in (StableDiffusion, UniDiffuser, ImageGeneration):
    service.add_asgi_middleware(gate.Gate, **door)
