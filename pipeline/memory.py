"""How a process that computes on a CPU deals with freed memory."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), as glibc's ``malloc.h`` numbers them."""
_FOR_CHILDREN = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_MAX_": "0"}
"""The same for processes that this one starts."""


def keep_freed_memory() -> None:
    """Lets this process, and those that it starts, keep what they free for what they allocate next.

    glibc gives large blocks back to the system as soon as they are free. A network frees and allocates the same blocks
    in every step, and each of their pages then costs a page fault and is filled with zeros by the kernel: up to half of
    the time of a forward pass, see ``benchmarks/allocation.py``. The process keeps its peak until it ends, and blocks
    of ever other sizes leave gaps that raise the peak. Other threads than the main one seem to gain nothing for blocks
    of more than 64 MiB.

    Nothing is done where the environment sets MALLOC_MMAP_*, MALLOC_TRIM_* or a tunable of ``glibc.malloc``, and with C
    libraries other than glibc.
    """
    said = any(name.startswith(("MALLOC_MMAP_", "MALLOC_TRIM_")) for name in os.environ)
    if said or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not sys.platform.startswith("linux"):
        return
    # musl has no mallopt. Where another allocator is preloaded, this changes one that nobody uses.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
        os.environ |= _FOR_CHILDREN
