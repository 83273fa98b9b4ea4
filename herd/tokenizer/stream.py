"""Ids in one at a time, whole characters out: the text of a reply while it is being generated."""

from __future__ import annotations

import codecs

from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Turns a stream of ids into text; what `push` and `flush` return, joined, is `tokenizer.decode(ids)`.

    Bytes that could still become a character are held back, so no half character and no premature U+FFFD comes out. With
    `follows_text` the ids continue a text, so SentencePiece's leading space stays (decode_infilling).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, follows_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes_of = tokenizer.bytes_of
        # SentencePiece vocabularies treat the first text of a sequence differently; byte-BPE ones do not.
        self._first_bytes = getattr(tokenizer, "first_bytes", tokenizer.bytes_of)
        self._start = self._start_again = not follows_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(getattr(tokenizer, "utf8_errors", "replace"))

    def push(self, id: int) -> str:
        """The text that `id` completes; often empty. Raises TokenizerError for an unknown id."""
        data = self._bytes_of(id)
        if data:
            data = self._first_bytes(id) if self._start else data
            self._start = False
            return self._decoder.decode(data)
        return self._close() + ("" if self._skip_special else self._tokenizer.piece(id))

    def flush(self) -> str:
        """The text of bytes still held back (U+FFFD for a broken character); the next push starts a new text."""
        self._start = self._start_again
        return self._close()

    def _close(self) -> str:
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest
