"""What a server's processes hold: memory, open files, threads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

# By what stands in their command lines; circus, which minds them, has none of these.
ROLES = ("ImageGeneration", "StableDiffusion", "UniDiffuser")


@dataclass(frozen=True)
class Held:
    """Of one process at one time. `uss` are the bytes that it alone has: its share of libraries would change with whatever else on
    the machine maps them."""

    role: str
    pid: int
    uss: int
    rss: int
    files: int
    threads: int
    cpu_s: float


def look(pid: int) -> list[Held]:
    """The server's own process ("server") and all below it, those that BentoML starts for services by their names."""
    found = []
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                memory, times, words = process.memory_full_info(), process.cpu_times(), process.cmdline()
                role = next((r for r in ROLES if r in words), "server" if process.pid == pid else words[-1][:40] if words else "gone")
                found.append(Held(role, process.pid, memory.uss, memory.rss, process.num_fds(), process.num_threads(), times.user + times.system))
        except psutil.NoSuchProcess:
            continue
    return found


def cpu_s(pid: int) -> float:
    return sum(held.cpu_s for held in look(pid))


class Pace:
    """Keeps the server to a share of a core on average, by waiting before more is asked of it."""

    def __init__(self, pid: int, cores: float) -> None:
        self._pid, self._cores, self._used, self._since = pid, cores, cpu_s(pid), time.monotonic()

    def wait(self) -> None:
        while cpu_s(self._pid) - self._used > self._cores * (time.monotonic() - self._since):
            time.sleep(0.5)
