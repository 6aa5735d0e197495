"""Those that draw: the raw loop, Easel and the peers, each behind the same call."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import environments
import psutil
import yaml
from scenarios import LORAS, MINIATURE, MINIATURE_FOLDER, SIZES, STARTER, Picture
from turns import ROOT, RawLoop, Server

PEERS = ROOT / "bench" / "peers"
PNG = b"\x89PNG"


class Contender(Protocol):
    """`alone`: draws one picture at a time and times it itself; the others are servers. `pids`: its processes, but not theirs."""

    name: str
    alone: bool
    pids: list[int]

    def can(self, picture: Picture) -> bool: ...

    async def draw(self, picture: Picture, session: aiohttp.ClientSession, slowly: float = 0) -> tuple[bytes, float | None]:
        """The PNG, and the seconds that it took by the contender's own clock, where it has one.

        Args:
            slowly: read the answer in pieces of half a KiB, with so many seconds between them.

        Raises:
            RuntimeError: where no picture comes.
        """
        ...


class Raw:
    """The raw loop: one process that draws one picture after another."""

    name, alone = "raw loop", True

    def __init__(self, loop: RawLoop) -> None:
        self._loop, self._free, self.pids = loop, threading.Lock(), [loop.pid]

    def can(self, picture: Picture) -> bool:
        return True

    async def draw(self, picture: Picture, session: aiohttp.ClientSession, slowly: float = 0) -> tuple[bytes, float | None]:
        answer = await asyncio.to_thread(self._ask, json.dumps([fields(picture)]))
        return base64.b64decode(answer["pictures"][0]), answer["took"][0]

    def _ask(self, wanted: str) -> dict[str, Any]:
        with self._free:  # held to the answer, even where nobody waits for it any more
            return self._loop.ask(wanted)


@dataclass
class Request:
    """An HTTP request for a picture, as arguments of aiohttp's `post`."""

    url: str
    more: dict[str, Any]


class Serving:
    """What contenders that answer over HTTP share: sending a `Request`, and reading a PNG."""

    alone = False

    def __init__(self, server: Server) -> None:
        self.server, self.pids = server, [server.pid]

    def request(self, picture: Picture) -> Request:
        raise NotImplementedError

    async def draw(self, picture: Picture, session: aiohttp.ClientSession, slowly: float = 0) -> tuple[bytes, float | None]:
        request = self.request(picture)
        async with session.post(request.url, **request.more) as answer:
            if slowly:
                pieces = []
                while piece := await answer.content.read(512):
                    pieces.append(piece)
                    await asyncio.sleep(slowly)
                content = b"".join(pieces)
            else:
                content = await answer.read()
        if answer.status != 200 or not content.startswith(PNG):
            raise RuntimeError(f"no picture: {answer.status} {content[:300].decode(errors='replace')}")
        return content, None


class Easel(Serving):
    name = "Easel"

    def can(self, picture: Picture) -> bool:
        return True

    def request(self, picture: Picture) -> Request:
        named = {"scheduler": picture.scheduler, "lora": picture.lora} | ({"strength": picture.strength} if picture.image else {"width": SIZES[picture.model], "height": SIZES[picture.model]})
        params = {"prompt": picture.prompt, "model_id": picture.model, "num_inference_steps": picture.steps, "guidance_scale": picture.guidance, "seed": picture.seed, **named}
        more: dict[str, Any] = {"params": {k: v for k, v in params.items() if v is not None}, "headers": {"X-API-Key": self.server.key}}
        if picture.image:
            more["data"] = form({"image": picture.image})
        return Request(self.server.url + "/post_config", more)


class BentoML(Serving):
    name = "BentoML"

    def can(self, picture: Picture) -> bool:
        return True

    def request(self, picture: Picture) -> Request:
        named = {
            "prompt": picture.prompt, "model": picture.model, "size": SIZES[picture.model], "num_inference_steps": picture.steps, "guidance_scale": picture.guidance,
            "seed": picture.seed, "scheduler": picture.scheduler or "", "lora": picture.lora or "",
        }  # fmt: skip
        if picture.image:
            return Request(self.server.url + "/img2img", {"data": form({**named, "strength": picture.strength, "image": picture.image})})
        return Request(self.server.url + "/txt2img", {"json": named})


class LitServe(Serving):
    name = "LitServe"

    def can(self, picture: Picture) -> bool:
        return True

    def request(self, picture: Picture) -> Request:
        return Request(self.server.url + "/predict", {"json": fields(picture)})


class HfServe(Serving):
    """One process for each model, since that is what it serves; it knows neither schedulers, LoRAs nor input pictures."""

    name = "hf-serve"

    def __init__(self, servers: dict[str, Server]) -> None:
        self.servers, self.pids = servers, [server.pid for server in servers.values()]

    def can(self, picture: Picture) -> bool:
        return picture.plain

    def request(self, picture: Picture) -> Request:
        size = SIZES[picture.model]
        parameters = {"num_inference_steps": picture.steps, "guidance_scale": picture.guidance, "width": size, "height": size, "seed": picture.seed}
        return Request(self.servers[picture.model].url + "/predict", {"json": {"inputs": picture.prompt, "parameters": parameters}, "headers": {"Accept": "image/png"}})


def tree(pids: list[int]) -> list[psutil.Process]:
    """These processes and all that they started."""
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return found


def fields(picture: Picture) -> dict[str, Any]:
    """What bench/peers/drawing.py takes."""
    image = base64.b64encode(picture.image).decode() if picture.image else None
    return asdict(picture) | {"image": image, "size": SIZES[picture.model]}


def form(parts: dict[str, Any]) -> aiohttp.FormData:
    """A multipart form; bytes are files."""
    made = aiohttp.FormData()
    for name, value in parts.items():
        if isinstance(value, bytes):
            made.add_field(name, value, filename="given.png", content_type="image/png")
        else:
            made.add_field(name, str(value))
    return made


@dataclass
class Started:
    """Contenders that run, the raw loop first, and why others do not."""

    running: list[Any]
    failed: dict[str, str]

    @contextlib.contextmanager
    def only(self, one: Contender) -> Iterator[None]:
        """Stop the others' processes meanwhile: a server that looks for work all the time would take the cores from whoever has its turn."""
        stopped = [process for other in self.running if other is not one for process in tree(other.pids)]
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                process.resume()

    def fail(self, name: str, error: Exception) -> None:
        """Go on without a peer."""
        self.running = [contender for contender in self.running if contender.name != name]
        self.failed[name] = f"{type(error).__name__} {error}"[-500:]
        print(f"{name} is left out: {self.failed[name]}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def started(models: Path, only: set[str] | None = None) -> Iterator[Started]:
    """Start them all, or those named in `only` beside the raw loop; a peer that does not start is noted and left out.

    Args:
        models: the folder that bench/models.py has filled.
    """
    folders = {STARTER: str(ROOT / STARTER), MINIATURE: str(models / MINIATURE_FOLDER)}
    env = {"BENCH_MODELS": json.dumps({"folders": folders, "loras": {name: str(models / f"{name}.safetensors") for name in LORAS}}), "PYTHONPATH": str(PEERS)}

    def bentoml() -> BentoML:
        python = environments.python("bentoml")
        command = [str(python), "-m", "bentoml", "serve", "--working-dir", str(PEERS), "bentoml_service:Txt2Img", "--host", "127.0.0.1"]
        return BentoML(start(Server(lambda port: [*command, "--port", str(port)], "/readyz", env)))

    def litserve() -> LitServe:
        python = environments.python("litserve")
        return LitServe(start(Server(lambda port: [str(python), str(PEERS / "litserve_server.py"), str(port)], "/health", env)))

    def hf_serve() -> HfServe:
        command = [str(environments.python("hf-serve")), str(PEERS / "hf_serve_server.py"), "--task", "text-to-image", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        return HfServe({model: start(Server(lambda port, f=folder: [*command, "--model-dir", f, "--port", str(port)], "/health")) for model, folder in folders.items()})

    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        loop = stack.enter_context(contextlib.closing(RawLoop(str(PEERS / "raw.py"), {}, env)))
        here = Started([Raw(loop)], {})
        here.running.append(Easel(start(Server(env=configured(models, folders[MINIATURE])))))
        for name, make in (("BentoML", bentoml), ("LitServe", litserve), ("hf-serve", hf_serve)):
            if only is not None and name not in only:
                continue
            try:
                here.running.append(make())
            except Exception as error:
                here.fail(name, error)
        yield here


def configured(models: Path, miniature: str) -> dict[str, str]:
    """Easel's environment: the starter as it is shipped, the miniature and the LoRAs; a queue that takes a burst; no logs of usage between runs."""
    settings = yaml.safe_load((ROOT / "configuration.yaml").read_text())
    settings["models"]["catalogue"] = [
        next(entry for entry in settings["models"]["catalogue"] if entry["id"] == STARTER),
        {"id": MINIATURE, "family": "sd15", "source": miniature, "size": SIZES[MINIATURE]},
    ]
    settings["queue"] |= {"limit": 512, "per_key": 512}
    settings["loras"] |= {"registry": str(models / "lora_list.json"), "folder": str(models)}
    settings["usage"]["path"] = str(models / "usage.sqlite3")
    settings["experiments"]["path"] = settings["prompts"]["styles"] = settings["prompts"]["wildcards"] = None
    entry = {"model_id": None, "base_model": STARTER, "lora_path": "made by bench/models.py", "trigger words": [], "allow_no_mention": True, "usage_rights": "None", "family": "starter"}
    (models / "lora_list.json").write_text(json.dumps({name: entry | {"file_name": f"{name}.safetensors"} for name in LORAS}))
    path = models / "configuration.yaml"
    path.write_text(yaml.safe_dump(settings))
    return {"EASEL_CONFIGURATION": str(path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
