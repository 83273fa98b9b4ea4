"""Meta's tokenizer.model: base64 ranks for Llama 3 and 4, a SentencePiece model for Llama 1, 2 and Code Llama."""

from __future__ import annotations

import binascii

from herd.errors import TokenizerError
from herd.tokenizer.pieces import CONTROL, USER_DEFINED, PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import llama3_names, llama4_names
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.write.names import added_tokens, writable

__all__ = ["meta_file", "piece_file", "unlike_meta"]


def meta_file(tokenizer: Tokenizer, *, any_special: bool = False) -> bytes:
    """The bytes of `tokenizer.model`.

    A vocabulary that came from such a file gives exactly that file back. The special tokens of Llama 3 and 4 are not in
    the file but in Meta's code: when this tokenizer has others, TokenizerError says so, unless `any_special` accepts that
    the file loses them.
    """
    assert writable(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return piece_file(tokenizer)
    if not any_special and (difference := unlike_meta(tokenizer)):
        raise TokenizerError(
            f"Meta's tokenizer.model holds no special tokens, its code knows them by heart, and {difference}. Write Hugging "
            "Face files or GGUF instead"
        )
    lines = [b"%b %d\n" % (binascii.b2a_base64(token, newline=False), id) for id, token in enumerate(tokenizer.ranks)]
    return b"".join(lines)


def unlike_meta(tokenizer: TiktokenTokenizer) -> str | None:
    """How the special tokens differ from those Meta's code gives a vocabulary of this family, in words; None when not."""
    names = llama3_names() if tokenizer.family == "llama3" else llama4_names()
    n = len(tokenizer.ranks)
    ours = {entry.id: entry.name for entry in added_tokens(tokenizer)}
    if len(ours) != len(names):
        return f"this vocabulary has {len(ours)} special tokens, not {len(names)}"
    for id, name in enumerate(names, n):
        if ours.get(id) != name:
            return f"id {id} is {ours.get(id)} here, {name} there"
    return None


def piece_file(tokenizer: SentencePieceTokenizer) -> bytes:
    """The SentencePiece model file: the one the vocabulary came from, or one written from its pieces."""
    model = tokenizer.original
    if model.source is not None:
        return model.source
    # Visible tokens are kept out of text by herd's own type; the file says what they are.
    types = [
        USER_DEFINED if kind == CONTROL and tokenizer.is_text(id) else kind
        for id, kind in enumerate(tokenizer.model.types)
    ]
    return PieceModel(
        pieces=model.pieces, scores=model.scores, types=types, dummy_prefix=model.dummy_prefix
    ).serialize()
