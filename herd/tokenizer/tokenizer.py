"""What every Llama tokenizer can do, and the special tokens it carries. No torch.

Text becomes ids through `Tokenizer.encode`, which never produces a special id: special tokens are put into a prompt as ids
by the chat formats (`herd.chat`), so user text cannot forge them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from herd.errors import TokenizerError

__all__ = ["Family", "SpecialTokens", "Tokenizer", "check_text", "printable"]

Family = Literal["llama2", "codellama", "llama3", "llama4"]
"""Vocabulary family: SentencePiece without and with infill pieces, and the two tiktoken vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """The special ids of one vocabulary.

    `ids` maps every special name to its id; `aliases` maps other spellings of the same token (HF names, the names of the
    April 2024 release) to the same ids. `stop` are the ids that end a reply.
    """

    bos: int
    eos: int
    stop: frozenset[int]
    pad: int | None = None
    unk: int | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)

    def get(self, name: str) -> int | None:
        """Id of the special token `name` (any known spelling), or None."""
        found = self.ids.get(name)
        return self.aliases.get(name) if found is None else found


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> token ids for one vocabulary.

    `vocab_size` counts normal and special ids. `family` says which vocabulary family this is. `template` is the chat
    template that came with the checkpoint (Jinja source) and `chat_format` the name of the prompt format the checkpoint
    was trained with; both are None when the files do not say.
    """

    family: Family
    special: SpecialTokens
    vocab_size: int
    template: str | None
    chat_format: str | None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`. `bos`/`eos` add that id once at the end concerned.

        With `allow_special`, special names inside the text become their ids: only for trusted text. Lone surrogates
        raise TokenizerError.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. Unknown ids raise TokenizerError."""
        ...

    def bytes_of(self, id: int) -> bytes:
        """The bytes one id contributes to the text in the middle of a sequence (specials: empty)."""
        ...

    def piece(self, id: int) -> str:
        """A printable name of one id, for display."""
        ...


def check_text(text: str) -> None:
    """Raise TokenizerError when `text` holds a lone surrogate, which no UTF-8 and so no vocabulary can express."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise TokenizerError(f"the text holds a lone surrogate, {found}; remove it or decode the input again") from None


def printable(data: bytes) -> str:
    """`data` as text on one line: bytes that are not UTF-8 and control characters become escapes."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
