"""The same GGUF file in llama.cpp: what herd computes from it is what its first reader computes.

llama-cpp-python has no wheel for every platform and builds for half an hour, so it is not among the test dependencies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from herd.checkpoint.gguf_store import GGUFStore
from herd.model.config import ModelConfig
from tests.build import DENSE, tokens
from tests.checkpoint.gguf_files import GGML, LLAMA_CPP, WIDE, loaded, transformers_model, write_gguf

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow


def vocabulary(size: int) -> dict[str, object]:
    """A SentencePiece vocabulary of `size` made-up pieces: llama.cpp opens no model without one."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    made_up = [f"▁w{i}" for i in range(size - len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + made_up,
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(made_up),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def their_logits(path: Path, ids: list[int], vocab: int) -> torch.Tensor:
    """llama.cpp's logits [S, V], with a KV cache in F32 and one thread."""
    cache = {"type_k": 0, "type_v": 0, "swa_full": True}
    model = llama_cpp.Llama(
        str(path), n_ctx=-(-len(ids) // 256) * 256, n_threads=1, logits_all=True, verbose=False, use_mmap=False, **cache
    )
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], dtype=np.float32)
    model.close()
    return torch.from_numpy(logits[:, :vocab])


@pytest.mark.parametrize("name", [*DENSE, *LLAMA_CPP])
def test_fp32_logits_equal_llama_cpps(name: str, tmp_path: Path, measured: Callable[[str, str, float], None]) -> None:
    config = (DENSE | LLAMA_CPP)[name]
    difference, agree = compare(config, GGML.F32, tmp_path)
    measured("GGUF F32 file in llama.cpp, max abs logit difference", name, difference)
    assert difference < 1e-3
    assert agree == 1


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_quantized_logits_are_near_llama_cpps(
    kind: str, tmp_path: Path, measured: Callable[[str, str, float], None]
) -> None:
    """llama.cpp rounds activations to 8 bits before it multiplies, herd's dequantized model does not."""
    difference, agree = compare(replace(WIDE, vocab_size=320), GGML[kind], tmp_path)
    measured("GGUF quantized file in llama.cpp, max abs logit difference", kind, difference)
    assert difference < 0.2
    assert agree > 0.9


def test_fp32_logits_beyond_the_first_chunk(tmp_path: Path, measured: Callable[[str, str, float], None]) -> None:
    """Llama 4's constants: the second chunk begins at 8192, and the query temperature rises there."""
    difference, agree = compare(LLAMA_CPP["llama-4-scout as llama.cpp has it"], GGML.F32, tmp_path, length=8192 + 40)
    measured("GGUF F32 file in llama.cpp, max abs logit difference", "llama-4-scout, 8232 tokens", difference)
    assert difference < 1e-3
    assert agree > 0.999


def compare(config: ModelConfig, kind: GGML, folder: Path, length: int = 48) -> tuple[float, float]:
    """Largest difference of logits, and the share of positions with the same most likely token."""
    path = write_gguf(folder / "tiny.gguf", transformers_model(config), kind, metadata=vocabulary(config.vocab_size))
    ids = tokens(config, length)
    with torch.no_grad():
        ours = loaded(GGUFStore(path))(ids)[0]
    theirs = their_logits(path, ids[0].tolist(), config.vocab_size)
    return float((ours - theirs).abs().max()), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
