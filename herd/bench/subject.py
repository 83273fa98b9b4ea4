"""What is measured: the shape of a released model with random weights, or a real checkpoint. Imports no torch.

Weights are never zeros: processors skip no work for them, but denormals, caches of equal pages and compressed memory would make
figures that no real model has.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.errors import ConfigError
from herd.model.config import ModelConfig, plain
from herd.model.presets import find
from herd.quant.mix import mix

__all__ = ["TINY", "WEIGHTS", "Subject", "kind_of", "prompts", "subject"]

WEIGHTS = {"int4": "Q4_0", "int8": "Q8_0"}
"""Words for the weights beside GGUF's own."""
SHORT = {
    "1b": "llama-3.2-1b",
    "3b": "llama-3.2-3b",
    "8b": "llama-3.1-8b",
    "70b": "llama-3.1-70b",
    "scout": "llama-4-scout",
}
TINY = ModelConfig(
    dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=2048, layers=plain(2), tie_embeddings=True
)
"""A shape that is measured in no time: a test of the measuring, not of a machine."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be measured. `path` is the checkpoint; None means random weights."""

    name: str
    config: ModelConfig
    path: Path | None = None


def subject(text: str) -> Subject:
    """The checkpoint at the path `text`, or the shape of a catalog name (`llama3.2:1b`, `8b`, `nano`, `tiny`).

    A catalog name means its shape, never files that were downloaded: their path does. Raises UnknownModelError,
    CheckpointError, and ConfigError for a model that herd cannot run.
    """
    if text == "tiny":
        return Subject("tiny", TINY)
    looks_like_path = text.startswith((".", "/", "~", "\\")) or "\\" in text or Path(text).is_file()
    if text in ("nano", "herd-nano") or looks_like_path:
        path = resolve(text)
        return Subject("nano" if text.endswith("nano") else path.name, open_store(path).config, path)
    release = find(SHORT.get(text.lower(), text))
    if release.config is None:
        raise ConfigError(f"{release.name} cannot be measured: {release.why_not or 'herd does not run it'}")
    return Subject(release.id, release.config)


def kind_of(weights: str) -> str:
    """The GGUF mix that `weights` (int4, int8, bf16, q4_k_m, ...) means, or FP8, which no file has. Raises ConfigError with the
    choices."""
    if weights.lower() == "fp8":
        return "FP8"
    word = WEIGHTS.get(weights.lower())
    if word is not None:
        return word
    try:
        return mix(weights).name
    except ConfigError as error:
        raise ConfigError(f"{error}, {', '.join(WEIGHTS)}") from error


def prompts(config: ModelConfig, tokens: int, count: int = 1) -> list[list[int]]:
    """`count` prompts of random ids, the same on every machine. Texts would be the same work."""
    source = random.Random(tokens)
    return [[source.randrange(config.vocab_size) for _ in range(tokens)] for _ in range(count)]
