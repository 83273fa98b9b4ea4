"""What a vocabulary file holds once it is read, before it becomes a tokenizer.

Every reader (`tokenizer.model` of both kinds, `tokenizer.json`, GGUF) ends in one of these two records; comparing two records
is how the files of one folder are checked against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.special import byte_bpe_specials, with_added, with_stop
from herd.tokenizer.tokenizer import Family, SpecialTokens, Tokenizer

__all__ = ["ByteVocabulary", "PieceVocabulary", "Settings", "TokenizerFilesWarning", "build_tokenizer"]


class TokenizerFilesWarning(UserWarning):
    """Tokenizer files disagree, or one was put right; the message says what is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteVocabulary:
    """A byte-BPE vocabulary: `ranks[i]` are the bytes of id i; `added` the special and added tokens the file lists.

    `visible` are the added ids whose name is text; `notes` what the reader put right, for the user to see.
    """

    ranks: Sequence[bytes]
    family: Family
    added: Mapping[str, int] = field(default_factory=dict)
    visible: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceVocabulary:
    """A SentencePiece vocabulary; `added` are tokens the file lists beyond or among the pieces."""

    model: PieceModel
    added: Mapping[str, int] = field(default_factory=dict)
    visible: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the files beside a vocabulary say: chat template, prompt format, ids and names that end a reply, added tokens."""

    template: str | None = None
    chat_format: str | None = None
    stop_ids: frozenset[int] = frozenset()
    stop_names: frozenset[str] = frozenset()
    added: Mapping[str, int] = field(default_factory=dict)
    visible: frozenset[int] = frozenset()


def build_tokenizer(vocabulary: ByteVocabulary | PieceVocabulary, settings: Settings) -> Tokenizer:
    """The tokenizer of a vocabulary. Raises TokenizerError when its parts do not fit together."""
    added = {**settings.added, **vocabulary.added}
    visible = vocabulary.visible | settings.visible
    if isinstance(vocabulary, ByteVocabulary):
        from herd.tokenizer.tiktoken import TiktokenTokenizer

        special = byte_bpe_specials(vocabulary.family, len(vocabulary.ranks), added)
        return TiktokenTokenizer(
            vocabulary.ranks,
            vocabulary.family,
            _with_settings(special, settings),
            template=settings.template,
            chat_format=settings.chat_format,
            visible=visible & frozenset(special.ids.values()),
        )
    from herd.tokenizer.sentencepiece import SentencePieceTokenizer

    model = vocabulary.model
    beyond = sorted((id, name) for name, id in added.items() if id >= len(model.pieces))
    if beyond:
        model = model.with_added([(name, id) for id, name in beyond])
    tokenizer = SentencePieceTokenizer(
        model,
        template=settings.template,
        chat_format=settings.chat_format,
        visible=visible & frozenset(id for id, _ in beyond),
    )
    known = {name: id for name, id in added.items() if id in set(tokenizer.special.ids.values())}
    tokenizer.special = _with_settings(with_added(tokenizer.special, known), settings)
    return tokenizer


def _with_settings(special: SpecialTokens, settings: Settings) -> SpecialTokens:
    named = (special.get(name) for name in settings.stop_names)
    return with_stop(special, [*settings.stop_ids, *(id for id in named if id is not None)])
