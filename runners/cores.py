"""The cores of a CPU, divided among the runners that are busy on it at the moment.

Where processes have more threads than there are cores, OpenMP's threads wait for one another at full
speed, and each process comes out several times slower than with its part of the cores. Who is busy is
known by locks on files in a folder that all runners of one user share, also those of services that were
started apart; the system gives back the lock of a process that has ended, however it did.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from bentoml._internal.resource import system_resources

log = logging.getLogger("easel.device")
TOKENS = 16  # busy runners that are told apart; one for which there is no token has a single thread
FOLDER = Path(tempfile.gettempdir()) / f"easel-cores-{os.getuid()}"
LOOK_S = 0.1  # looking takes some fifty system calls
LINGER_S = 0.1  # a runner counts as busy so long after its work: short calls in a row are work without a pause


def available() -> int:
    """The cores that this process may use: as OpenMP counts them (OMP_NUM_THREADS, affinity), within the
    container's quota, which OpenMP does not know."""
    return min(torch.get_num_threads(), max(1, int(system_resources()["cpu"])))


class Cores:
    """One runner's part of the cores: all of them while it alone is busy, then an equal part.

    To be used in the thread that computes: torch has a number of threads for each that starts them.

    Args:
        fixed: the threads to use whoever else is busy; None: its part of the cores.
        cores: how many there are for all runners; None: as `available` says.
        folder: where the locks are.
    """

    def __init__(self, fixed: int | None = None, cores: int | None = None, folder: Path | None = None) -> None:
        self._fixed, self._cores = fixed, cores or available()
        self._held = False
        self._mine, self._looked = 0, 0.0
        try:
            self._tokens = _open(folder or FOLDER)
        except OSError as error:
            log.warning("runners on this CPU cannot tell each other that they are busy: %s", error)
            self._tokens = []

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Compute with this runner's part of the cores, and have the other runners know."""
        self.divide()
        try:
            yield
        finally:
            self._release()

    def divide(self) -> int:
        """Take as many threads as are this runner's part now; to be called between steps. It looks every `LOOK_S` at most."""
        if not self._held:
            self._take()
        elif time.monotonic() - self._looked < LOOK_S:
            return torch.get_num_threads()
        self._looked = time.monotonic()
        threads = self._fixed or self._part()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        return threads

    def _part(self) -> int:
        """An equal part, and one of the cores that are left over for each of the first tokens."""
        if not self._tokens:
            return self._cores
        if not self._held:
            return 1
        busy = [i for i, token in enumerate(self._tokens) if i == self._mine or _taken(token)]
        each, left = divmod(self._cores, len(busy))
        return max(1, each + (busy.index(self._mine) < left))

    def _take(self) -> None:
        """Hold a token: the last one again, so that it is not counted as another's while it lingers."""
        for i in sorted(range(len(self._tokens)), key=lambda i: (i != self._mine, i)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._tokens[i], fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._held, self._mine = True, i
                return

    def _release(self) -> None:
        if self._held:
            os.utime(self._tokens[self._mine])
            fcntl.flock(self._tokens[self._mine], fcntl.LOCK_UN)
            self._held = False


@lru_cache
def _open(folder: Path) -> list[int]:
    """The tokens' files, once for a process; they stay when everyone has gone.

    Raises:
        OSError: where the folder cannot be had, or may be another user's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not folder.is_dir():
        raise PermissionError(f"{folder} is not a private folder of this user")
    return [os.open(folder / str(i), os.O_RDWR | os.O_CREAT, 0o600) for i in range(TOKENS)]


def _taken(token: int) -> bool:
    """Whether another process holds it, or did a moment ago."""
    try:
        fcntl.flock(token, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(token, fcntl.LOCK_UN)
    return time.time() - os.fstat(token).st_mtime < LINGER_S
