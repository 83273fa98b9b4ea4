"""The tokenizer keys of a GGUF file, as llama.cpp's converters write them (ggml-org/ggml, docs/gguf.md; convert_hf_to_gguf.py).

| key | GGUF type |
|---|---|
| tokenizer.ggml.model, .pre, tokenizer.chat_template | string |
| tokenizer.ggml.tokens, .merges | array of string |
| tokenizer.ggml.scores | array of f32 |
| tokenizer.ggml.token_type | array of i32 |
| tokenizer.ggml.*_token_id | u32 |
| tokenizer.ggml.add_bos_token, .add_eos_token, .add_space_prefix | bool |
"""

from __future__ import annotations

import warnings
from typing import Any

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import to_alphabet
from herd.tokenizer.pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import INFILL_PIECES
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.vocabulary import TokenizerFilesWarning
from herd.tokenizer.write.mergelist import merges_of_ranks
from herd.tokenizer.write.names import Writable, added_tokens, own_stops, turn_end, writable

__all__ = ["F32_ARRAYS", "I32_ARRAYS", "gguf_fields"]

F32_ARRAYS = ("tokenizer.ggml.scores",)
I32_ARRAYS = ("tokenizer.ggml.token_type",)
"""Keys whose numbers have another type than a writer would choose by itself; every other number is a u32."""

_PRE = {"llama3": "llama-bpe", "llama4": "llama4"}
_CODE_LLAMA = (32_016, 32_000)
"""Tokens and rows of the 34B and the Python models."""
_UNUSED_SCORE = -1000.0
"""What llama.cpp's converter gives padding; it never merges."""
_TURN_ENDS = ("<|eot_id|>", "<|eot|>", INFILL_PIECES[-1])
_MESSAGE_ENDS = ("<|eom_id|>", "<|eom|>")
_FIM_KEYS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))
"""Of prefix, suffix and middle, in today's spelling and in the older one that converters still write."""


def gguf_fields(tokenizer: Tokenizer, template: str | None = None, *, rows: int | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys and values of a GGUF file, in the order converters write them.

    `rows` is the number of embedding rows: llama.cpp takes it from the token list, so ids without a token are written as
    unused `[PADid]`. Values are str, bool, int and lists of str, int or float (types: see above). Raises TokenizerError when
    there are fewer rows than tokens, except for Code Llama's infill pieces, which the 34B and Python models have no rows for.
    """
    assert writable(tokenizer)
    names, scores, types = _columns(tokenizer)
    size = len(names)
    rows = size if rows is None else rows
    if rows < size:
        _drop_rowless(tokenizer, rows)
        names, scores, types = names[:rows], scores[:rows], types[:rows]
    for id in range(size, rows):
        names.append(f"[PAD{id}]")
        scores.append(_UNUSED_SCORE)
        types.append(UNUSED)
    fields: dict[str, Any] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields |= {"model": "llama", "pre": "default", "tokens": names, "scores": scores, "token_type": types}
    else:
        fields |= {"model": "gpt2", "pre": _PRE[tokenizer.family], "tokens": names, "token_type": types}
        fields["merges"] = [" ".join(pair) for pair in merges_of_ranks(tokenizer.ranks)]
    chat = template is not None or tokenizer.chat_format not in (None, "base")
    ids = {key: id for key, id in _ids(tokenizer, chat).items() if id < rows}
    fields |= {f"{key}_token_id": id for key, id in ids.items()}
    fields |= {"add_bos_token": True, "add_eos_token": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields["add_space_prefix"] = tokenizer.model.dummy_prefix
    done = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if template is not None:
        done["tokenizer.chat_template"] = template
    return done


def _columns(tokenizer: Writable) -> tuple[list[str], list[float], list[int]]:
    """Names, scores and types of all ids; byte BPE has no scores."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer.model
        names, types = list(model.pieces), list(model.types)
        scores = list(model.scores)
    else:
        names = to_alphabet(tokenizer.ranks)
        names += [f"[PAD{id}]" for id in range(len(names), tokenizer.vocab_size)]
        types = [NORMAL if id < len(tokenizer.ranks) else UNUSED for id in range(len(names))]
        scores = [0.0] * len(names)
    for entry in added_tokens(tokenizer):
        names[entry.id] = entry.name
        if isinstance(tokenizer, TiktokenTokenizer) or not entry.special:
            types[entry.id] = CONTROL if entry.special else USER_DEFINED
    return names, scores, types


def _ids(tokenizer: Writable, chat: bool) -> dict[str, int]:
    """The special ids that have a key of their own."""
    special = tokenizer.special
    ids: dict[str, int] = {"bos": special.bos, "eos": turn_end(tokenizer, chat=chat)}
    named = {
        "eot": next((id for name in _TURN_ENDS if (id := special.get(name)) is not None), None),
        "eom": next((id for name in _MESSAGE_ENDS if (id := special.get(name)) is not None), None),
        "unknown": special.unk,
        "padding": special.pad,
    }
    ids |= {key: id for key, id in named.items() if id is not None}
    more = own_stops(tokenizer)[1:]
    for key in ("eot", "eom"):  # files of Llama 3 and 4 need no key for these two: their names say it
        if more:
            ids[key] = more.pop(0)
    if more:
        warnings.warn(f"GGUF has three keys for ids that end a reply; {more} are left out", TokenizerFilesWarning, 3)
    if tokenizer.family == "codellama":
        for keys, name in zip(_FIM_KEYS, INFILL_PIECES[:3], strict=True):
            if (id := special.get(name)) is not None:
                ids |= dict.fromkeys(keys, id)
    return ids


def _drop_rowless(tokenizer: Writable, rows: int) -> None:
    """Accept the one case in which tokens have no rows, with a warning; refuse every other."""
    if (tokenizer.vocab_size, rows) != _CODE_LLAMA:
        raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows} embedding rows")
    warnings.warn(
        f"{tokenizer.vocab_size - rows} infill tokens have no embedding rows in this model and are left out",
        TokenizerFilesWarning,
        stacklevel=3,
    )
