"""Every kernel compiles for the GPUs that it is written for, without one, and on those it is sized for fits into registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability (CUDA programming guide, technical specifications)."""

SPILLED = {80: 64, 90: 0}
"""Bytes a thread may keep outside registers. Older devices have matrix units that read registers, and the tiles are sized for
later ones: a spilled number is slower there, not wrong."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch: int, measured: Callable[[str, str, float], None]) -> None:
    """In a process of its own, where triton is imported without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 60
    for kernel in found:
        measured(f"registers, sm_{arch}", kernel["name"], kernel["registers"])
        assert kernel["spilled"] <= SPILLED[arch], kernel
        assert kernel["shared"] <= SHARED[arch], kernel
        name = kernel["name"]
        if name.startswith(("decode", "spans", "tile")):  # on matrix units, and loads do not wait for each other
            assert kernel.get("wgmma.mma_async", 0) + kernel.get("mma.sync", 0) > 0, kernel
            assert kernel.get("cp.async.cg", 0) > 0, kernel
        if arch == 90 and name.startswith("spans"):
            assert kernel.get("wgmma.mma_async", 0) > 0, kernel
