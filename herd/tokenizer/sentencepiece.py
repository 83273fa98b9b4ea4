"""Llama 1, Llama 2 and Code Llama: SentencePiece BPE with byte fallback, on the sentencepiece library.

Ids equal those of Meta's tokenizers (meta-llama/llama and meta-llama/codellama, llama/tokenizer.py) with one exception made on
purpose: Code Llama's infill pieces and `<step>` are ordinary pieces in Meta's files, so that user text such as " <PRE>" turns
into them there. Here text yields only normal, byte and unknown pieces; everything else is a special token.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from functools import cached_property

import sentencepiece

from herd.errors import TokenizerError
from herd.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, PieceModel, byte_piece
from herd.tokenizer.special import INFILL_PIECES, STEP_PIECE, SpecialSplitter, piece_specials
from herd.tokenizer.tokenizer import Family, check_text, printable

__all__ = ["SentencePieceTokenizer"]

_SPACE = "▁"  # how SentencePiece writes a space
_ANCHOR = "☺"  # Meta's stand-in for "text goes before": encoded with the infill text and cut off again
_UNKNOWN_TEXT = " ⁇ "  # what the library decodes <unk> to


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    # SentencePiece writes one U+FFFD for each byte it cannot decode, Python's "replace" one for a whole broken character.
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("herd.sentencepiece", _one_per_byte)


class SentencePieceTokenizer:
    """Tokenizer of a SentencePiece vocabulary, whichever file it came from.

    `original` is the vocabulary as it was given, `model` the one text is encoded with: there, no text yields a special piece.
    `visible` are user-defined or added pieces whose name is text (decoded, not skipped). Raises TokenizerError when the
    library refuses the vocabulary.
    """

    utf8_errors = "herd.sentencepiece"

    def __init__(
        self,
        model: PieceModel,
        *,
        template: str | None = None,
        chat_format: str | None = None,
        visible: Collection[int] = (),
    ) -> None:
        reserved = {i for i, kind in enumerate(model.types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
        named = {i for i, piece in enumerate(model.pieces) if piece in (*INFILL_PIECES, STEP_PIECE)}
        self._visible = frozenset(visible) | {i for i in reserved - named if model.types[i] == USER_DEFINED}
        types = list(model.types)
        for id in named | self._visible:
            types[id] = CONTROL
        self.original = model
        self.model = model if types == list(model.types) else model.with_types(types)
        self.special = piece_specials(model.pieces, reserved | named)
        self.family: Family = "codellama" if named else "llama2"
        self.template = template
        self.chat_format = chat_format
        self.vocab_size = len(model.pieces)
        self._bytes = [self._contribution(id) for id in range(self.vocab_size)]
        self._core = sentencepiece.SentencePieceProcessor()
        try:
            self._core.LoadFromSerializedProto(self.model.serialize())
        except RuntimeError as error:
            raise TokenizerError(f"sentencepiece refuses this vocabulary: {error}") from None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.family}: {self.vocab_size} pieces>"

    @cached_property
    def _splitter(self) -> SpecialSplitter:
        return SpecialSplitter(self.special)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`: see Tokenizer.encode. Each stretch between special tokens is encoded on its own, as Meta does."""
        check_text(text)
        if allow_special:
            ids: list[int] = []
            for piece in self._splitter.split(text):
                ids.extend((piece,) if isinstance(piece, int) else self._core.encode(piece))
        else:
            ids = self._core.encode(text)
        if bos and ids[:1] != [self.special.bos]:
            ids.insert(0, self.special.bos)
        if eos and ids[-1:] != [self.special.eos]:
            ids.append(self.special.eos)
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        """`encode` of every text, on `threads` threads (default: one per core)."""
        for text in texts:
            check_text(text)
        return self._core.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=threads or -1)

    def encode_infilling(self, text: str) -> list[int]:
        """Ids of `text` without the dummy prefix: for text that follows other text (Code Llama's suffix)."""
        anchor = self._core.encode(_ANCHOR)
        check_text(text)
        ids = self._core.encode(_ANCHOR + text)
        if ids[: len(anchor)] != anchor:
            raise TokenizerError(f"this vocabulary merges {_ANCHOR} with what follows, so it cannot encode infill text")
        return ids[len(anchor) :]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`: see Tokenizer.decode. The one space that the dummy prefix put before the text is removed."""
        return self._decode(ids, skip_special=skip_special, start=True)

    def decode_infilling(self, ids: Sequence[int]) -> str:
        """Text of `ids` that follow other text: no leading space is removed (Code Llama's middle)."""
        return self._decode(ids, skip_special=True, start=False)

    def _decode(self, ids: Sequence[int], *, skip_special: bool, start: bool) -> str:
        done: list[str] = []
        run: list[bytes] = []
        for id in ids:
            if self.is_text(id):
                run.append(self.first_bytes(id) if start else self.bytes_of(id))
                start = False
                continue
            # A special token ends a character, broken or not.
            done.append(b"".join(run).decode("utf-8", self.utf8_errors))
            run.clear()
            if not skip_special:
                done.append(self.piece(id))
        done.append(b"".join(run).decode("utf-8", self.utf8_errors))
        return "".join(done)

    def bytes_of(self, id: int) -> bytes:
        """Bytes of one id after other text; empty for special tokens."""
        return self._bytes[self._check(id)]

    def first_bytes(self, id: int) -> bytes:
        """Bytes of one id when no text precedes it: without the space that the dummy prefix put there."""
        data = self.bytes_of(id)
        drop = self.model.dummy_prefix and self.is_text(id) and self.model.pieces[id].startswith(_SPACE)
        return data[1:] if drop else data

    def is_text(self, id: int) -> bool:
        """Whether the id adds to the text (even if only the space that is removed at its start)."""
        return bool(self._bytes[self._check(id)])

    def piece(self, id: int) -> str:
        """The piece as the vocabulary writes it (U+2581 for a space, `<0x0A>` for a byte), with control characters escaped."""
        return printable(self.model.pieces[self._check(id)].encode())

    def _check(self, id: int) -> int:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is not in this vocabulary of {self.vocab_size} ids")
        return id

    def _contribution(self, id: int) -> bytes:
        piece, kind = self.model.pieces[id], self.model.types[id]
        if kind in (NORMAL, UNUSED) or id in self._visible:
            return piece.replace(_SPACE, " ").encode()
        if kind == BYTE:
            value = byte_piece(piece)
            return b"" if value is None else bytes((value,))
        return _UNKNOWN_TEXT.encode() if kind == UNKNOWN else b""
