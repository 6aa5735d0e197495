"""What the benchmarks over HTTP share: a server and a raw loop that work in turns, and the results file.

A machine's speed drifts, and two loads at once would slow each other down, so blocks of work
alternate and each ratio is of two neighbours. The raw loop is a process of its own: its threads
and memory are not the clients'.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, TypeVar

import requests

ROOT = Path(__file__).resolve().parent.parent
REPLY_S = 300.0  # the longest wait for one answer, of the server or of the raw loop
K = TypeVar("K")


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


Case = tuple[Callable[[], Block], Callable[[], Block]]  # one block over HTTP, and one of the raw loop


def options(description: str, rounds: int, count: int, unit: str, quick: tuple[int, int]) -> argparse.Namespace:
    """The command line that the interleaved benchmarks share: `rounds`, `count` (pictures or calls a
    block), `limit_s`, `results`, and `raw` where this process is the raw loop."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(f"--{unit}", type=int, default=count, dest="count", help="per block, and at least two per client")
    parser.add_argument("--quick", action="store_true", help=f"{quick[0]} rounds of {quick[1]} {unit}, to see that it runs")
    parser.add_argument("--limit-s", type=float, default=1200, help="start no further round after so long")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results.md")
    parser.add_argument("--raw", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.rounds, chosen.count = quick if chosen.quick else (max(1, chosen.rounds), max(1, chosen.count))
    return chosen


def in_turns(rounds: int, limit_s: float, cases: dict[K, Case]) -> dict[K, Pairs]:
    """Blocks in turns; every other round has HTTP first, so that drift favours neither side."""
    measured = {name: Pairs() for name in cases}
    end = time.monotonic() + limit_s
    for number in range(rounds):
        if time.monotonic() > end:
            print(f"out of time after {number} of {rounds} rounds", file=sys.stderr)
            break
        for name, (over_http, over_raw) in cases.items():
            pairs = measured[name]
            if number % 2:
                pairs.http.append(over_http())
            pairs.raw.append(over_raw())
            if not number % 2:
                pairs.http.append(over_http())
            print(f"round {number + 1}/{rounds}, {name}: HTTP/raw {pairs.http[-1].rate / pairs.raw[-1].rate:.3f}", file=sys.stderr)
    return measured


class Server:
    """A server process on a free loopback port: Easel with keys of its own, or what `command` makes of the port. `first`
    is its first answer, and `ran` what its headers say about it.

    Args:
        command: what starts another server, given its port.
        ready: the path that answers 200 once it is ready.
        env: more of its environment.
    """

    def __init__(self, command: Callable[[int], list[str]] | None = None, ready: str = "/readyz", env: dict[str, str] | None = None) -> None:
        self._command, self._ready, self._env = command or _serve_easel, ready, env or {}

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(24)
        own = {"API_KEY": self.key, "ADMIN_API_KEY": secrets.token_urlsafe(24), "EASEL_SERVER__PORT": str(port)}
        quiet = {"EASEL_SERVER__HOST": "127.0.0.1", "EASEL_SERVER__GRACE_S": "5", "HF_HUB_OFFLINE": "1", "BENTOML_DO_NOT_TRACK": "True"}
        self._log = tempfile.TemporaryFile()
        started = time.monotonic()
        self._process = subprocess.Popen(
            self._command(port), cwd=ROOT, env=os.environ | own | quiet | self._env, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self.pid = self._process.pid
        try:
            self._await_ready(started + REPLY_S)
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
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that outlived their server, whose group this is
        if kind:
            self._log.seek(0)
            print(self._log.read().decode(errors="replace")[-3000:], file=sys.stderr)
        self._log.close()

    def _await_ready(self, end: float) -> None:
        with self.session() as session:
            while time.monotonic() < end and self._process.poll() is None:
                with contextlib.suppress(requests.RequestException):
                    if session.get(self.url + self._ready, timeout=5).status_code == 200:
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


def _serve_easel(port: int) -> list[str]:
    return [str(Path(sys.executable).with_name("bentoml")), "serve", "service:ImageGeneration"]


class RawLoop:
    """The process that works with diffusers alone (`script --raw`), told over a pipe how much to do: its
    threads and memory are not the clients'. `hello` is what it says of itself."""

    def __init__(self, script: str, ran: dict[str, Any], env: dict[str, str] | None = None) -> None:
        for attempt in range(2):  # as in `Server.start_with`
            command = [sys.executable, script, "--raw", json.dumps(ran)]
            self._process = subprocess.Popen(command, env=os.environ | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.pid = self._process.pid
            try:
                self.hello = self._reply()
                return
            except BaseException as error:
                self.close()
                if attempt or not isinstance(error, RuntimeError):
                    raise
                time.sleep(3)

    def block(self, work: int | str, count: int) -> Block:
        """Have `count` pieces of work done, told as `work`."""
        took = self.ask(work)["took"]
        return Block(count / sum(took), took[1:])

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
