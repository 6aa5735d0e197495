"""The Bento: the services and how they are wired.

`bentoml serve` starts the entry with its runners on one port; `bentoml serve service:StableDiffusion
-p 1234` and `bentoml serve service:UniDiffuser -p 8000` start one runner alone with the same routes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from pydantic_settings import SettingsError
from simple_di.providers import SingletonFactory
from yaml import YAMLError

from api import animate, app, backend, gate, job_store, jobs, multimodal, quotas, typed, upscaling, usage
from core import allocator, connections, logs, settings, supervisor, timers, tracing
from core.auth import Keys, NoKeys
from core.draining import Draining
from core.model_settings import Models, Queue
from core.placement import Place, addresses, elsewhere, gpus_seen, places, share
from core.settings import Settings
from core.versions import LaterVersion
from runners.diffusion import DiffusionRunner


def metrics_folder() -> str:
    """Where this server's processes share their counts. BentoML's own folder is one for all servers of a user, and each clears it."""
    folder = tempfile.mkdtemp(prefix="easel-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def place(settings: Settings) -> tuple[list[Place], list[Place]]:
    """Where the workers of Stable Diffusion and of UniDiffuser run."""
    gpus, dealt = gpus_seen(len(system_resources()["nvidia.com/gpu"]), os.environ)
    runners = {"StableDiffusion": (settings.stable_diffusion, settings.models), "UniDiffuser": (settings.unidiffuser, settings.unidiffuser)}
    total = sum(r.workers if isinstance(r.workers, int) and not r.urls else 0 for r, _ in runners.values())
    sd, uni = (
        elsewhere(name, r.urls) or places(name, r.workers, models, share(r.gpu, total, gpus), gpus, dealt) for name, (r, models) in runners.items()
    )
    return sd, uni


try:
    configured = settings.load()
    keys = Keys(configured, settings.secrets())
    stable_diffusion_places, unidiffuser_places = place(configured)
    usage.prepare()
    job_store.prepare()
    tracing.configure()
except (NoKeys, LaterVersion, FileNotFoundError, ValueError, SettingsError, YAMLError) as error:
    raise SystemExit(f"Easel cannot start. {error}") from None
logs.configure(configured.server)
http = app.build(configured)
supervisor.keep_private()
timers.let_go()
connections.bound(configured.server)
BentoMLContainer.prometheus_multiproc_dir.set(SingletonFactory(metrics_folder))
draining = Draining(configured.server.grace_s, linger_s=1.0)
common: dict[str, Any] = {
    "workers": 1,  # of each of our services: see core.placement
    "http": {"host": configured.server.host, "port": configured.server.port},
    "runner_probe": {"enabled": False},
    "metrics": {"enabled": False},  # ours: see api.metrics
    "logging": {"access": {"enabled": False}},  # ours: see api.gate
    # BentoML closes the entry's connections to a runner after 100 calls or 5 minutes, those in use too.
    "runner_connection": {"max_requests": 2**31, "max_age": 1e9},
}


def of_runner(place: Place, *queues: Queue | None) -> dict[str, Any]:
    """What a worker's service is declared with."""
    return {"name": place.name, "resources": {"gpu": place.gpu} if place.gpu else {}, "traffic": traffic(*queues), **common}


def traffic(*queues: Queue | None) -> dict[str, float]:
    """How long the entry waits for a worker: beyond any deadline, which ends the work itself. (As the service's own timeout it is taken out.)"""
    return {"timeout": max(q.deadline_s for q in (*queues, configured.queue) if q) + 60}


def stable_diffusion(place: Place) -> Any:
    @bentoml.service(**of_runner(place))
    @bentoml.asgi_app(http)
    class StableDiffusion(typed.TypedApis, animate.AnimationApis, upscaling.UpscaleApi, jobs.JobsLife, DiffusionRunner):
        """Stable Diffusion on one device."""

        def __init__(self) -> None:
            self.start(place.name, configured, on(configured.models, place), draining)

    return StableDiffusion


def unidiffuser(place: Place) -> Any:
    @bentoml.service(**of_runner(place, configured.unidiffuser.queue))
    @bentoml.asgi_app(http)
    class UniDiffuser(multimodal.MultimodalApis, jobs.JobsLife, DiffusionRunner):
        """UniDiffuser on one device."""

        def __init__(self) -> None:
            self.start(place.name, configured, on(configured.unidiffuser, place), draining)

    return UniDiffuser


def on(models: Models, place: Place) -> Models:
    return models.model_copy(update={"device": place.device})


# The first worker of each can be served alone; the entry calls them all.
StableDiffusion, *_more_stable_diffusion = map(stable_diffusion, stable_diffusion_places)
UniDiffuser, *_more_unidiffuser = map(unidiffuser, unidiffuser_places)
_workers = [StableDiffusion, *_more_stable_diffusion, UniDiffuser, *_more_unidiffuser]
_urls = addresses(configured)


class _Entry(typed.TypedApis, animate.AnimationApis, upscaling.UpscaleApi, multimodal.MultimodalApis, jobs.JobsLife):
    """The entry: every contract on one port."""

    draining = draining

    @bentoml.on_startup
    async def begin(self) -> None:
        draining.install()
        allocator.keep_small()
        await backend.connect(self, set(_urls), settings.secrets().runner_key.get_secret_value())


for worker in _workers:
    setattr(_Entry, backend.attribute(worker.name), bentoml.depends(worker, url=_urls.get(worker.name)))  # those with an address are not started here
ImageGeneration = bentoml.service(name="ImageGeneration", traffic=traffic(configured.unidiffuser.queue), **common)(bentoml.asgi_app(http)(_Entry))

door: dict[str, Any] = {"settings": configured, "keys": keys, "quotas": quotas.of_process(), "http": http, "draining": draining}
for service in (*_workers, ImageGeneration):
    service.add_asgi_middleware(gate.Gate, **door)
