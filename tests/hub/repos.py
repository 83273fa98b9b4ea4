"""The repositories of the test hub: made up, but with the files that real ones have."""

from __future__ import annotations

import json
import random

TINY, GGUF = "someone/Tiny-Llama", "someone/Tiny-GGUF"
_random = random.Random(7)


def noise(count: int) -> bytes:
    return _random.randbytes(count)


SHARDS = {f"model-0000{n}-of-00003.safetensors": noise(700_000 + n) for n in (1, 2, 3)}
BIG = "model-00002-of-00003.safetensors"
REPOS: dict[str, dict[str, bytes]] = {
    TINY: {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# Tiny\n",
        "LICENSE": b"none\n",
        "config.json": json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}).encode(),
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {f"t{i}": name for i, name in enumerate(SHARDS)}}
        ).encode(),
        "tokenizer.json": noise(50_000),
        "tokenizer.model": noise(20_000),
        **SHARDS,
        "pytorch_model.bin": noise(1000),
        "pytorch_model.bin.index.json": b"{}",
        "original/params.json": b"{}",
        "original/tokenizer.model": noise(10),
        "original/consolidated.00.pth": noise(1000),
        "onnx/model.onnx": noise(10),
    },
    GGUF: {
        "README.md": b"# Tiny GGUF\n",
        "Tiny-Q4_K_M.gguf": noise(5000),
        "Tiny-Q4_K_S.gguf": noise(4000),
        "Tiny-Q8_0-00001-of-00002.gguf": noise(3000),
        "Tiny-Q8_0-00002-of-00002.gguf": noise(3001),
        "Tiny-f16.gguf": noise(6000),
        "Tiny-bf16.gguf": noise(6001),
        "mmproj-Tiny-f16.gguf": noise(100),
    },
}
TAKEN = {
    "README.md",
    "LICENSE",
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    *SHARDS,
}
"""What a plain pull of TINY brings."""
