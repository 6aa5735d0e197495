"""What the C allocator does with large buffers, in processes of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from core.settings import ROOT

MAPPED = """
import ctypes, sys
from core import allocator
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "small":
    allocator.keep_small()
libc.free(libc.malloc(20 * 2**20))  # the body of a large request
before = libc.mallinfo2().hblks
kept = libc.malloc(2**20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize(("how", "mapped"), [("small", 1), ("as it is", 0)])
def test_a_large_buffer_has_pages_of_its_own_after_a_larger_one_was_freed(how: str, mapped: int) -> None:
    done = subprocess.run([sys.executable, "-c", MAPPED, how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == mapped
