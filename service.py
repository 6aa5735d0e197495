"""The Bento: the services and how they are wired.

`bentoml serve` starts the entry with its runner on one port; `bentoml serve service:StableDiffusion
-p 1234` starts the runner alone with the same routes.
"""

from __future__ import annotations

from typing import Any

import bentoml
from bentoml._internal.resource import system_resources
from pydantic import ValidationError
from pydantic_settings import SettingsError
from yaml import YAMLError

from api import app, gate, typed
from core import settings
from core.auth import Keys, NoKeys
from core.draining import Draining
from runners.diffusion import DiffusionRunner

try:
    configured = settings.load()
    keys = Keys(configured, settings.secrets())
except (NoKeys, FileNotFoundError, ValidationError, SettingsError, YAMLError) as error:
    raise SystemExit(f"Easel cannot start. {error}") from None
http = app.build(configured)
draining = Draining(configured.server.grace_s, linger_s=1.0)
# BentoML's own timeout leaves work running behind it; ours (deadline_s) ends it, and comes first.
common: dict[str, Any] = {
    "workers": 1,
    "traffic": {"timeout": configured.queue.deadline_s + 60},
    "http": {"host": configured.server.host, "port": configured.server.port},
    "runner_probe": {"enabled": False},
}
gpus = configured.stable_diffusion.gpu
if gpus is None:
    gpus = min(1, len(system_resources()["nvidia.com/gpu"]))


@bentoml.service(name="StableDiffusion", resources={"gpu": gpus} if gpus else {}, **common)
@bentoml.asgi_app(http)
class StableDiffusion(typed.TypedApis, DiffusionRunner):
    """Stable Diffusion on one device."""

    def __init__(self) -> None:
        self.start("StableDiffusion", configured, draining)


@bentoml.service(name="ImageGeneration", **common)
@bentoml.asgi_app(http)
class ImageGeneration(typed.TypedApis):
    """The entry: every contract on one port."""

    stable_diffusion = bentoml.depends(StableDiffusion)

    @bentoml.on_startup
    async def begin(self) -> None:
        draining.install()


door: dict[str, Any] = {"settings": configured, "keys": keys, "http": http, "draining": draining}
StableDiffusion.add_asgi_middleware(gate.Gate, **door)
ImageGeneration.add_asgi_middleware(gate.Gate, **door)
