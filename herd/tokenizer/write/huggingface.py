"""tokenizer.json and the files around it, as transformers 4.45 and later and the tokenizers package (0.20 and later) read them.

Format: huggingface/tokenizers, src/models/bpe and src/pre_tokenizers; huggingface/transformers, convert_slow_tokenizer.py. The
class is PreTrainedTokenizerFast for every vocabulary: it takes tokenizer.json as it is, where LlamaTokenizer of transformers 5
rebuilds Llama 2's with Metaspace, which puts no space before a text that begins with one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import to_alphabet
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.write.mergelist import merges_of_pieces, merges_of_ranks
from herd.tokenizer.write.meta import piece_file
from herd.tokenizer.write.names import Added, added_tokens, turn_end, writable

__all__ = ["hf_files"]

_SPACE = "▁"


def hf_files(tokenizer: Tokenizer, template: str | None = None, *, max_length: int | None = None) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder: file name -> content.

    Always tokenizer.json, tokenizer_config.json and special_tokens_map.json; tokenizer.model for a SentencePiece vocabulary;
    chat_template.jinja when there is a `template`. `max_length` is the context in tokens. Raises TokenizerError for a
    vocabulary that the format cannot express.
    """
    assert writable(tokenizer)
    added = added_tokens(tokenizer)
    chat = template is not None or tokenizer.chat_format not in (None, "base")
    names = {entry.id: entry.name for entry in added}
    named = {"bos_token": names[tokenizer.special.bos], "eos_token": _name(tokenizer, names, chat)}
    for key, id in (("pad_token", tokenizer.special.pad), ("unk_token", tokenizer.special.unk)):
        if id is not None:
            named[key] = names[id]
    if isinstance(tokenizer, TiktokenTokenizer):
        _refuse_gaps(len(tokenizer.ranks), added)
        content = _byte_level(tokenizer, added)
    else:
        content = _pieces(tokenizer, added)
    files = {
        "tokenizer.json": _dump(content, indent=None),
        "tokenizer_config.json": _dump(_config(tokenizer, added, named, max_length)),
        "special_tokens_map.json": _dump(named),
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = piece_file(tokenizer)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _name(tokenizer: TiktokenTokenizer | SentencePieceTokenizer, names: dict[int, str], chat: bool) -> str:
    id = turn_end(tokenizer, chat=chat)
    return names.get(id, names[tokenizer.special.eos])  # a stop id that is an ordinary token is generation_config's


def _config(
    tokenizer: Tokenizer, added: Sequence[Added], named: dict[str, str], max_length: int | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(entry.id): _added(entry, id=False) for entry in added},
        **named,
        # Off, so that decoding gives back the text: it would drop the space before a full stop.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["legacy"] = True  # each stretch between special tokens gets its own leading space, as in Meta's code
    if max_length is not None:
        config["model_max_length"] = max_length
    if tokenizer.chat_format is not None:
        config["chat_format"] = tokenizer.chat_format  # herd's own: which prompt format the checkpoint was trained with
    return config


def _byte_level(tokenizer: TiktokenTokenizer, added: Sequence[Added]) -> dict[str, Any]:
    """tokenizer.json of Llama 3 and 4: regex split, byte-level alphabet, whole pieces first (ignore_merges)."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = {"Regex": REGEX[tokenizer.family]}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    vocab = {name: id for id, name in enumerate(to_alphabet(tokenizer.ranks))}
    return _content(
        tokenizer,
        added,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        rules={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True},
        vocab=vocab,
        merges=merges_of_ranks(tokenizer.ranks),
    )


def _pieces(tokenizer: SentencePieceTokenizer, added: Sequence[Added]) -> dict[str, Any]:
    """tokenizer.json of Llama 1, 2 and Code Llama: spaces as U+2581, one before the text, byte fallback."""
    model = tokenizer.model
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoder = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers = [replace]
    if model.dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unk = next(entry.name for entry in added if entry.id == tokenizer.special.unk)
    return _content(
        tokenizer,
        added,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoder},
        rules={"unk_token": unk, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
        vocab={piece: id for id, piece in enumerate(model.pieces)},
        merges=merges_of_pieces(model),
    )


def _content(
    tokenizer: TiktokenTokenizer | SentencePieceTokenizer,
    added: Sequence[Added],
    *,
    normalizer: Any,
    pre_tokenizer: Any,
    decoder: Any,
    rules: dict[str, Any],
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    bos_id = tokenizer.special.bos
    bos = next(entry.name for entry in added if entry.id == bos_id)
    pair = [
        part
        for type_id, sequence in enumerate("AB")
        for part in (
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        )
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(entry) for entry in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": pair[:2],
            "pair": pair,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **rules,
            "vocab": vocab,
            "merges": merges,  # last, so that readers can skip it
        },
    }


def _added(entry: Added, *, id: bool = True) -> dict[str, Any]:
    number = {"id": entry.id} if id else {}
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {**number, "content": entry.name, **rules, "special": entry.special}


def _refuse_gaps(first: int, added: Sequence[Added]) -> None:
    """The tokenizers package numbers added tokens by their place in the list, so ids must follow one another."""
    for id, entry in enumerate(added, first):
        if entry.id != id:
            raise TokenizerError(
                f"id {id} has no token, but {entry.name} has id {entry.id}: tokenizer.json cannot hold such a gap"
            )


def _dump(content: dict[str, Any], indent: int | None = 2) -> bytes:
    separators = (",", ":") if indent is None else None
    return (json.dumps(content, ensure_ascii=False, indent=indent, separators=separators) + "\n").encode()
