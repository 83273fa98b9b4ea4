"""The tokenizer that belongs to a checkpoint (`herd.load_tokenizer`), and whether it fits the model.

No torch unless a GGUF file is opened.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from herd.checkpoint.resolve import resolve, tuned_release
from herd.errors import CheckpointError, TokenizerError, TokenizerFileError
from herd.tokenizer.files import load_tokenizer as load_files
from herd.tokenizer.gguf import tokenizer_from_gguf
from herd.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from herd.checkpoint.store import TensorStore

__all__ = [
    "FormatSource",
    "MissingTokenizer",
    "check_vocabulary",
    "format_source",
    "load_tokenizer",
    "tokenizer_at",
    "tokenizer_of",
]

FILES = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")

MAX_UNUSED = 512
"""Embedding rows beyond the vocabulary: community checkpoints round up to a power of two or add a few rows."""

FormatSource = Literal["files", "catalog"]
"""Who says which prompt format a checkpoint was trained with: its files, or, where they do not, the catalog by its folder."""

_CODE_LLAMA = (32_016, 32_000)  # 34B and the Python models: the vocabulary file has 16 infill pieces without rows


class MissingTokenizer:
    """Stands for the tokenizer of a checkpoint that came without one: the model runs, and using this says what is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copying and the like ask for these and expect a plain no
            raise AttributeError(name)
        raise CheckpointError(
            "this checkpoint came without a tokenizer: put its tokenizer.model or tokenizer.json beside the weights",
            path=self._path,
        )


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, a tokenizer or GGUF file, or a catalog name.

    Raises UnknownModelError, CheckpointError or TokenizerError.
    """
    return tokenizer_at(resolve(path_or_name))


def tokenizer_at(path: Path, metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in the checkpoint folder or file `path`; for GGUF from `metadata`, its keys, when already read.

    Meta's own files and some GGUF ones do not say whether they hold a chat model: `chat_format` is then the catalog's, where
    the folder carries the name of a tuned release. Raises CheckpointError or TokenizerError.
    """
    tokenizer = _from_files(path, metadata)
    if tokenizer.chat_format is None and not tokenizer.template:
        tokenizer.chat_format = _catalog_format(path)
    return tokenizer


def format_source(tokenizer: Tokenizer, path: Path) -> FormatSource | None:
    """Who says which prompt format `tokenizer` of the checkpoint at `path` has; None when nobody does."""
    if isinstance(tokenizer, MissingTokenizer):
        return None
    if tokenizer.template:
        return "files"
    if tokenizer.chat_format is None:
        return None
    return "catalog" if tokenizer.chat_format == _catalog_format(path) else "files"


def _catalog_format(path: Path) -> str | None:
    release = tuned_release(path)
    return None if release is None else release.chat_format


def _from_files(path: Path, metadata: Mapping[str, Any] | None) -> Tokenizer:
    if metadata is not None:
        return _from_gguf(path, metadata)
    gguf = _gguf_in(path)
    if gguf is not None:
        from herd.checkpoint.gguf import GGUFFile

        return _from_gguf(gguf, GGUFFile(gguf).metadata)
    named = path.is_dir() or path.name.startswith("tokenizer") or path.suffix in (".model", ".tiktoken")
    return load_files(path if named else path.parent)


def tokenizer_of(store: TensorStore) -> Tokenizer:
    """The tokenizer of an open checkpoint, checked against its embedding; a MissingTokenizer when it has none.

    Raises CheckpointError or TokenizerError for one that is damaged or does not fit.
    """
    path, metadata = Path(store.path), store.metadata() if store.kind == "gguf" else None
    folder = path if path.is_dir() else path.parent
    if not (
        any((folder / name).exists() for name in FILES) if metadata is None else "tokenizer.ggml.model" in metadata
    ):
        return cast(Tokenizer, MissingTokenizer(path))
    tokenizer = tokenizer_at(path, metadata)
    check_vocabulary(tokenizer, store.config.vocab_size, path)
    return tokenizer


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


def _from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    try:
        return tokenizer_from_gguf(metadata)
    except TokenizerError as error:
        raise TokenizerFileError(str(error), path=path) from None


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that `path` is or, as a folder without other tokenizer files, holds."""
    if path.is_file():
        return path if _is_gguf(path) else None
    if any((path / name).exists() for name in FILES):
        return None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if files else None


def _is_gguf(file: Path) -> bool:
    """By its first letters: Ollama's files have no suffix."""
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF" or file.suffix == ".gguf"
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=file) from error
