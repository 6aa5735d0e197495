"""circus, which starts BentoML's processes and watches over them, out of reach of the machine's other users.

BentoML has it take commands on TCP ports of loopback without asking for a key, and one of its commands is to run a
program. service.py has it listen on Unix sockets instead, in a folder that its own user alone may enter.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from typing import Any

from bentoml._internal.utils import circus


def keep_private() -> None:
    """For the server's first process, before it starts the others; of no effect elsewhere, and when done again."""
    if circus.Arbiter.__name__ != "Private":
        circus.Arbiter = private(circus.Arbiter)  # type: ignore[misc]
        circus.ThreadedArbiter = private(circus.ThreadedArbiter)  # type: ignore[misc]


def private(arbiter: Any) -> Any:
    """An arbiter that takes its commands in a folder of mode 0700."""

    class Private(arbiter):  # type: ignore[misc]
        def __init__(self, watchers: Any, endpoint: str, pubsub_endpoint: str, **more: Any) -> None:
            folder = tempfile.mkdtemp(prefix="easel-control-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            super().__init__(watchers, endpoint=f"ipc://{folder}/commands", pubsub_endpoint=f"ipc://{folder}/events", **more)

    return Private
