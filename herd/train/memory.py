"""What training asks of the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGE = 1 << 20
"""Bytes from which an allocation is one of its own, and free ones are given back, after memory was kept."""

_kept = False
"""Whether this process keeps what it frees."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, and use it again; True where the C library can (glibc).

    Every step frees and asks for the same large tensors. glibc gives each back to the system and gets it anew, full of pages
    that the kernel has to clear: half a million page faults a second, 4 to 8 % of a step of a small model on a CPU. Resident
    memory stays at the peak from then on. It changes the whole process, so programs call it, not libraries.
    """
    global _kept
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        _kept = bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False
    return _kept


def return_freed_memory() -> None:
    """Give what is free back to the system, and end `keep_freed_memory` where this process has called it.

    After that large tensors go back as soon as they are freed (from 1 MiB on: glibc's own moving limit cannot be restored); a
    process that never called it keeps its settings. For work that takes large tensors once each, which would fill the heap with
    holes: it is called again before each.
    """
    global _kept
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        if _kept:
            library.mallopt(M_MMAP_MAX, 1 << 16)
            library.mallopt(M_MMAP_THRESHOLD, LARGE)
            library.mallopt(M_TRIM_THRESHOLD, LARGE)
            _kept = False
        library.malloc_trim(0)
