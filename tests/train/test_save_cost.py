"""What a checkpoint costs the run that stands still for it: memory and work, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SIZE = 120e6
"""Bytes of weights and states that are saved."""
MEMORY = 1.25
"""Of what the process held before; the bar of the plan is a quarter more."""
SHARE, RUN, EVERY = 0.1, 66e6 * 12, 60
"""A run of 66 million parameters (float32, with AdamW's two states) that saves once a minute may give a tenth of it to saving.
Seconds of the processor: what a disk adds, it adds to any program."""

CHILD = """
import sys, time
from pathlib import Path
import torch
from herd.parallel.mesh import Mesh
from herd.train.payload import OneFile
from herd.train.state import Checkpoints

def resident(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) << 10

torch.set_num_threads(1)
saves = Checkpoints(Path(sys.argv[1]), OneFile(), 2, Mesh.single(), print)
saves.prepare(0)
tensors = {f"weight.{i}": torch.randn(5_000_000) for i in range(5)} | {f"norm.{i}": torch.randn(5_000) for i in range(1000)}
saves.save(1, {"weight": torch.zeros(1)}, {}, {})  # imports
times = []
for step in (2, 3):
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = resident("VmRSS"), time.process_time()
    saves.save(step, tensors, {}, {})
    times.append(time.process_time() - begin)
size = sum(p.stat().st_size for p in (Path(sys.argv[1]) / "checkpoints/step-00000003").iterdir())
print(size, before, resident("VmHWM"), min(times))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_save_takes_little_memory_and_a_tenth_of_a_minute_at_most(
    tmp_path: Path, measured: Callable[[str, str, float], None]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
    size, before, peak, seconds = (float(word) for word in ran.stdout.split())
    assert size == pytest.approx(SIZE, rel=0.01)
    measured("memory of a checkpoint while training", "peak, times what was held before", peak / before)
    measured("processor seconds of a checkpoint while training", "66 M parameters", seconds / size * RUN)
    assert peak <= MEMORY * before
    assert seconds / size * RUN <= SHARE * EVERY
