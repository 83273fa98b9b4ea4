"""What every written form needs to know of a tokenizer: its added tokens as a file lists them, and which one ends a turn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeGuard

from herd.errors import TokenizerError
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import byte_bpe_specials, known_aliases, piece_specials
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import SpecialTokens, Tokenizer

__all__ = ["Added", "Writable", "added_tokens", "own_stops", "turn_end", "writable"]

Writable = TiktokenTokenizer | SentencePieceTokenizer

_RENUMBERED = re.compile(r"<\|\w*reserved_special_token_\d+\|>")
_TURN_ENDS = ("<|eot_id|>", "<|eot|>")


@dataclass(frozen=True, slots=True)
class Added:
    """One added token: `special` ones are skipped in decoded text, the others are text."""

    id: int
    name: str
    special: bool


def writable(tokenizer: Tokenizer) -> TypeGuard[Writable]:
    """Whether this is a tokenizer with a vocabulary. Raises TokenizerError when not, so that it reads as a check."""
    if isinstance(tokenizer, Writable):
        return True
    raise TokenizerError(f"{type(tokenizer).__name__} has no vocabulary that could be written")


def added_tokens(tokenizer: Writable) -> list[Added]:
    """The special and added tokens in id order, under the names that a file gives them.

    A name that a checkpoint gave to one of Meta's reserved ids (`<|im_start|>` for 128002) is preferred to Meta's: its chat
    template uses it. Other numberings of the reserved names are not.
    """
    special = tokenizer.special
    names = {id: name for name, id in special.ids.items()}
    if isinstance(tokenizer, TiktokenTokenizer):
        usual = known_aliases(tokenizer.family)
        for alias, id in special.aliases.items():
            if alias not in usual and not _RENUMBERED.fullmatch(alias):
                names[id] = alias
    return [
        Added(id, name, special=id == special.unk or not tokenizer.is_text(id)) for id, name in sorted(names.items())
    ]


def own_stops(tokenizer: Writable) -> list[int]:
    """The ids that end a reply although no name says so: those a checkpoint's settings added."""
    return sorted(tokenizer.special.stop - _usual(tokenizer).stop)


def turn_end(tokenizer: Writable, *, chat: bool) -> int:
    """The id a file calls `eos_token`: what ends a turn in a chat model, what ends a text in a base model."""
    special = tokenizer.special
    if own := own_stops(tokenizer):
        return own[0]
    ends = (special.get(name) for name in _TURN_ENDS) if chat else ()
    return next((id for id in ends if id is not None), special.eos)


def _usual(tokenizer: Writable) -> SpecialTokens:
    """The special tokens this vocabulary has when nothing but its names speaks."""
    ids = tokenizer.special.ids
    if isinstance(tokenizer, TiktokenTokenizer):
        return byte_bpe_specials(tokenizer.family, len(tokenizer.ranks), ids)
    return piece_specials(tokenizer.model.pieces, set(ids.values()))
