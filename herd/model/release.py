"""What is known about one released model: its geometry, names, sizes and what nobody could verify. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from herd.model.config import ModelConfig
from herd.tokenizer.tokenizer import Family

__all__ = ["Kind", "Release", "dense", "meta"]

Kind = Literal["dense", "moe", "llama4-dense", "mllama", "deberta-v2-classifier"]
"""Architecture: Llama 1 to 3 text; Llama 4; Llama 4 without experts; Llama 3.2 Vision; Prompt Guard's encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One row of the catalog (`herd.model.presets.RELEASES`).

    `config` is the text decoder that herd builds; None where there is none to build yet. `total_params` counts everything
    that was released, vision included; `text_params` the decoder alone; `active_params` what one text token passes through.
    `tokenizer` is the vocabulary family and `chat_format` the prompt format of the tuned variant (None: only a base model,
    or no Llama). Names: `hf_base`, `hf_instruct` are Hugging Face ids, `native` Meta's own, `tags` Ollama's.
    `base_context` is given where the base model's context differs from `max_context`. `facts` holds the numbers that no
    ModelConfig carries (vision, encoders). `unverified` names facts without a first-hand source. `why_not` says, for
    people, why herd cannot run it yet.
    """

    id: str
    name: str
    generation: str
    kind: Kind = "dense"
    config: ModelConfig | None
    total_params: int | None
    text_params: int | None = None
    active_params: int | None = None
    tokenizer: Family | None
    chat_format: str | None = None
    hf_base: tuple[str, ...] = ()
    hf_instruct: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("base",)
    native_shards: int | None = 1
    max_context: int | None = None
    base_context: int | None = None
    release_date: str | None
    knowledge_cutoff: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    why_not: str | None = None

    @property
    def runnable(self) -> bool:
        """Whether herd can run it (Llama 4: the text decoder)."""
        return self.why_not is None

    @property
    def repos(self) -> tuple[str, ...]:
        """All Hugging Face ids, tuned ones first."""
        return self.hf_instruct + self.hf_base

    def is_tuned(self, name: str) -> bool:
        """Whether `name`, one of `repos` or `native`, is a variant that was taught to chat or to judge."""
        return not self.hf_base or (bool(self.hf_instruct) and re.search("instruct|chat", name, re.I) is not None)


def meta(*names: str) -> tuple[str, ...]:
    """Repositories of Meta's organisation on the Hugging Face hub."""
    return tuple(f"meta-llama/{name}" for name in names)


def dense(id: str, name: str, config: ModelConfig, params: int, **row: Any) -> Release:
    """A text model: every parameter is in the decoder, and every token passes through all of them."""
    context = config.max_seq_len
    return Release(
        id=id,
        name=name,
        config=config,
        total_params=params,
        text_params=params,
        active_params=params,
        max_context=context,
        **row,
    )
