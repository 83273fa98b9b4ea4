"""The vocabulary inside a GGUF file, from its metadata keys (ggml-org/ggml, docs/gguf.md; llama.cpp's converters).

`tokenizer.ggml.model` is "llama" for SentencePiece (tokens, scores, token_type) and "gpt2" for byte BPE (byte-level tokens,
`tokenizer.ggml.pre` names the regex). The reader of the file itself lives in `herd.checkpoint`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import from_alphabet
from herd.tokenizer.merges import check_byte_merges
from herd.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, PieceModel, byte_piece
from herd.tokenizer.released import is_llama2, llama2_scores, released_family
from herd.tokenizer.special import RANKS
from herd.tokenizer.tokenizer import Family, Tokenizer
from herd.tokenizer.vocabulary import ByteVocabulary, PieceVocabulary, Settings, TokenizerFilesWarning, build_tokenizer

__all__ = ["tokenizer_from_gguf"]

_PRE: Mapping[str, Family] = {"llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3", "llama4": "llama4"}
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, family: Family | None = None) -> Tokenizer:
    """The tokenizer described by the metadata of a GGUF file. `family` overrides `tokenizer.ggml.pre`.

    Raises TokenizerError when keys are missing, do not fit together, or describe a vocabulary that is not Llama's.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        vocabulary = _pieces(metadata)
    elif kind == "gpt2":
        vocabulary = _byte_bpe(metadata, family)
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}; Llama models have 'llama' (SentencePiece) or 'gpt2' (byte BPE)"
        )
    template = metadata.get("tokenizer.chat_template")
    for note in vocabulary.notes:
        warnings.warn(f"GGUF vocabulary: {note}", TokenizerFilesWarning, stacklevel=2)
    size = len(metadata["tokenizer.ggml.tokens"])
    ends = (metadata.get(f"tokenizer.ggml.{key}") for key in _STOP_KEYS)
    return build_tokenizer(
        vocabulary,
        Settings(
            template=template if isinstance(template, str) else None,
            stop_ids=frozenset(int(id) for id in ends if id is not None and 0 <= int(id) < size),
        ),
    )


def _byte_bpe(metadata: Mapping[str, Any], family: Family | None) -> ByteVocabulary:
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    # Normal tokens come first; what follows are special and added tokens and padding.
    n_ranks = next((id for id, kind in enumerate(types) if kind != NORMAL), len(tokens))
    if n_ranks == len(tokens):  # no types: the released vocabularies are known by their size
        n_ranks = next((count for count in RANKS.values() if count <= n_ranks < count + 4096), n_ranks)
    names = tokens[:n_ranks]
    ranks = from_alphabet(names)
    pre = metadata.get("tokenizer.ggml.pre")
    released = released_family(ranks)
    found = family or released or _PRE.get(str(pre))
    if found is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r}, which is not one of Llama's ({', '.join(_PRE)}), and the tokens are not a released "
            "vocabulary; pass family='llama3' or family='llama4' to cut text with their regex"
        )
    if released is None:
        check_byte_merges(names, metadata.get("tokenizer.ggml.merges") or ())
    listed = [(id, kind) for id, kind in enumerate(types) if id >= n_ranks and kind != UNUSED]
    return ByteVocabulary(
        ranks=ranks,
        family=found,
        added={tokens[id]: id for id, _ in listed},
        visible=frozenset(id for id, kind in listed if kind == USER_DEFINED),
    )


def _pieces(metadata: Mapping[str, Any]) -> PieceVocabulary:
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    if "tokenizer.ggml.token_type" not in metadata:
        known = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
        types = [BYTE if byte_piece(token) is not None else known.get(token, NORMAL) for token in tokens]
    scores = [float(score) for score in metadata.get("tokenizer.ggml.scores") or ()]
    size = len(tokens)
    while size and types[size - 1] == UNUSED and tokens[size - 1] == f"[PAD{size - 1}]":
        size -= 1  # converters fill embedding rows without a token
    if len(scores) == len(tokens):
        scores = scores[:size]
    tokens, types = tokens[:size], types[:size]
    notes: tuple[str, ...] = ()
    if len({score for score, kind in zip(scores, types, strict=False) if kind == NORMAL}) <= 1:
        if not is_llama2(tokens):
            raise TokenizerError("tokenizer.ggml.scores are missing or all the same, so the merge order is unknown")
        scores = llama2_scores(tokens)
        notes = ("the file has no merge scores, though the tokens are Llama 2's. Using Llama 2's scores",)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = PieceModel(pieces=tokens, scores=scores, types=types, dummy_prefix=bool(prefix))
    return PieceVocabulary(model=model, notes=notes)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary")
    if not all(isinstance(token, str) for token in tokens):
        raise TokenizerError("tokenizer.ggml.tokens holds something that is not a string")
    return list(tokens)


def _types(metadata: Mapping[str, Any], size: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in metadata:
        return [NORMAL] * size
    types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    if len(types) != size:
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(types)} entries for {size} tokens")
    return types
