"""What is being converted: an opened checkpoint with everything that has to travel along."""

from __future__ import annotations

from dataclasses import dataclass

from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors, tokenizer, sampling defaults and chat template (Jinja) of a checkpoint.

    `tokenizer` is None when the checkpoint has none, `template` when neither it nor herd has one for its prompt format.
    """

    store: TensorStore
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    template: str | None
