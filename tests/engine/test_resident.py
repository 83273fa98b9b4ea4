"""A quantized model that runs holds its weights once: resident memory is the file's weights and the cache, and little else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from herd.kernels import native
from herd.model.config import ModelConfig, plain
from tests.checkpoint.gguf_files import GGML, write_noise

Measured = Callable[[str, str, float], None]

CONFIG = ModelConfig(
    dim=1024, n_heads=16, n_kv_heads=8, head_dim=64, hidden_dim=4096, vocab_size=2000, layers=plain(6), rope_theta=1e4
)
"""More than 40 MB in blocks of four bits."""
SHARE = 1.12
"""Resident bytes over the bytes of the weights in the file, beside keys and values: the goal for every size. Panels are at most
1.03 times their blocks; the rest is rows of the embedding that were looked up."""
FIXED = 6 << 20
"""Scratch memory of a step and what the allocator keeps, whatever the model's size: nothing beside a model worth quantizing."""

CHILD = """
import sys
from herd.chat.params import SamplingParams
from herd.checkpoint.load import load_model
from herd.engine.paged_session import PagedSession, session_for
from tests.build import build
import torch

def memory(field):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field))) << 10

list(session_for(build("llama-2")).generate([1], SamplingParams(max_tokens=2)))  # everything is imported and has run once
before = memory("VmRSS")
session = session_for(load_model(sys.argv[1]), max_len=512)
peak = memory("VmHWM") - before
assert isinstance(session, PagedSession)
for start in range(0, 300, 60):
    session._forward(list(range(start, start + 60)))
print(memory("VmRSS") - before - session.paged.nbytes, peak)
"""


@pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "tied"), [(GGML.Q4_0, False), pytest.param(GGML.Q4_0, True, marks=pytest.mark.slow), (GGML.Q4_K, True)]
)
def test_weights_are_resident_once(kind: GGML, tied: bool, tmp_path: Path, measured: Measured) -> None:
    path = write_noise(tmp_path / "noise.gguf", replace(CONFIG, tie_embeddings=tied), kind)
    size = path.stat().st_size
    assert size > 40e6
    out = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    resident, peak = map(int, out.stdout.split())
    measured(
        "resident memory beside the cache, times the file",
        f"{kind.name}, {'tied' if tied else 'untied'}",
        resident / size,
    )
    measured("peak memory of loading a quantized file, times the file", kind.name, peak / size)
    assert resident <= SHARE * size + FIXED
    assert peak <= 1.3 * size  # and one tensor of the file
