"""Loading takes at most 1.2 times the bytes of the loaded tensors, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from herd.checkpoint.names import join, shapes, sources
from herd.model.config import ModelConfig, plain
from tests.checkpoint.folders import meta_params

Measured = Callable[[str, str, float], None]

CONFIG = ModelConfig(
    dim=1024, n_heads=16, n_kv_heads=8, head_dim=64, hidden_dim=4096, vocab_size=2000, layers=plain(6), rope_theta=1e4
)

CHILD = """
import sys, torch
from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.model.llama import Llama

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10

fill  # everything is imported
torch.zeros(10).to(torch.bfloat16).float()
before = peak()
model = fill(open_store(sys.argv[1]), getattr(torch, sys.argv[2]))
loaded = peak()
size = sum(p.numel() * p.element_size() for p in model.parameters())
touched = sum(int(p.view(torch.uint8).view(-1)[::4096].sum()) for p in model.parameters())
print((loaded - before) / size, (peak() - before) / size, size)
"""


def state() -> dict[str, torch.Tensor]:
    """About 200 MB of bf16; values do not matter, but output and embedding must differ."""
    made = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes(CONFIG).items()}
    made["tok_embeddings.weight"].uniform_()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as safetensors, as pytorch_model.bin and as two of Meta's ranks."""
    base, ours = tmp_path_factory.mktemp("memory"), state()
    foreign = {
        name: join(group, [ours[home.canonical] for home in group], CONFIG).contiguous()
        for name, group in sources(CONFIG, "hf").items()
    }
    c = CONFIG
    config = {
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "vocab_size": c.vocab_size,
    }
    config |= {"num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads}
    for kind in ("safetensors", "bin", "meta"):
        (base / kind).mkdir()
        (base / kind / "config.json").write_text(json.dumps(config))
    save_file(foreign, base / "safetensors" / "model.safetensors")
    torch.save(foreign, base / "bin" / "pytorch_model.bin")
    (base / "meta" / "config.json").unlink()
    (base / "meta" / "params.json").write_text(json.dumps(meta_params(CONFIG)))
    for rank in range(2):
        part = {}
        for name, tensor in ours.items():
            dim = None if tensor.ndim == 1 else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            part[name] = tensor if dim is None else tensor.chunk(2, dim)[rank].clone()
        torch.save(part, base / "meta" / f"consolidated.{rank:02d}.pth")
    return {kind: base / kind for kind in ("safetensors", "bin", "meta")}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta"])
def test_peak_memory(folders: dict[str, Path], kind: str, dtype: str, measured: Measured) -> None:
    """Views cost what is copied (re-paired rows, joined ranks); casts the result, and one tensor more."""
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(folders[kind]), dtype], capture_output=True, text=True, check=True
    )
    loading, reading, size = map(float, out.stdout.split())
    assert size > 190e6
    measured("peak memory of loading, times the tensor bytes", f"{kind} to {dtype}", loading)
    measured("peak memory of loading, times the tensor bytes", f"{kind} to {dtype}, all touched", reading)
    assert loading <= 1.2
    assert reading <= 1.2
    if dtype == "bfloat16" and kind != "meta":
        assert loading < 0.3
