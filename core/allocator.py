"""What the entry's C allocator keeps of memory that was freed, kept small.

glibc gives each thread a heap of its own, and large buffers pages of their own, which go back when they are freed; but "large" becomes what
the largest one freed so far was, up to 32 MiB. In a process whose threads decode and encode pictures and bodies of all sizes, heaps then grow for hours
by what lies between. (mallopt(3), M_MMAP_THRESHOLD and M_ARENA_MAX.)
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
LARGE = 128 * 1024  # bytes; glibc's own first value
HEAPS = 2


def keep_small() -> None:
    """For this process, from now on; of no effect without glibc. Runners are left alone: their tensors would be mapped anew at each step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_ARENA_MAX, HEAPS)
