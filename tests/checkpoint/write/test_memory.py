"""Writing holds one tensor at a time: peak memory in a process of its own, whatever the source and the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

from herd.checkpoint.names import shapes
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.source import Source
from herd.model.config import plain
from tests.checkpoint.peaks import needs_peaks, run
from tests.checkpoint.test_memory import CONFIG as SMALLER
from tests.checkpoint.test_memory import state
from tests.checkpoint.write.stores import MemoryStore

Measured = Callable[[str, str, float], None]

CONFIG = replace(SMALLER, layers=plain(6))
LARGEST = 2 * max(prod(shape) for shape in shapes(CONFIG).values())

TENSORS = 3.5
"""The tensor as read (file pages), rearranged, and one being let go: of the largest, with the small change of a process."""

CHILD = """
import torch
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.source import Source

base, out = Path(sys.argv[1]), Path(sys.argv[2])
write_meta(Source(open_store(base / "hf"), None, GenerationDefaults(), None), out / "first", shards=4)  # imports, thread pools
for src, kind in (("hf", "meta"), ("meta", "safetensors"), ("hf", "wide")):
    source = Source(open_store(base / src), None, GenerationDefaults(), None)
    before = restart(trim=False)
    if kind == "meta":
        write_meta(source, out / (src + kind), shards=4)
    else:
        write_hf(source, out / (src + kind), bin=kind == "bin", shards=2, dtype=torch.float32 if kind == "wide" else None)
    print(src, kind, peak() - before)
"""


@needs_peaks
def test_peak_memory(tmp_path: Path, measured: Measured) -> None:
    """About 200 MB of bf16, from either format to another, and wider."""
    source = Source(MemoryStore(CONFIG, state(CONFIG)), None, GenerationDefaults(), None)
    write_hf(source, tmp_path / "hf")
    write_meta(source, tmp_path / "meta", shards=2)
    lines = run(CHILD, tmp_path, tmp_path / "out")
    for line in lines:
        src, kind, grown = line.split()
        times = int(grown) / (LARGEST * (2 if kind == "wide" else 1))
        measured("peak memory of writing, times the largest tensor", f"{src} to {kind}", times)
        assert times <= TENSORS, line
    assert len(lines) == 3
