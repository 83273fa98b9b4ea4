"""A trained model to a Hugging Face folder, through the writer that converts checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from herd.chat.templates import template_of
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.hf_config import TokenIds
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.model.llama import Llama

__all__ = ["export_folder"]


def export_folder(
    model: Llama,
    folder: Path,
    dtype: torch.dtype,
    *,
    bos: int,
    stop: Sequence[int],
    pad: int,
    sampling: Mapping[str, Any],
) -> None:
    """Write everything but the tokenizer files (`herd.train.vocabulary.write_tokenizer`) and the model card.

    `sampling` are the defaults that go with the model, in the words of GenerationDefaults (temperature, top_p, ...). Raises
    ConfigError for a model that config.json cannot describe.
    """
    ids = TokenIds(bos, frozenset(stop), pad)
    source = Source(ModelStore(model), None, GenerationDefaults(ids.stop, **sampling), None)
    write_hf(source, folder, dtype=dtype, ids=ids)
    (folder / "chat_template.jinja").write_text(template_of("llama3") or "", encoding="utf-8")
