"""Mixed work for a server: a request of every kind, good ones, bad ones, and ones whose client leaves.

Each kind is a function of a `Client`, which sends it, says what may be answered, and puts every request down with
its id and what came of it. tests.reliability.soak drives them.
"""

from __future__ import annotations

import base64
import io
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
from PIL import Image

from core.settings import ROOT
from tests.conftest import ADMIN, USER
from tests.test_http import jpeg

LORA = (ROOT / "starter/loras/pixel_art_style.safetensors").read_bytes()
PROMPTS = ["red apple", "green apple", "cat face", "blue heart", "(star:1.3) in the [sky]", "a {red|green|blue} heart", "x" * 600, "猫"]
SCHEDULERS = [None, "Euler a", "DPM++ 2M Karras", "UniPCMultistepScheduler", "Euler sgm_uniform", "LMS"]
ACCEPTS = ["*/*", "image/png", "image/webp", "application/zip", "multipart/mixed", "application/json"]
LEFT = 499


@dataclass
class Sent:
    """A request, and its outcome as its client saw it (`LEFT` where it did not wait for one)."""

    id: str
    kind: str
    status: int
    pictures: bool  # a generation, which the usage log counts


@dataclass
class Client:
    """Sends requests and remembers them. Its methods may be called from several threads at once."""

    url: str
    random: random.Random
    sent: list[Sent] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # the last status seen, by id
    _sessions: threading.local = field(default_factory=threading.local)

    def send(self, method: str, path: str, *may: int, key: str = ADMIN, leave_s: float | None = None, pictures: bool = False, **more: Any) -> requests.Response | None:
        """The answer; None where the client leaves after `leave_s`. A status that is not among `may` (200) is put down as unexpected."""
        id = uuid.uuid4().hex
        headers = {"X-API-Key": key, "X-Request-ID": id, **more.pop("headers", {})}
        status, response = LEFT, None
        try:
            response = self._session.request(method, self.url + path, headers=headers, timeout=leave_s or 120, **more)
            status = response.status_code
        except requests.RequestException as error:
            if leave_s is None:
                status = 0
                self._wonder(f"{method} {path}: {error!r}")
        self.sent.append(Sent(id, f"{method} {path.partition('?')[0]}", status, pictures))
        if response is not None and leave_s is None and status not in (may or (200,)):
            self._wonder(f"{method} {path} {more.get('params') or more.get('json') or more.get('data')}: {status} {response.text[:300]}")
        return response

    def draw(self, method: str, path: str, *may: int, **more: Any) -> requests.Response | None:
        return self.send(method, path, *may, pictures=True, **more)

    def _wonder(self, text: str) -> None:
        print("unexpected:", text, flush=True)
        self.unexpected.append(text)

    @property
    def _session(self) -> requests.Session:
        if not hasattr(self._sessions, "it"):
            self._sessions.it = requests.Session()
        return self._sessions.it  # type: ignore[no-any-return]

    def hang_up(self) -> None:
        """Close this thread's idle connections."""
        self._session.close()


Kind = Callable[[Client], None]
kinds: dict[Kind, int] = {}


def often(weight: int) -> Callable[[Kind], Kind]:
    def note(kind: Kind) -> Kind:
        kinds[kind] = weight
        return kind

    return note


def choose(client: Client) -> Kind:
    return client.random.choices(list(kinds), list(kinds.values()))[0]


def asked(client: Client, **more: Any) -> dict[str, Any]:
    """Parameters of a small picture."""
    pick = client.random
    values = {
        "prompt": pick.choice(PROMPTS), "num_inference_steps": pick.randint(1, 6), "seed": pick.randrange(2**32), "scheduler": pick.choice(SCHEDULERS),
        "width": pick.choice([48, 64, 96]), "height": pick.choice([48, 64]), "count_returned": pick.choice([1, 1, 1, 2, 3]), "clip_skip": pick.choice([0, 0, 1]),
        "guidance_scale": pick.choice([None, 1, 7.5]), "dynamic_prompts": pick.choice([None, "true"]),
    }  # fmt: skip
    return {name: value for name, value in {**values, **more}.items() if value is not None}


def photo(client: Client) -> bytes:
    """A picture of a size and colour of its own, so that no cache has it."""
    pick = client.random
    return jpeg((pick.randint(40, 160), pick.randint(40, 160)), f"#{pick.randrange(2**24):06x}")


def png(client: Client) -> str:
    out = io.BytesIO()
    Image.open(io.BytesIO(photo(client))).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@often(8)
def text_to_image(client: Client) -> None:
    client.draw("POST", "/post_config", params=asked(client), headers={"Accept": client.random.choice(ACCEPTS)}, key=client.random.choice([USER, ADMIN]))


@often(4)
def image_to_image(client: Client) -> None:
    more = {"strength": client.random.choice([0.3, 0.75, 1]), "num_inference_steps": client.random.randint(4, 6), "width": None, "height": None}
    client.draw("POST", "/post_config", params=asked(client, **more), files={"image": photo(client)})


@often(3)
def painting(client: Client) -> None:
    size = {"width": None, "height": None}
    if client.random.random() < 0.5:
        picture = photo(client)
        client.draw("POST", "/inpaint", data=asked(client, mask_blur=2, num_inference_steps=4, **size), files={"image": picture, "mask": jpeg(Image.open(io.BytesIO(picture)).size, "white")})
    else:
        client.draw("POST", "/outpaint", data=asked(client, outpaint_left=16, num_inference_steps=4, **size), files={"image": photo(client)})


@often(3)
def typed(client: Client) -> None:
    client.draw("POST", "/txt2img", json=asked(client))


@often(2)
def guided(client: Client) -> None:
    client.draw("POST", "/txt2img", data=asked(client, controlnet="starter/controlnet-canny"), files={"control_image": photo(client)})
    client.send("POST", "/preprocess", params={"preprocessor": "canny"}, files={"image": photo(client)})


@often(1)
def animation(client: Client) -> None:
    client.draw("POST", "/animate", params={"prompt": "x", "model_id": "mini/sd15", "num_inference_steps": 2, "num_frames": 4, "width": 128, "height": 128})


@often(2)
def upscaling(client: Client) -> None:
    client.draw("POST", "/upscale", params={"scale": client.random.choice([2, 4])}, files={"image": photo(client)})


@often(2)
def replaying(client: Client) -> None:
    drawn = client.draw("POST", "/post_config", params=asked(client, count_returned=1))
    if drawn is not None and drawn.status_code == 200:
        client.send("POST", "/replay", files={"image": drawn.content})
        client.draw("POST", "/replay?run=true", files={"image": drawn.content})


@often(6)
def unidiffuser(client: Client) -> None:
    steps = {"num_inference_steps": client.random.randint(1, 4), "seed": client.random.randrange(2**32)}
    path = client.random.choice(["/img2prompt", "/img2embed", "/caption", "/embed", "/text", "/image_variation", "/text_variation", "/prompt2img", "/generate", "/joint", "/image"])
    if path in ("/prompt2img", "/generate"):
        client.draw("POST", path, params={"prompt": "red apple", **steps})
    elif path in ("/joint", "/image", "/text"):
        client.draw("POST", path, json=steps)
    elif path == "/text_variation":
        client.draw("POST", path, json={"prompt": "red apple", **steps})
    else:
        client.draw("POST", path, data=None if "embed" in path else steps, files={"image": photo(client)})


@often(3)
def openais(client: Client) -> None:
    body = {"prompt": "red apple", "n": 2, "size": "64x64", "num_inference_steps": 2, "seed": client.random.randrange(2**32)}
    made = client.draw("POST", "/v1/images/generations", json={**body, "response_format": "url"})
    if made is not None and made.status_code == 200:
        client.send("GET", "/" + made.json()["data"][0]["url"].split("/", 3)[3])
    client.draw("POST", "/v1/images/generations", json={**body, "output_format": "webp", "quality": "low", "n": 1})
    client.draw("POST", "/v1/images/edits", data={**body, "n": 1}, files={"image": photo(client)})


@often(3)
def a1111s(client: Client) -> None:
    body = {"prompt": "red apple", "steps": 3, "width": 64, "height": 64, "seed": client.random.randrange(2**31)}
    client.draw("POST", "/sdapi/v1/txt2img", json=body)
    client.draw("POST", "/sdapi/v1/img2img", json={**body, "init_images": [png(client)]})
    client.draw("POST", "/sdapi/v1/extra-single-image", json={"image": png(client), "upscaling_resize": 2, "upscaler_1": "starter/upscaler"})
    client.send("GET", "/sdapi/v1/progress")
    client.send("GET", f"/sdapi/v1/{client.random.choice(['sd-models', 'samplers', 'schedulers', 'loras', 'embeddings', 'upscalers', 'options', 'prompt-styles'])}")


@often(5)
def a_job(client: Client) -> None:
    _job(client, asked(client))


@often(3)
def a_cancelled_job(client: Client) -> None:
    _job(client, asked(client, num_inference_steps=60), cancel_s=client.random.choice([0, 0.2, 0.6]))


def _job(client: Client, params: dict[str, Any], cancel_s: float | None = None) -> None:
    submitted = client.send("POST", "/jobs", 202, params=params, key=USER)
    if submitted is None or submitted.status_code != 202:
        return
    job = submitted.json()
    client.jobs[job["id"]] = job["status"]
    if cancel_s is not None:
        time.sleep(cancel_s)
        client.send("DELETE", job["urls"]["self"], key=USER)
    else:
        client.send("GET", job["urls"]["events"], leave_s=0.3, key=USER, stream=False)
    end = time.monotonic() + 60
    while time.monotonic() < end and client.jobs[job["id"]] not in ("succeeded", "failed", "canceled"):
        time.sleep(0.3)
        seen = client.send("GET", job["urls"]["self"], key=USER)
        if seen is not None and seen.status_code == 200:
            client.jobs[job["id"]] = seen.json()["status"]
    if client.jobs[job["id"]] == "succeeded":
        client.send("GET", f"/jobs/{job['id']}/result", key=USER)


@often(4)
def lora_churn(client: Client) -> None:
    """Add a LoRA, draw with it, change it, remove it."""
    name = f"churn_{uuid.uuid4().hex[:8]}"
    client.send("POST", "/admin/loras/upload", data={"name": name, "base_model": "starter/stable-diffusion", "trigger_words": "pixel"}, files={"file": (f"{name}.safetensors", LORA)})
    client.draw("POST", "/post_config", params=asked(client, lora=f"{name}:0.7"))
    client.send("PATCH", f"/admin/loras/{name}", json={"trigger_words": ["pixel", "art"]})
    client.send("POST", f"/admin/loras/{name}/verify")
    client.send("GET", "/get_available_loras")
    client.send("DELETE", f"/admin/loras/{name}")
    client.draw("POST", "/post_config", 422, params=asked(client, lora=name))


@often(2)
def lora_download(client: Client) -> None:
    """Download a LoRA and remove it, or stop in the middle."""
    name = f"from_civitai_{uuid.uuid4().hex[:8]}"
    added = client.send("POST", "/admin/loras?wait=false", 202, json={"source": client.random.choice([1, 2, 3]), "name": name})
    if added is None or added.status_code != 202:
        return
    job = added.headers["location"]
    if client.random.random() < 0.4:
        client.send("DELETE", job)
    end, state = time.monotonic() + 30, "queued"
    while time.monotonic() < end and state not in ("succeeded", "failed", "canceled"):
        time.sleep(0.3)
        seen = client.send("GET", job)
        state = seen.json()["status"] if seen is not None and seen.status_code == 200 else state
    client.send("DELETE", f"/admin/loras/{name}", 200, 404)


@often(2)
def looking_around(client: Client) -> None:
    for path in ("/capabilities", "/get_available_stable_diffs", "/buffer_status", "/get_available_embeddings", "/styles", "/wildcards", "/v1/models", "/openapi.json", "/docs", "/studio", "/admin/usage?group_by=lora,day", "/jobs?limit=3", "/admin/loras/jobs", "/admin/experiments"):
        client.send("GET", path)


@often(1)
def language_model(client: Client) -> None:
    client.send("GET", "/llm_prompt_assistance?text=apple")
    client.send("GET", "/llm_interface?text=apple")


@often(1)
def experiment(client: Client) -> None:
    id, subject = f"e-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    variants = [{"name": "plain", "prompt": "{prompt}"}, {"name": "shiny", "prompt": "{prompt}, shiny"}]
    client.send("POST", "/admin/experiments", 201, json={"id": id, "variants": variants, "metrics": [{"name": "liked", "kind": "boolean"}]})
    client.draw("POST", "/post_config", params=asked(client, experiment=id, subject=subject))
    client.send("POST", f"/experiments/{id}/outcomes", json={"metric": "liked", "value": True, "subject": subject})
    client.send("GET", f"/admin/experiments/{id}")
    client.send("POST", f"/admin/experiments/{id}/stop")


@often(1)
def unload(client: Client) -> None:
    client.send("POST", "/admin/unload", params={"model_id": client.random.choice(["starter/stable-diffusion", "starter/unidiffuser", "starter/upscaler"])})


@often(5)
def leaving(client: Client) -> None:
    """A client that does not wait for its answer."""
    slow = {"num_inference_steps": 60, "count_returned": 2}
    leave = client.random.choice([0.05, 0.3, 0.8])
    if client.random.random() < 0.7:
        client.draw("POST", "/post_config", params=asked(client, **slow), leave_s=leave)
    else:
        client.draw("POST", "/img2prompt", data={"num_inference_steps": 60}, files={"image": photo(client)}, leave_s=leave)


@often(6)
def bad_input(client: Client) -> None:
    ways: list[Callable[[], object]] = [
        lambda: client.send("POST", "/post_config", 422, params={"prompt": "x", "width": 63}),
        lambda: client.send("POST", "/post_config", 422, params={"prompt": "x", "stepz": 4}),
        lambda: client.send("POST", "/post_config", 422, params={"prompt": ""}),
        lambda: client.send("POST", "/post_config", 415, params={"prompt": "x"}, files={"image": b"no picture"}),
        lambda: client.send("POST", "/post_config", 422, params={"prompt": "x"}, files={"image": photo(client)[:300]}),
        lambda: client.send("POST", "/post_config", 401, params={"prompt": "x"}, key="wrong"),
        lambda: client.send("POST", "/admin/unload", 403, key=USER),
        lambda: client.send("POST", "/txt2img", 400, data=b"{", headers={"Content-Type": "application/json"}),
        lambda: client.send("POST", "/v1/images/generations", 400, json={"prompt": "x", "style": "vivid"}),
        lambda: client.send("POST", "/img2prompt", 422),
        lambda: client.send("POST", "/jobs", 422, params={"prompt": "x", "task": "dream"}),
        lambda: client.send("GET", f"/{uuid.uuid4()}", 404),
        lambda: client.send("GET", "/jobs/job_none", 404),
        lambda: client.send("POST", "/admin/loras/upload", 422, data={"name": "bad", "base_model": "starter/stable-diffusion"}, files={"file": ("bad.safetensors", b"\0" * 5000)}),
        lambda: client.send("POST", "/add_new_lora?name=Nobody%20Has%20This", 404),
        lambda: client.draw("POST", "/post_config", 504, params=asked(client, num_inference_steps=100, count_returned=4, deadline_s=0.05)),
        lambda: client.send("POST", "/post_config", 413, data=b"\0" * (25 * 1024 * 1024)),
    ]
    client.random.choice(ways)()


def tally(client: Client) -> Counter[str]:
    return Counter(f"{s.kind.split(' ')[1].split('/')[1] or '/'} {s.status}" for s in client.sent)
