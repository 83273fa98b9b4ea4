"""A vocabulary of single characters: a prompt format can be looked at as text without a checkpoint. No torch.

Special tokens are those of a family, every other id is one character. What a format renders over it and `text_of` reads back is
the prompt as a chat template would have to write it: a SentencePiece vocabulary's own space in front of a text is left out
behind a special token, where the tokenizer adds it again, and written between two texts that are encoded apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from herd.errors import TokenizerError
from herd.tokenizer.special import INFILL_PIECES, RANKS, STEP_PIECE, SpecialSplitter, byte_bpe_specials, piece_specials
from herd.tokenizer.tokenizer import Family, SpecialTokens, check_text

__all__ = ["Letters"]

FIRST = 2**21
"""Id of the character U+0000: above every special id."""

_SPACE = FIRST - 1
"""The space that SentencePiece puts in front of a text."""


class Letters:
    """A `Tokenizer` of the special tokens of `family` and of all characters. For display and comparison, not for a model."""

    template: str | None = None
    chat_format: str | None = None

    def __init__(self, family: Family) -> None:
        self.family: Family = family
        self.special = _specials(family)
        self.vocab_size = FIRST + 0x110000
        self._spaced = family in ("llama2", "codellama")
        self._names = {id: name for name, id in self.special.ids.items()}
        self._splitter = SpecialSplitter(self.special)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """One id per character; as the `Tokenizer` protocol says."""
        check_text(text)
        ids = [self.special.bos] if bos else []
        for part in self._splitter.split(text) if allow_special else [text]:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += [_SPACE] if self._spaced else []
                ids += [FIRST + ord(char) for char in part]
        return [*ids, self.special.eos] if eos else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, special tokens by name unless skipped. Unknown ids raise TokenizerError."""
        out: list[str] = []
        after_text = False
        for id in ids:
            if id in self._names:
                out.append("" if skip_special else self._names[id])
            elif id == _SPACE:
                out.append(" " if after_text else "")
            elif FIRST <= id < self.vocab_size:
                out.append(chr(id - FIRST))
            else:
                raise TokenizerError(f"there is no token {id} in the vocabulary of characters")
            after_text = id not in self._names
        return "".join(out)

    def bytes_of(self, id: int) -> bytes:
        """The bytes of one id in the middle of a text."""
        return b"" if id in self._names else b" " if id == _SPACE else chr(id - FIRST).encode()

    def piece(self, id: int) -> str:
        """A printable name of one id."""
        return self._names.get(id) or repr(self.bytes_of(id).decode())[1:-1]


def _specials(family: Family) -> SpecialTokens:
    if family in RANKS:
        return byte_bpe_specials(family, RANKS[family])
    names = ["<unk>", "<s>", "</s>", *(INFILL_PIECES if family == "codellama" else ()), STEP_PIECE]
    special = piece_specials(names, range(len(names)))
    # Only Code Llama 70B ends a turn with <step>, which the format itself says.
    return replace(special, stop=frozenset({special.eos}))
