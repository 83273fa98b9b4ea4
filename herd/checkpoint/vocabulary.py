"""The tokenizer that belongs to a checkpoint, and whether it fits the model. No torch unless a GGUF file is opened."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.errors import CheckpointError
from herd.tokenizer.files import load_tokenizer as load_files
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["check_vocabulary", "tokenizer_at"]

MAX_UNUSED = 512
"""Embedding rows beyond the vocabulary: community checkpoints round up to a power of two or add a few rows."""

_CODE_LLAMA = (32_016, 32_000)  # 34B and the Python models: the vocabulary file has 16 infill pieces without rows


def tokenizer_at(path: Path, metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in the checkpoint folder or file `path`; for GGUF from `metadata`, its keys, when already read.

    Raises CheckpointError or TokenizerError.
    """
    gguf = _gguf_in(path)
    if gguf is None:
        named = path.is_dir() or path.name.startswith("tokenizer") or path.suffix in (".model", ".tiktoken")
        return load_files(path if named else path.parent)
    from herd.tokenizer.gguf import tokenizer_from_gguf

    if metadata is None:
        from herd.checkpoint.gguf import GGUFFile

        metadata = GGUFFile(gguf).metadata
    return tokenizer_from_gguf(metadata)


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: str | os.PathLike[str]) -> None:
    """Hold the tokenizer against the model's embedding rows. Raises CheckpointError when they are not made for each other."""
    size = tokenizer.vocab_size
    if (size, rows) == _CODE_LLAMA:
        warnings.warn(f"{path}: the infill tokens have no embeddings in this model", stacklevel=3)
        return
    if size > rows or rows - size > MAX_UNUSED:
        raise CheckpointError(
            f"the tokenizer has {size} tokens, the model {rows} embedding rows: they are not from the same checkpoint",
            path=path,
        )


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that `path` is or, as a folder without other tokenizer files, holds."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if any((path / name).exists() for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")):
        return None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if files else None
