"""Which tokenizer files go beside the weights: made from the tokenizer, or copied where source and result are of one kind."""

from __future__ import annotations

from herd.checkpoint.hf import HFStore
from herd.checkpoint.store import origin
from herd.checkpoint.write.source import Source
from herd.errors import TokenizerError
from herd.tokenizer.write.huggingface import hf_files
from herd.tokenizer.write.meta import meta_file

__all__ = ["hf_tokenizer", "meta_tokenizer"]

NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a Hugging Face folder may have; copied as they are from one to another, they keep what herd does not model."""


def hf_tokenizer(source: Source) -> tuple[dict[str, bytes], list[str]]:
    """Files of a Hugging Face folder by name, and what there is to say about them. Raises TokenizerError."""
    if source.tokenizer is None:
        return {}, ["there is no tokenizer: the folder holds weights and configs only"]
    copied = _copied(source)
    if not copied:
        return hf_files(source.tokenizer, source.template, max_length=source.store.config.max_seq_len), []
    if source.template is not None and source.tokenizer.template != source.template:
        copied["chat_template.jinja"] = source.template.encode()
    return copied, []


def meta_tokenizer(source: Source) -> tuple[dict[str, bytes], list[str]]:
    """Files of a Meta folder by name, and what there is to say about them.

    A vocabulary that Meta's file cannot hold goes as Hugging Face files, which herd reads there. Raises TokenizerError.
    """
    if source.tokenizer is None:
        return {}, ["there is no tokenizer: the folder holds weights and params.json only"]
    try:
        return {"tokenizer.model": meta_file(source.tokenizer)}, []
    except TokenizerError as error:
        files, _ = hf_tokenizer(source)
        return files, [f"the tokenizer is in Hugging Face's files, which herd reads and Meta's code does not: {error}"]


def _copied(source: Source) -> dict[str, bytes]:
    store = origin(source.store)
    if not isinstance(store, HFStore):
        return {}
    found = {name: store.folder / name for name in NAMES if (store.folder / name).is_file()}
    return {name: path.read_bytes() for name, path in found.items()}
