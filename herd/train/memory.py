"""What training asks of the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGE = 1 << 20
"""Bytes from which an allocation is one of its own, and free ones are given back."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, and use it again; True where the C library can (glibc).

    Every step frees and asks for the same large tensors. glibc gives each back to the system and gets it anew, full of pages
    that the kernel has to clear: half a million page faults a second, 4 to 8 % of a step of a small model on a CPU. Resident
    memory stays at the peak from then on. It changes the whole process, so programs call it, not libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: what is free goes back to the system, and large tensors from now on as soon as they are freed.

    For work that takes large tensors once each, which would fill the heap with holes: it is called again before each.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_MAX, 1 << 16)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, LARGE)
        library.malloc_trim(0)
