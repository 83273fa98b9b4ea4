"""Writing holds one tensor at a time: peak memory in a process of its own, whatever the source and the result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.source import Source
from tests.checkpoint.test_memory import CONFIG, state
from tests.checkpoint.write.stores import MemoryStore

Measured = Callable[[str, str, float], None]

LARGEST = max(t.numel() * t.itemsize for t in state().values())

TENSORS = 3.5
"""The tensor as read (file pages), rearranged, and one being let go: of the largest, with the small change of a process."""

CHILD = """
import sys
from pathlib import Path
import torch
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.source import Source

def peak(start):
    Path("/proc/self/clear_refs").write_text("5") if start else None
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10

base, out = Path(sys.argv[1]), Path(sys.argv[2])
write_meta(Source(open_store(base / "hf"), None, GenerationDefaults(), None), out / "first", shards=4)  # imports, thread pools
for src, kind in (("hf", "meta"), ("meta", "safetensors"), ("hf", "wide")):
    source = Source(open_store(base / src), None, GenerationDefaults(), None)
    before = peak(True)
    if kind == "meta":
        write_meta(source, out / (src + kind), shards=4)
    else:
        write_hf(source, out / (src + kind), bin=kind == "bin", shards=2, dtype=torch.float32 if kind == "wide" else None)
    print(src, kind, peak(False) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory(tmp_path: Path, measured: Measured) -> None:
    """About 200 MB of bf16, from either format to another, and wider."""
    source = Source(MemoryStore(CONFIG, state()), None, GenerationDefaults(), None)
    write_hf(source, tmp_path / "hf")
    write_meta(source, tmp_path / "meta", shards=2)
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    for line in out.stdout.splitlines():
        src, kind, grown = line.split()
        times = int(grown) / (LARGEST * (2 if kind == "wide" else 1))
        measured("peak memory of writing, times the largest tensor", f"{src} to {kind}", times)
        assert times <= TENSORS, line
    assert len(out.stdout.splitlines()) == 3
