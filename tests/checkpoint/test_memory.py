"""Loading takes at most 1.2 times the bytes of the loaded tensors, measured in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from herd.checkpoint.names import join, shapes, sources
from herd.model.config import ModelConfig, plain
from tests.checkpoint.folders import meta_params
from tests.checkpoint.peaks import needs_peaks, run

Measured = Callable[[str, str, float], None]

CONFIG = ModelConfig(
    dim=1024, n_heads=16, n_kv_heads=8, head_dim=64, hidden_dim=4096, vocab_size=2000, layers=plain(3), rope_theta=1e4
)

CHILD = """
import torch
from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.model.llama import Llama

torch.zeros(10).to(torch.bfloat16).float()
for path in sys.argv[1:]:
    for dtype in ("bfloat16", "float32"):
        before = restart()
        model = fill(open_store(path), getattr(torch, dtype))
        loaded = peak()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        touched = sum(int(p.view(torch.uint8).view(-1)[::4096].sum()) for p in model.parameters())
        print(Path(path).name, dtype, (loaded - before) / size, (peak() - before) / size, size)
        del model
"""


def state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights in bf16; values do not matter, but output and embedding must differ."""
    made = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes(config).items()}
    made["tok_embeddings.weight"].uniform_()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 100 MB of weights as safetensors, as pytorch_model.bin and as two of Meta's ranks."""
    base, ours = tmp_path_factory.mktemp("memory"), state(CONFIG)
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


@pytest.fixture(scope="module")
def peaks(folders: dict[str, Path]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Of each kind and dtype: the peak when it is loaded and when all is read, times the size; and the size."""
    rows = [line.split() for line in run(CHILD, *folders.values())]
    return {(kind, dtype): tuple(map(float, figures)) for kind, dtype, *figures in rows}


@needs_peaks
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta"])
def test_peak_memory(
    peaks: dict[tuple[str, str], tuple[float, ...]], kind: str, dtype: str, measured: Measured
) -> None:
    """Views cost what is copied (re-paired rows, joined ranks); casts the result, and one tensor more."""
    loading, reading, size = peaks[kind, dtype]
    assert size > 100e6
    measured("peak memory of loading, times the tensor bytes", f"{kind} to {dtype}", loading)
    measured("peak memory of loading, times the tensor bytes", f"{kind} to {dtype}, all touched", reading)
    assert loading <= 1.2
    assert 0.95 <= reading <= 1.2
    if dtype == "bfloat16" and kind != "meta":
        assert loading < 0.3
