"""A model opened for the terminal: found by name, loaded, and ready to be talked to. Imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from herd.chat.formats import FORMATS, format_named
from herd.chat.params import SamplingParams
from herd.checkpoint.load import Checkpoint, open_checkpoint
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.engine.local import LocalChat
from herd.errors import ConfigError, PromptError
from herd.model.accounting import parameters

__all__ = ["Opened", "open_model"]

SMALL = 50_000_000
"""Parameters of a model that a CPU runs best in float32 on one thread: its matrices are so small that threads wait for each
other longer than they work (with another process on the same cores, 50 times longer), and casting costs more than reading."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in memory. `name` is what the user called it."""

    name: str
    checkpoint: Checkpoint
    chat: LocalChat

    def params(self, chosen: Mapping[str, Any]) -> SamplingParams:
        """The user's choices over the checkpoint's own defaults over Meta's."""
        defaults = self.checkpoint.defaults
        fields: dict[str, Any] = {"stop_ids": defaults.stop_ids}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(defaults, name)) is not None:
                fields[name] = value
        return SamplingParams(**(fields | dict(chosen)))

    def require_format(self) -> None:
        """Raises PromptError when the model has no prompt format, saying how a base model is used."""
        if self.chat.format.name == "base":
            raise PromptError(
                f"{self.name} is a base model: it continues text and was not taught to chat. Let it continue yours with "
                f'herd run --raw {self.name} "TEXT", or name the format it was tuned for with --format'
            )

    def about(self) -> dict[str, str]:
        """The facts of /show, by name."""
        model = self.chat.session.model
        weight = model.tok_embeddings.weight
        return {
            "model": self.name,
            "path": str(self.checkpoint.path),
            "parameters": short_count(parameters(model.config)),
            "numbers": f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}",
            "format": self.chat.format.name,
        }


def open_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_len: int | None = None,
    format_name: str | None = None,
) -> Opened:
    """Find and load `name` (a catalog name, a folder or a file). Raises a HerdError that says what to change."""
    if format_name is not None and format_name not in FORMATS:  # before gigabytes are read
        raise PromptError(f"there is no prompt format {format_name!r}; choose one of {', '.join(FORMATS)}")
    where = _device(device)
    store = open_store(resolve(name))  # headers only
    small = where.type == "cpu" and parameters(store.config) <= SMALL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    wanted = getattr(torch, dtype) if dtype != "auto" else torch.float32 if small else None
    checkpoint = open_checkpoint(name, wanted, where)
    format = None if format_name is None else format_named(format_name, checkpoint.tokenizer)
    chat = LocalChat(checkpoint.model, checkpoint.tokenizer, format=format, max_len=max_len)
    return Opened(name, checkpoint, chat)


def short_count(count: int) -> str:
    """A number of parameters as people say it: 1.24B, 35.1M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _device(name: str) -> torch.device:
    """A device that this machine has."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"this machine has no device {name!r}: use --device cpu, or auto") from None
    return device
