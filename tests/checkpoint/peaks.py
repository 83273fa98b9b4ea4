"""Peak memory, several times in one process: code that goes before the program of a child."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["needs_peaks", "run"]

needs_peaks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")

PRELUDE = """
import ctypes, gc, sys
from pathlib import Path

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10

def restart(trim=True):
    # What was freed goes back to the system first: memory that is used again would not count.
    if trim:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda spare: None)(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
"""


def run(program: str, *arguments: object) -> list[str]:
    """The lines that `program` writes; it has `restart()`, which forgets the peak and returns it, and `peak()`, in bytes."""
    asked = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
