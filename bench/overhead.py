"""Pictures through HTTP against a plain diffusers loop: what the service costs.

`.venv/bin/python bench/overhead.py` starts the service on a free loopback port and a second
process that draws with diffusers alone, has them draw in turns (a machine's speed drifts, and the
two would slow each other down), and writes what it measured to bench/results.md.

The raw loop does the same useful work: the pipeline called with the prompt as a string, a CPU
generator per picture, and a PNG made by Pillow. The device, dtype, size and steps are the ones that
the service says it ran.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import math
import os
import platform
import secrets
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
MODEL, PROMPT, SECTION = "starter/stable-diffusion", "red apple on a table", "## Overhead over HTTP"
ASKED = {"prompt": PROMPT, "model_id": MODEL, "num_inference_steps": 25, "guidance_scale": 5.0}
POST = "/post_config"
CLIENTS = (1, 8)
REPLY_S = 300.0  # the longest wait for one answer, of the server or of the raw loop


@dataclass
class Block:
    """Pictures drawn without a pause. A client's first is not among the latencies: all clients start
    at once on an empty queue, which later pictures do not meet."""

    rate: float
    latencies: list[float]


@dataclass
class Pairs:
    """Blocks at one number of clients, each with the raw block beside it in time."""

    http: list[Block] = field(default_factory=list)
    raw: list[Block] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=8, help="per block, and at least two per client")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 pictures, to see that it runs")
    parser.add_argument("--limit-s", type=float, default=1200, help="start no further round after so long")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    parser.add_argument("--raw", type=json.loads, help=argparse.SUPPRESS)  # this process is the raw loop
    options = parser.parse_args()
    if options.raw:
        raw_loop(options.raw)
        return
    rounds, pictures = (2, 2) if options.quick else (max(1, options.rounds), max(1, options.pictures))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end too
    load = os.getloadavg()[0]
    with Server() as server:
        server.start_with(POST, {**ASKED, "seed": 0})
        raw = RawLoop(__file__, server.ran)
        with contextlib.closing(raw):
            difference = same_picture(server.first, raw)
            measured = measure(server, raw, rounds, pictures, time.monotonic() + options.limit_s)
            section = report(measured, server, raw.hello, difference, load)
    write(options.results, SECTION, section)
    print(section)


def measure(server: Server, raw: RawLoop, rounds: int, pictures: int, end: float) -> dict[int, Pairs]:
    """Blocks in turns; every other round has HTTP first, so that drift favours neither side."""
    measured = {clients: Pairs() for clients in CLIENTS}
    for number in range(rounds):
        if time.monotonic() > end:
            print(f"out of time after {number} of {rounds} rounds", file=sys.stderr)
            break
        for clients, pairs in measured.items():
            if number % 2:
                pairs.http.append(server.draw(clients, pictures))
            pairs.raw.append(raw.draw(max(2, pictures)))
            if not number % 2:
                pairs.http.append(server.draw(clients, pictures))
            ratio = pairs.http[-1].rate / pairs.raw[-1].rate
            print(f"round {number + 1}/{rounds}, {clients} clients: HTTP/raw {ratio:.3f}", file=sys.stderr)
    return measured


class Server:
    """`bentoml serve` on a free loopback port with keys of its own; `first` is its first answer, and
    `ran` what its headers say about it. bench/unidiffuser.py uses it too."""

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(24)
        own = {"API_KEY": self.key, "ADMIN_API_KEY": secrets.token_urlsafe(24), "EASEL_SERVER__PORT": str(port)}
        quiet = {"EASEL_SERVER__HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1", "BENTOML_DO_NOT_TRACK": "True"}
        self._log = tempfile.TemporaryFile()
        command = [str(Path(sys.executable).with_name("bentoml")), "serve", "service:ImageGeneration"]
        started = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own | quiet, stdout=self._log, stderr=self._log, start_new_session=True
        )
        try:
            self._await_ready(started + 180)
            self.start_s = time.monotonic() - started
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the group is this server and its workers
            self._process.wait()
        if kind:
            self._log.seek(0)
            print(self._log.read().decode(errors="replace")[-3000:], file=sys.stderr)
        self._log.close()

    def _await_ready(self, end: float) -> None:
        with self.session() as session:
            while time.monotonic() < end and self._process.poll() is None:
                with contextlib.suppress(requests.RequestException):
                    if session.get(self.url + "/readyz", timeout=5).status_code == 200:
                        return
                time.sleep(0.05)
        raise RuntimeError("the server did not become ready")

    def start_with(self, path: str, params: dict[str, Any], **body: Any) -> None:
        """Make the first call (the model is loaded for it); sets `first_s`, its seconds, `first` and `ran`."""
        with self.session() as session:
            for _ in range(2):  # training may be rewriting the weights just now
                sent = time.monotonic()
                answer = session.post(self.url + path, params=params, timeout=REPLY_S, **body)
                if answer.status_code == 200:
                    names = ("model", "device", "dtype", "size", "steps", "guidance-scale", "scheduler")
                    self.ran = {name: answer.headers[f"x-easel-{name}"] for name in names}
                    self.first_s, self.first = time.monotonic() - sent, answer.content
                    return
                time.sleep(3)
        raise RuntimeError(f"no answer: {answer.status_code} {answer.text[:500]}")

    def session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # no proxy between this process and its own server
        session.headers["X-API-Key"] = self.key
        return session

    def draw(self, clients: int, pictures: int) -> Block:
        return self.load(clients, pictures, POST, lambda seed: {"params": {**ASKED, "seed": seed}}, b"\x89PNG")

    def load(self, clients: int, calls: int, path: str, call: Callable[[int], dict[str, Any]], starts: bytes = b"") -> Block:
        """A closed loop: each client makes its next call when it has the last one's answer."""
        each = max(2, math.ceil(calls / clients))

        def client(number: int) -> list[float]:
            took = []
            with self.session() as session:
                for i in range(number * each, (number + 1) * each):
                    sent = time.perf_counter()
                    answer = session.post(self.url + path, timeout=REPLY_S, **call(i))
                    took.append(time.perf_counter() - sent)
                    if answer.status_code != 200 or not answer.content.startswith(starts):
                        raise RuntimeError(f"no answer: {answer.status_code} {answer.text[:500]}")
            return took

        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            latencies = list(pool.map(client, range(clients)))
            seconds = time.perf_counter() - began
        return Block(clients * each / seconds, [s for took in latencies for s in took[1:]])


class RawLoop:
    """The process that works with diffusers alone (`script --raw`), told over a pipe how much to do: its
    threads and memory are not the clients'. `hello` is what it says of itself."""

    def __init__(self, script: str, ran: dict[str, Any]) -> None:
        for attempt in range(2):  # as in `Server.start_with`
            command = [sys.executable, script, "--raw", json.dumps(ran)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                self.hello = self._reply()
                return
            except BaseException as error:
                self.close()
                if attempt or not isinstance(error, RuntimeError):
                    raise
                time.sleep(3)

    def picture(self) -> bytes:
        """The picture of seed 0; it also warms the process up, as the server's first does."""
        return base64.b64decode(self.ask(1)["last"])

    def draw(self, pictures: int) -> Block:
        took = self.ask(pictures)["took"]
        return Block(pictures / sum(took), took[1:])

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, work: int | str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline() if select.select([self._process.stdout], [], [], REPLY_S)[0] else ""
        if not line:
            raise RuntimeError("the raw loop ended or did not answer")
        return dict(json.loads(line))


def raw_loop(ran: dict[str, Any]) -> None:
    """The other end of `RawLoop`: reads counts, answers in lines of JSON, ends when its input does."""
    pipe_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    sys.path.insert(0, str(ROOT))
    import torch
    from diffusers import StableDiffusionPipeline

    from core import settings

    if threads := settings.load().models.cpu_threads:  # the runner does the same
        torch.set_num_threads(threads)
    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / MODEL, torch_dtype=getattr(torch, ran["dtype"]), safety_checker=None, local_files_only=True
    ).to(ran["device"])
    pipe.set_progress_bar_config(disable=True)
    width, height = map(int, ran["size"].split("x"))
    name = torch.cuda.get_device_name(ran["device"]) if ran["device"].startswith("cuda") else ran["device"]

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=pipe_out, flush=True)

    answer({"threads": torch.get_num_threads(), "device": name, "scheduler": type(pipe.scheduler).__name__})
    for line in sys.stdin:
        took, out = [], io.BytesIO()
        for seed in range(int(line)):
            began, out = time.perf_counter(), io.BytesIO()
            picture = pipe(
                PROMPT,
                num_inference_steps=int(ran["steps"]),
                guidance_scale=float(ran["guidance-scale"]),
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
            picture.save(out, "PNG", compress_level=4)  # the service's level
            took.append(time.perf_counter() - began)
        answer({"took": took, "last": base64.b64encode(out.getvalue()).decode()})


def same_picture(png: bytes, raw: RawLoop) -> int:
    """The largest difference of any channel between the two's pictures of seed 0, of 255."""
    both = [Image.open(io.BytesIO(data)).convert("RGB") for data in (png, raw.picture())]
    return max(high for _, high in ImageChops.difference(*both).getextrema())


def report(measured: dict[int, Pairs], server: Server, hello: dict[str, Any], difference: int, load: float) -> str:
    """The section for the results file."""
    ran, rounds, one = server.ran, len(measured[1].http), measured[1]
    added = [
        1000 * (statistics.median(h.latencies) - statistics.median(r.latencies))
        for h, r in zip(one.http, one.raw, strict=True)
    ]
    lines = [
        SECTION,
        "",
        where("bench/overhead.py", load),
        "",
        f"{ran['model']} on {hello['device']}, {ran['dtype']}, {ran['size']}, {ran['steps']} steps, "
        f"guidance {ran['guidance-scale']}, {ran['scheduler']} (raw: {hello['scheduler']}), "
        f"{hello['threads']} torch threads, {rounds} rounds. Raw is the pipeline called with the prompt as a string, a CPU "
        "generator per picture and a PNG made by Pillow, one picture after another. Raw and HTTP draw in turns; each "
        "ratio is of two neighbouring blocks. Latency at several clients is mostly waiting in the queue.",
        "",
        "| clients | HTTP pictures/s | raw pictures/s | HTTP / raw, median (min to max) "
        "| HTTP p50 / p95, ms | raw p50 / p95, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(clients, pairs) for clients, pairs in measured.items()),
        "",
        f"- Added latency at 1 client, p50: {spread(added, 1)} ms.",
        f"- `bentoml serve` to /readyz 200: {server.start_s:.1f} s; "
        f"then to the first picture, with the model's loading: {server.first_s:.1f} s.",
        f"- Largest difference between the two's pictures of one seed: {difference} of 255 "
        "(large where the weights were rewritten between the two loads).",
    ]
    return "\n".join(lines) + "\n"


def row(clients: int | str, pairs: Pairs) -> str:
    ratios = [h.rate / r.rate for h, r in zip(pairs.http, pairs.raw, strict=True)]
    rates = [f"{statistics.median(block.rate for block in side):.2f}" for side in (pairs.http, pairs.raw)]
    latencies = [percentiles([s for block in side for s in block.latencies]) for side in (pairs.http, pairs.raw)]
    return f"| {clients} | {' | '.join(rates)} | {spread(ratios, 3)} | {' | '.join(latencies)} |"


def where(script: str, load: float) -> str:
    """The command, the machine and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "bentoml"))
    return (
        f"`.venv/bin/python {script} {' '.join(sys.argv[1:])}".strip() + f"`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{processor()}, {os.cpu_count()} cores (load average {load:.1f} before the run), "
        f"Python {platform.python_version()}, {versions}."
    )


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"{1000 * statistics.median(ordered):.0f} / {1000 * p95:.0f}"


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path, heading: str, section: str) -> None:
    """Put the section in place of the one before, and leave the file's other sections alone."""
    text = path.read_text() if path.exists() else "# Results\n"
    before, found, after = text.partition(heading + "\n")
    _, more, rest = after.partition("\n## ") if found else ("", "", "")
    path.write_text(before.rstrip() + "\n\n" + section + (more + rest))


if __name__ == "__main__":
    main()
