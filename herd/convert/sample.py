"""The text that two models are measured on, cut into windows as llama.cpp's perplexity tool cuts it.

The whole text becomes ids; windows of equal length follow each other without overlap, what does not fill the last one is left
out, and the first id of each window gives way to BOS where the vocabulary begins texts with one. Only the second half of a window
is scored: every scored token has at least half a window before it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.vocabulary import MissingTokenizer
from herd.errors import ConfigError, TokenizerError
from herd.model.config import ModelConfig
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["CONTEXT", "WINDOWS", "Reading", "Sample", "sample_of", "shipped", "text_of"]

CONTEXT = 512
"""Tokens of a window, llama.cpp's default."""
WINDOWS = 16
"""Windows that are measured unless more are asked for: each costs about three passes of a model."""
SHIPPED = "the sample text of herd"
FOR_COMPARISON = (
    "figures on herd's own sample text (2,300 tokens of old novels) are for comparing a model with its copies, "
    "nothing else"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What two models are to read: a UTF-8 file (None: the shipped sample), tokens of a window, how many windows."""

    text: str | os.PathLike[str] | None = None
    context: int | None = None
    windows: int | None = None

    def sample(self, tokenizer: Tokenizer, config: ModelConfig) -> Sample:
        """The windows for a model. Raises ConfigError, see `sample_of`."""
        return sample_of(self.text, tokenizer, config, context=self.context, windows=self.windows)


@dataclass(frozen=True, slots=True)
class Sample:
    """`windows` [W, S] int64 and what they are: the text's name, its tokens in all, and what was left out, in words."""

    name: str
    windows: Tensor
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """The first position of a window whose prediction is scored."""
        return self.windows.shape[1] // 2

    @property
    def scored(self) -> int:
        """Predictions that are scored, over all windows."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1 - self.first)


@cache
def shipped() -> str:
    """About 2,300 tokens of English prose: parts of "The Mayor of Casterbridge" (Hardy, 1886) and "Typhoon" (Conrad, 1902), which
    are in the public domain. Models may have read them: figures are for comparing a model with its copies, nothing else."""
    return (Path(__file__).with_name("sample.txt")).read_text(encoding="utf-8")


def text_of(file: str | os.PathLike[str] | None) -> tuple[str, str]:
    """(name, text) of the UTF-8 file, or of the shipped sample. Raises ConfigError when it cannot be read."""
    if file is None:
        return SHIPPED, shipped()
    path = Path(file).expanduser()
    try:
        return str(path), path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the text cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start})") from error


def sample_of(
    file: str | os.PathLike[str] | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    context: int | None = None,
    windows: int | None = None,
) -> Sample:
    """The text `file` (default: the shipped sample) for a model of `config`, in `windows` windows of `context` tokens.

    Raises ConfigError when there is no tokenizer, the text is shorter than one window, or a number makes no sense.
    """
    if isinstance(tokenizer, MissingTokenizer):
        raise ConfigError(
            "a quality report reads a text, and this checkpoint has no tokenizer: leave it out (--no-report)"
        )
    length = min(CONTEXT, config.max_seq_len) if context is None else context
    if not 4 <= length <= config.max_seq_len:
        raise ConfigError(f"windows of {length} tokens: this model takes 4 to {config.max_seq_len:,}")
    if windows is not None and windows < 1:
        raise ConfigError(f"{windows} windows: give at least 1")
    name, text = text_of(file)
    try:
        ids = tokenizer.encode(text, bos=True)
    except TokenizerError as error:
        raise ConfigError(f"{name}: {error}") from error
    if len(ids) < length:
        raise ConfigError(
            f"{name} has {len(ids):,} tokens, fewer than one window of {length}: give a longer --text, or --context {len(ids)}"
        )
    if max(ids) >= config.vocab_size:
        raise ConfigError(f"{name}: the tokenizer gives id {max(ids)}, and the model has {config.vocab_size:,} rows")
    whole = len(ids) // length
    count = min(whole, windows or WINDOWS)
    cut = torch.tensor(ids[: count * length]).view(count, length)
    if ids[0] == tokenizer.special.bos:
        cut[:, 0] = tokenizer.special.bos
    notes = (FOR_COMPARISON,) if file is None else ()
    if count < whole:
        notes += (f"{count} of the {whole:,} windows of {name} were read",)
    return Sample(name, cut, len(ids), notes)
